#include <cmath>

#include "convolution/convolution.h"
#include "run_operators.h"

namespace maskformer_fast {
namespace {

float widen(float x) { return x; }
float widen(uint16_t x) {
  const uint32_t bits = static_cast<uint32_t>(x) << 16;
  float value;
  __builtin_memcpy(&value, &bits, sizeof value);
  return value;
}

// The weights are random; tests/ops/test_convolution.py checks the transformed weights and the results.
template <class Element>
void run(Random& random, int threads) {
  const int64_t count = random.integer(0, 2);
  WinogradConvolution conv{};
  conv.height = random.integer(1, 21), conv.width = random.integer(1, 21);
  conv.in_channels = kPanel * random.integer(1, 3), conv.out_channels = random.integer(1, 90);
  conv.relu = random.chance(0.5);
  const int64_t panels = (conv.out_channels + kPanel - 1) / kPanel, pixels = count * conv.height * conv.width;
  std::vector<Element> images(pixels * conv.in_channels), result(pixels * conv.out_channels);
  for (Element& value : images) value = static_cast<Element>(random.integer(0, 3));  // tiny numbers as bfloat16 bits
  const std::vector<float> weights = random.values<float>(kTaps * panels * conv.in_channels * kPanel, -1, 1);
  const std::vector<float> bias = random.values<float>(conv.out_channels, -1, 1);
  conv.weights = weights.data();
  conv.bias = random.chance(0.5) ? bias.data() : nullptr;
  conv3x3_winograd(conv, images.data(), count, result.data(), threads);
  for (const Element value : result) MF_EXPECT(std::isfinite(widen(value)) && (!conv.relu || widen(value) >= 0));
}

void run_tiles(Random& random, int threads) {
  const int64_t count = random.integer(1, 2), height = random.integer(1, 21), width = random.integer(1, 21);
  const int64_t channels = kPanel * random.integer(1, 3);
  const int64_t all = count * ((height + 3) / 4) * ((width + 3) / 4);
  const int64_t first = random.integer(0, all), last = random.integer(first, all);
  const WinogradTiles tiles{height, width, channels, first, last, (last - first) * channels + random.integer(0, 16)};
  const std::vector<float> maps = random.values<float>(count * height * width * channels, -1, 1);
  std::vector<float> result(kTaps * tiles.step);
  const auto transform = random.chance(0.5) ? winograd_gradient_tiles : winograd_image_tiles;
  transform(tiles, maps.data(), result.data(), threads);
  for (const float value : result) MF_EXPECT(std::isfinite(value));
}

}  // namespace

void run_convolution(Random& random, int threads) {
  random.chance(0.5) ? run<float>(random, threads) : run<uint16_t>(random, threads);
  run_tiles(random, threads);
}

}  // namespace maskformer_fast
