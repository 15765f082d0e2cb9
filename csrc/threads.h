// Work over threads of the host.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <system_error>
#include <thread>
#include <vector>

namespace maskformer_fast {

// Calls work(worker, task) once for every task in 0..tasks-1, on at most `threads` threads, the calling one included
// (worker 0). `worker` is in 0..threads-1 and no two calls with one worker overlap, so it may index scratch memory.
// Tasks start in order. `work` must not throw.
template <class Work>
void parallel_for(int64_t tasks, int threads, const Work& work) {
  std::atomic<int64_t> next{0};
  const auto run = [&](int worker) {
    for (int64_t task; (task = next.fetch_add(1, std::memory_order_relaxed)) < tasks;) work(worker, task);
  };
  std::vector<std::thread> helpers;
  helpers.reserve(std::max(0, threads - 1));
  for (int worker = 1; worker < threads && worker < tasks; ++worker) {
    try {
      helpers.emplace_back(run, worker);
    } catch (const std::system_error&) {
      break;  // no more threads to be had: those that run do all of it
    }
  }
  run(0);
  for (std::thread& helper : helpers) helper.join();
}

}  // namespace maskformer_fast
