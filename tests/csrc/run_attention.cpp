#include <cmath>

#include "attention/attention.h"
#include "run_operators.h"

namespace maskformer_fast {
namespace {

// tests/ops/test_attention.py checks the results.
template <class Element>
void run(Random& random, int threads) {
  Attention sizes{};
  sizes.images = random.integer(0, 2), sizes.queries = random.integer(0, 70), sizes.keys = random.integer(1, 300);
  sizes.heads = random.integer(1, 3), sizes.head_dim = random.integer(1, 70);
  sizes.masked_queries = random.integer(0, sizes.queries), sizes.masked_keys = random.integer(0, sizes.keys);
  const int64_t channels = sizes.heads * sizes.head_dim;
  const auto strides = [&](int64_t tokens) { return TokenStrides{tokens * channels, channels, sizes.head_dim}; };
  sizes.query_strides = strides(sizes.queries), sizes.key_strides = sizes.value_strides = strides(sizes.keys);
  std::vector<uint8_t> visible(sizes.images * sizes.masked_queries * sizes.masked_keys);
  for (uint8_t& one : visible) one = random.chance(0.5);
  sizes.visible = visible.data();
  const int64_t queries = sizes.images * sizes.queries * channels, keys = sizes.images * sizes.keys * channels;
  std::vector<Element> query(queries), key(keys), value(keys), result(queries);
  for (std::vector<Element>* tokens : {&query, &key, &value}) {
    for (Element& one : *tokens) one = static_cast<Element>(random.integer(0, 3));  // tiny numbers as bfloat16 bits
  }
  std::vector<float> statistics(sizes.images * sizes.heads * sizes.queries * kStatistics);
  attention(sizes, query.data(), key.data(), value.data(), result.data(), statistics.data(), threads);
  for (const Element one : result) MF_EXPECT(std::isfinite(static_cast<float>(one)));
  if constexpr (sizeof(Element) == sizeof(float)) {
    const std::vector<float> upstream = random.values<float>(queries, -1, 1);
    std::vector<float> by_query(queries), by_key(keys), by_value(keys);
    attention_backward(sizes, query.data(), key.data(), value.data(), result.data(), statistics.data(),
                       upstream.data(), {by_query.data(), by_key.data(), by_value.data()}, threads);
    for (const float one : by_key) MF_EXPECT(std::isfinite(one));
  }
}

}  // namespace

void run_attention(Random& random, int threads) {
  random.chance(0.5) ? run<float>(random, threads) : run<uint16_t>(random, threads);
}

}  // namespace maskformer_fast
