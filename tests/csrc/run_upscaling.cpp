#include "upscaling/upscaling.h"

#include <cmath>

#include "run_operators.h"

namespace maskformer_fast {
namespace {

// tests/ops/test_upscaling.py checks the results.
template <class Element>
void run(Random& random, int threads) {
  Upscaling sizes{};
  sizes.count = random.integer(0, 2), sizes.height = random.integer(0, 20), sizes.width = random.integer(0, 9);
  sizes.channels = random.integer(1, 40), sizes.gelu = random.chance(0.5), sizes.epsilon = 1e-6f;
  const std::vector<float> weight = random.values<float>(9 * sizes.channels, -1, 1);
  const std::vector<float> norm_weight = random.values<float>(sizes.channels, -1, 1);
  const std::vector<float> norm_bias = random.values<float>(sizes.channels, -1, 1);
  sizes.weight = weight.data(), sizes.norm_weight = norm_weight.data(), sizes.norm_bias = norm_bias.data();
  const int64_t size = sizes.count * sizes.height * sizes.width * 4 * sizes.channels;
  std::vector<Element> maps(size), result(size);
  for (Element& one : maps) one = static_cast<Element>(random.integer(0, 3));  // tiny numbers as bfloat16 bits
  upscaling(sizes, maps.data(), result.data(), threads);
  for (const Element one : result) MF_EXPECT(std::isfinite(static_cast<float>(one)));
  if constexpr (sizeof(Element) == sizeof(float)) {
    const std::vector<float> gradient = random.values<float>(size, -1, 1);
    std::vector<float> by_maps(size), by_weights(11 * sizes.channels);
    upscaling_backward(sizes, gradient.data(), maps.data(), by_maps.data(), by_weights.data(), threads);
    for (const float one : by_maps) MF_EXPECT(std::isfinite(one));
    for (const float one : by_weights) MF_EXPECT(std::isfinite(one));
  }
}

}  // namespace

void run_upscaling(Random& random, int threads) {
  random.chance(0.5) ? run<float>(random, threads) : run<uint16_t>(random, threads);
}

}  // namespace maskformer_fast
