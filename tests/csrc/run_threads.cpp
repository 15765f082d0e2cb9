#include "common/threads.h"

#include <numeric>

#include "run_operators.h"

namespace maskformer_fast {

// Tasks and workers write to plain memory that the caller reads, so that a sanitizer reports races.
void run_threads(Random& random, int threads) {
  const int64_t tasks = random.one_of<int64_t>({0, 1, 2, 3, 40, 500});
  const bool nested = random.chance(0.2);
  std::vector<int> calls(tasks), nested_calls(tasks);
  std::vector<int64_t> done(threads);
  parallel_for(tasks, threads, [&](int worker, int64_t task) {
    ++calls[task];
    ++done[worker];
    if (nested && task < 3) {
      std::vector<int> inner(7);
      parallel_for(7, threads, [&](int, int64_t k) { ++inner[k]; });
      nested_calls[task] = std::accumulate(inner.begin(), inner.end(), 0);
    }
  });
  for (int64_t task = 0; task < tasks; ++task) {
    MF_EXPECT(calls[task] == 1);
    MF_EXPECT(nested_calls[task] == (nested && task < 3 ? 7 : 0));
  }
  MF_EXPECT(std::accumulate(done.begin(), done.end(), int64_t{0}) == tasks);
}

}  // namespace maskformer_fast
