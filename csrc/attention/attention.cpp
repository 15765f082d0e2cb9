// Keys and values of each image and head are packed first; then a task is a block of queries of one image and head.
#include "attention/attention.h"

#include <algorithm>
#include <memory>
#include <type_traits>

#include "attention/kernels.h"
#include "common/cpu_isa.h"
#include "common/threads.h"

namespace maskformer_fast {
namespace {

bool multiplies_bfloat16() {
#if defined(__x86_64__)
  static const bool supported = __builtin_cpu_supports("avx512bf16");
  return supported && current_isa() == Isa::avx512;
#else
  return false;
#endif
}

}  // namespace

template <class Element>
void attention(const Attention& attention, const Element* query, const Element* key, const Element* value,
               Element* result, float* statistics, int threads) {
  const int64_t pairs = attention.images * attention.heads;
  if (pairs == 0 || attention.queries == 0) return;
  [[maybe_unused]] const bool halves = std::is_same<Element, uint16_t>::value && multiplies_bfloat16();
  const int64_t floats = packed_floats(attention), scratch = scratch_floats(attention);
  const std::unique_ptr<float[]> packed(new float[2 * pairs * floats]);
  const int64_t blocks = (attention.queries + kQueryBlock - 1) / kQueryBlock;
  const std::unique_ptr<float[]> own(new float[std::min<int64_t>(threads, pairs * blocks) * scratch]);
  parallel_for(pairs, threads, [&](int, int64_t pair) {
    float* keys = packed.get() + 2 * pair * floats;
    const int64_t image = pair / attention.heads, head = pair % attention.heads;
#if defined(__x86_64__)
    if constexpr (std::is_same<Element, uint16_t>::value) {
      if (halves) return avx512_bf16::pack_head(attention, key, value, image, head, keys, keys + floats);
    }
#endif
    MF_DISPATCH(pack_head, attention, key, value, image, head, keys, keys + floats);
  });
  parallel_for(pairs * blocks, threads, [&](int worker, int64_t task) {
    const int64_t pair = task / blocks, block = task % blocks;
    const int64_t first = block * kQueryBlock, last = std::min(first + kQueryBlock, attention.queries);
    const float* keys = packed.get() + 2 * pair * floats;
    float* room = own.get() + worker * scratch;
    const int64_t image = pair / attention.heads, head = pair % attention.heads;
#if defined(__x86_64__)
    if constexpr (std::is_same<Element, uint16_t>::value) {
      if (halves) {
        return avx512_bf16::attend_block(attention, query, keys, keys + floats, image, head, first, last, result,
                                         statistics, room);
      }
    }
#endif
    MF_DISPATCH(attend_block, attention, query, keys, keys + floats, image, head, first, last, result, statistics,
                room);
  });
}

template void attention(const Attention&, const float*, const float*, const float*, float*, float*, int);
template void attention(const Attention&, const uint16_t*, const uint16_t*, const uint16_t*, uint16_t*, float*, int);

void attention_backward(const Attention& attention, const float* query, const float* key, const float* value,
                        const float* result, const float* statistics, const float* upstream,
                        const AttentionGradients& gradients, int threads) {
  const int64_t pairs = attention.images * attention.heads;
  if (pairs == 0) return;
  const int64_t floats = backward_floats(attention);
  const std::unique_ptr<float[]> scratch(new float[std::min<int64_t>(threads, pairs) * floats]);
  parallel_for(pairs, threads, [&](int worker, int64_t pair) {
    MF_DISPATCH(differentiate_head, attention, query, key, value, result, statistics, upstream, pair / attention.heads,
                pair % attention.heads, gradients, scratch.get() + worker * floats);
  });
}

}  // namespace maskformer_fast
