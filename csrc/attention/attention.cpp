// Keys and values of each image and head are packed first; then a task is a block of queries of one image and head.
#include "attention/attention.h"

#include <algorithm>
#include <type_traits>

#include "attention/kernels.h"
#include "common/aligned.h"
#include "common/cpu_isa.h"
#include "common/threads.h"

namespace maskformer_fast {
template <class Element>
void attention(const Attention& attention, const Element* query, const Element* key, const Element* value,
               Element* result, float* statistics, int threads) {
  const int64_t pairs = attention.images * attention.heads;
  if (pairs == 0 || attention.queries == 0) return;
  constexpr bool is_half = std::is_same<Element, uint16_t>::value;
  const Isa isa = current_isa();
  const int64_t query_block = is_half && isa == Isa::avx512_amx ? kTileQueries : kQueryBlock;
  const int64_t floats = packed_floats(attention), scratch = scratch_floats(attention);
  const AlignedFloats packed = aligned_floats(2 * pairs * floats);
  const int64_t blocks = (attention.queries + query_block - 1) / query_block;
  const AlignedFloats own = aligned_floats(std::min<int64_t>(threads, pairs * blocks) * scratch);
  parallel_for(pairs, threads, [&](int, int64_t pair) {
    float* keys = packed.get() + 2 * pair * floats;
    const int64_t image = pair / attention.heads, head = pair % attention.heads;
#if defined(__x86_64__)
    if constexpr (is_half) {
      if (isa >= Isa::avx512_bf16) {
        const auto pack = isa == Isa::avx512_amx ? avx512_amx::pack_head : avx512_bf16::pack_head;
        return pack(attention, key, value, image, head, keys, keys + floats);
      }
    }
#endif
    MF_DISPATCH(pack_head, attention, key, value, image, head, keys, keys + floats);
  });
  parallel_for(pairs * blocks, threads, [&](int worker, int64_t task) {
    const int64_t pair = task / blocks, block = task % blocks;
    const int64_t first = block * query_block, last = std::min(first + query_block, attention.queries);
    const float* keys = packed.get() + 2 * pair * floats;
    float* room = own.get() + worker * scratch;
    const int64_t image = pair / attention.heads, head = pair % attention.heads;
#if defined(__x86_64__)
    if constexpr (is_half) {
      if (isa >= Isa::avx512_bf16) {
        const auto attend = isa == Isa::avx512_amx ? avx512_amx::attend_block : avx512_bf16::attend_block;
        return attend(attention, query, keys, keys + floats, image, head, first, last, result, statistics, room);
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
  const AlignedFloats scratch = aligned_floats(std::min<int64_t>(threads, pairs) * floats);
  parallel_for(pairs, threads, [&](int worker, int64_t pair) {
    MF_DISPATCH(differentiate_head, attention, query, key, value, result, statistics, upstream, pair / attention.heads,
                pair % attention.heads, gradients, scratch.get() + worker * floats);
  });
}

}  // namespace maskformer_fast
