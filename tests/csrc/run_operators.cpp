// Runs every operator on every instruction set of this processor, on one thread and on several, and from several
// threads at once. tests/csrc/test_sanitizers.py builds it with sanitizers, which report errors; the runs check little
// themselves.
//
//   run_operators [SEED]             runs all operators
//   run_operators --plant MISTAKE    makes a mistake that a sanitizer must report: out-of-bounds, overflow or race
#include "run_operators.h"

#include <climits>
#include <cstring>
#include <memory>
#include <string>
#include <thread>

#include "common/cpu_isa.h"

namespace maskformer_fast {
namespace {

struct Operator {
  const char* name;
  void (*run)(Random& random, int threads);
};

constexpr Operator kOperators[] = {
    {"threads", run_threads},
    {"assignment", run_assignment},
    {"assignment teams", run_assignment_teams},
    {"attention", run_attention},
    {"convolution", run_convolution},
    {"deformable_attention", run_deformable_attention},
    {"matching_cost", run_matching_cost},
    {"nearest_masks", run_nearest_masks},
    {"points", run_points},
    {"mask_loss", run_mask_loss},
    {"resized_argmax", run_resized_argmax},
    {"resized_semantic", run_resized_semantic},
    {"rle", run_rle},
    {"segments", run_segments},
    {"semantic", run_semantic},
    {"upscaling", run_upscaling},
    {"window_attention", run_window_attention},
};
constexpr int kRuns = 40;  // runs for each operator, instruction set and number of threads

void run_one_by_one(uint32_t seed) {
  for (const std::string& isa : available_isas()) {
    use_isa(isa);
    for (const Operator& op : kOperators) {
      // Only attention is compiled for products in bfloat16.
      if (current_isa() > Isa::avx512 && op.run != run_attention) continue;
      for (const int threads : {1, 2, 5}) {
        Random random(seed);
        for (int k = 0; k < kRuns; ++k) op.run(random, threads);
      }
      std::printf("%s on %s: done\n", op.name, isa.c_str());
    }
  }
  use_isa("auto");
}

void run_concurrently(uint32_t seed) {
  std::vector<std::thread> callers;
  for (uint32_t caller = 0; caller < 3; ++caller) {
    callers.emplace_back([seed, caller] {
      Random random(seed + caller);
      for (int k = 0; k < kRuns; ++k) {
        for (const Operator& op : kOperators) op.run(random, 3);
      }
    });
  }
  for (std::thread& caller : callers) caller.join();
  std::printf("concurrent callers: done\n");
}

int plant_mistake(const std::string& mistake) {
  volatile int result = 0;
  if (mistake == "out-of-bounds") {
    const std::unique_ptr<int[]> numbers(new int[4]());
    volatile int place = 4;
    result = numbers[place];
  } else if (mistake == "overflow") {
    volatile int large = INT_MAX;
    result = large + 1;
  } else if (mistake == "race") {
    int shared = 0;
    std::thread other([&] { ++shared; });
    ++shared;
    other.join();
    result = shared;
  } else {
    std::fprintf(stderr, "plant: expected out-of-bounds, overflow or race, got %s\n", mistake.c_str());
    return 2;
  }
  std::printf("no sanitizer reported the %s (%d)\n", mistake.c_str(), result);
  return 0;
}

}  // namespace
}  // namespace maskformer_fast

int main(int argc, char** argv) {
  if (argc == 3 && std::strcmp(argv[1], "--plant") == 0) return maskformer_fast::plant_mistake(argv[2]);
  const uint32_t seed = argc > 1 ? std::strtoul(argv[1], nullptr, 10) : 0;
  maskformer_fast::run_one_by_one(seed);
  maskformer_fast::run_concurrently(seed);
  return 0;
}
