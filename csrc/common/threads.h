// Parallel loops over threads of the host.
#pragma once

#include <atomic>
#include <cstdint>

namespace maskformer_fast {

// Calls run(context, 0) on the calling thread and run(context, worker) on up to `helpers` further threads, each with a
// worker number of its own in 1..helpers. Returns when all calls have returned. A helper that has not started when the
// calling thread is done is left out, so `run` must take its work from a common counter, as parallel_for does.
//
// The helpers are kept, asleep, for the next call. While they work for one caller, calls from another thread or from
// inside `run` use the calling thread only. A forked process starts helpers of its own. Nothing has to be shut down at
// exit.
void run_on_threads(int helpers, void (*run)(const void* context, int worker), const void* context);

// Calls work(worker, task) once for every task in 0..tasks-1, on at most `threads` threads. The calling thread is one
// of them, as worker 0. `worker` is in 0..threads-1, and two calls with the same worker never overlap, so `worker` may
// index scratch memory. Tasks start in order. `work` must not throw.
template <class Work>
void parallel_for(int64_t tasks, int threads, const Work& work) {
  std::atomic<int64_t> next{0};
  const auto run = [&](int worker) {
    for (int64_t task; (task = next.fetch_add(1, std::memory_order_relaxed)) < tasks;) work(worker, task);
  };
  if (threads > tasks) threads = static_cast<int>(tasks);
  if (threads <= 1) {
    run(0);
    return;
  }
  run_on_threads(
      threads - 1, [](const void* context, int worker) { (*static_cast<decltype(run)*>(context))(worker); }, &run);
}

}  // namespace maskformer_fast
