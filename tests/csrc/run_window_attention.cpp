#include <cmath>

#include "run_operators.h"
#include "window_attention/window_attention.h"

namespace maskformer_fast {
namespace {

// tests/ops/test_window_attention.py checks the results.
template <class Element>
void run(Random& random, int threads) {
  WindowAttention attention{};
  attention.count = random.integer(0, 2), attention.height = random.integer(1, 17), attention.width = random.integer(1, 17);
  attention.heads = random.integer(1, 3), attention.head_dim = random.integer(1, 40);
  attention.window = random.integer(1, 8), attention.shift = random.integer(0, attention.window - 1);
  const int64_t tokens = attention.window * attention.window, channels = attention.heads * attention.head_dim;
  attention.key_stride = (tokens + 15) / 16 * 16;
  const std::vector<float> bias = random.values<float>(attention.heads * tokens * attention.key_stride, -1, 1);
  attention.bias = bias.data();
  const int64_t pixels = attention.count * attention.height * attention.width;
  std::vector<Element> qkv(pixels * 3 * channels), padding(3 * channels), result(pixels * channels);
  for (Element& value : qkv) value = static_cast<Element>(random.integer(0, 3));  // tiny numbers as bfloat16 bits
  for (Element& value : padding) value = static_cast<Element>(random.integer(0, 3));
  window_attention(attention, qkv.data(), padding.data(), result.data(), threads);
  for (const Element value : result) MF_EXPECT(std::isfinite(static_cast<float>(value)));
  std::vector<Element> by_qkv(qkv.size());
  std::vector<float> by_padding(padding.size()), by_bias(bias.size());
  window_attention_backward(attention, result.data(), qkv.data(), padding.data(), by_qkv.data(), by_padding.data(),
                            by_bias.data(), threads);
  for (const Element value : by_qkv) MF_EXPECT(std::isfinite(static_cast<float>(value)));
  for (const float value : by_padding) MF_EXPECT(std::isfinite(value));
  for (const float value : by_bias) MF_EXPECT(std::isfinite(value));
}

}  // namespace

void run_window_attention(Random& random, int threads) {
  random.chance(0.5) ? run<float>(random, threads) : run<uint16_t>(random, threads);
}

}  // namespace maskformer_fast
