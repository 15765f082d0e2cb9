// Checks and random inputs of the operators' test runs. A run calls one operator on random input of a random shape,
// extreme shapes and values included. Buffers have exactly the size that the operator requires, so that a sanitizer
// reports any access outside.
#pragma once

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <initializer_list>
#include <limits>
#include <random>
#include <vector>

#define MF_EXPECT(CONDITION)                                                         \
  do {                                                                               \
    if (!(CONDITION)) {                                                              \
      std::fprintf(stderr, "%s:%d: expected %s\n", __FILE__, __LINE__, #CONDITION);  \
      std::abort();                                                                  \
    }                                                                                \
  } while (false)

namespace maskformer_fast {

class Random {
 public:
  explicit Random(uint32_t seed) : engine_(seed) {}

  int64_t integer(int64_t low, int64_t high) { return std::uniform_int_distribution<int64_t>(low, high)(engine_); }
  double uniform(double low, double high) { return std::uniform_real_distribution<double>(low, high)(engine_); }
  bool chance(double probability) { return uniform(0, 1) < probability; }
  template <class T>
  T one_of(std::initializer_list<T> choices) {
    return choices.begin()[integer(0, static_cast<int64_t>(choices.size()) - 1)];
  }

  // Returns values in low..high; with `extreme`, some are NaN, infinite, huge, tiny or zero.
  template <class T>
  std::vector<T> values(int64_t count, double low, double high, bool extreme = false) {
    std::vector<T> result(count);
    for (T& value : result) {
      value = static_cast<T>(uniform(low, high));
      if (extreme && chance(0.1)) {
        const double infinity = std::numeric_limits<double>::infinity();
        value = static_cast<T>(
            one_of({infinity, -infinity, std::numeric_limits<double>::quiet_NaN(), 1e38, -1e38, 1e-40, 0.0, -0.0}));
      }
    }
    return result;
  }

 private:
  std::mt19937 engine_;
};

// One run of each operator, listed in run_operators.cpp.
void run_assignment(Random& random, int threads);
void run_assignment_teams(Random& random, int threads);
void run_attention(Random& random, int threads);
void run_convolution(Random& random, int threads);
void run_deformable_attention(Random& random, int threads);
void run_mask_loss(Random& random, int threads);
void run_matching_cost(Random& random, int threads);
void run_nearest_masks(Random& random, int threads);
void run_points(Random& random, int threads);
void run_resized_argmax(Random& random, int threads);
void run_resized_semantic(Random& random, int threads);
void run_rle(Random& random, int threads);
void run_segments(Random& random, int threads);
void run_semantic(Random& random, int threads);
void run_threads(Random& random, int threads);
void run_upscaling(Random& random, int threads);
void run_window_attention(Random& random, int threads);

}  // namespace maskformer_fast
