#include <type_traits>

#include "deformable_attention/deformable_attention.h"
#include "run_operators.h"

namespace maskformer_fast {
namespace {

// tests/ops/test_deformable_attention.py checks the results. Locations may be anywhere, NaN and infinity included.
template <class Element>
void run(Random& random, int threads) {
  DeformableAttention attention{};
  attention.count = random.integer(0, 2), attention.heads = random.integer(1, 3), attention.dim = random.integer(1, 40);
  attention.queries = random.integer(0, 9), attention.levels = random.integer(1, 4);
  attention.points = random.integer(1, 6);
  std::vector<int64_t> level_sizes(2 * attention.levels);
  for (int64_t& side : level_sizes) side = random.integer(1, 6);
  for (int64_t level = 0; level < attention.levels; ++level) {
    attention.cells += level_sizes[2 * level] * level_sizes[2 * level + 1];
  }
  attention.level_sizes = level_sizes.data();
  const int64_t queries = attention.count * attention.queries;
  const int64_t samples = queries * attention.heads * attention.levels * attention.points;
  const std::vector<float> points = random.values<float>(queries * attention.levels * 2, -0.2, 1.2, true);
  attention.reference_points = points.data();
  const auto elements = [&](int64_t count) {
    std::vector<Element> result(count);
    const bool extreme = random.chance(0.3);
    const std::vector<float> values = random.values<float>(count, -3, 3, extreme);
    for (int64_t i = 0; i < count; ++i) {
      if constexpr (std::is_same_v<Element, float>) {
        result[i] = values[i];
      } else {
        result[i] = static_cast<Element>(random.integer(0, extreme ? 0xffff : 0x4100));  // any bfloat16, or 0 to 8
      }
    }
    return result;
  };
  const int64_t value_size = attention.count * attention.cells * attention.heads * attention.dim;
  const int64_t result_size = queries * attention.heads * attention.dim;
  const std::vector<Element> value = elements(value_size), offsets = elements(2 * samples), logits = elements(samples);
  std::vector<Element> result(result_size);
  deformable_attention(attention, value.data(), offsets.data(), logits.data(), result.data(), threads);

  const std::vector<Element> upstream = elements(result_size);
  std::vector<Element> by_value(value_size), by_offset(2 * samples), by_logit(samples);
  deformable_attention_backward(attention, upstream.data(), value.data(), offsets.data(), logits.data(),
                                DeformableGradients<Element>{by_value.data(), by_offset.data(), by_logit.data()},
                                threads);
}

}  // namespace

void run_deformable_attention(Random& random, int threads) {
  random.chance(0.5) ? run<float>(random, threads) : run<uint16_t>(random, threads);
}

}  // namespace maskformer_fast
