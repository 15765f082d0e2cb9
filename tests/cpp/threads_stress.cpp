// Exercises csrc/threads.cpp for tests/test_threads.py, which builds it with ThreadSanitizer where the compiler has it.
// Exits with 0 where every task ran exactly once, on workers that never overlapped, with all its writes seen.
#include "threads.h"

#include <chrono>
#include <cstdio>
#include <memory>
#include <thread>
#include <vector>

using maskformer_fast::parallel_for;

namespace {

bool loop_is_right(int tasks, int threads) {
  std::vector<int> ran(tasks), of_worker(threads);  // plain memory: a race is the sanitizer's to find
  std::unique_ptr<std::atomic<int>[]> inside(new std::atomic<int>[threads]());
  std::atomic<bool> right{true};
  parallel_for(tasks, threads, [&](int worker, int64_t task) {
    if (worker < 0 || worker >= threads || inside[worker].fetch_add(1) != 0) right = false;
    ++ran[task];
    ++of_worker[worker];
    inside[worker].fetch_sub(1);
  });
  int total = 0;
  for (const int count : of_worker) total += count;
  for (const int count : ran) right = right && count == 1;
  return right && total == tasks;
}

bool nested_is_right() {
  std::atomic<int> inner{0};
  parallel_for(8, 3, [&](int, int64_t) { parallel_for(5, 4, [&](int, int64_t) { ++inner; }); });
  return inner == 40;
}

bool helpers_take_part() {
  std::vector<int> of_worker(3);
  parallel_for(12, 3, [&](int worker, int64_t) {
    ++of_worker[worker];
    std::this_thread::sleep_for(std::chrono::milliseconds(10));
  });
  return of_worker[0] > 0 && of_worker[1] > 0 && of_worker[2] > 0;
}

}  // namespace

int main() {
  std::atomic<int> failures{0};
  for (int i = 0; i < 2000; ++i) failures += !loop_is_right(i % 40, 1 + i % 5);
  for (int i = 0; i < 30; ++i) {  // helpers fall asleep in between
    std::this_thread::sleep_for(std::chrono::milliseconds(1));
    failures += !loop_is_right(100, 4);
  }
  std::vector<std::thread> callers;
  for (int c = 0; c < 4; ++c) {
    callers.emplace_back([&, c] {
      for (int i = 0; i < 300; ++i) failures += !loop_is_right(20 + c, 2 + c) || (i % 20 == 0 && !nested_is_right());
    });
  }
  for (std::thread& caller : callers) caller.join();
  failures += !nested_is_right();
  failures += !helpers_take_part();
  std::printf("%d failures\n", failures.load());
  return failures != 0;
}
