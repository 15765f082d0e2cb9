// Kernels of attention, compiled once for each instruction set (common/cpu_isa.h), and for AVX-512 with products of
// bfloat16 once more by its own instruction (avx512_bf16) and by AMX (avx512_amx).
#pragma once

#include <cstdint>

#include "attention/attention.h"
#include "common/cpu_isa.h"

namespace maskformer_fast {

constexpr int64_t kKeyPanel = 64;      // keys whose channels lie side by side in memory
constexpr int64_t kKeyBlock = 256;     // keys whose scores are in memory at a time
constexpr int64_t kQueryBlock = 56;    // queries of a task
constexpr int64_t kTileQueries = 64;   // queries of a task by AMX
constexpr int64_t kChannelPanel = 16;  // channels are padded to multiples of it
constexpr int64_t kTileChannels = 32;  // the same by AMX

constexpr int64_t round_up(int64_t size, int64_t multiple) { return (size + multiple - 1) / multiple * multiple; }

// Floats that the packed keys, and values, of an image and head take. In bfloat16 they fill the half, or by AMX up to
// all of it.
inline int64_t packed_floats(const Attention& attention) {
  return round_up(attention.keys, kKeyPanel) * round_up(attention.head_dim, kChannelPanel);
}

// Floats of scratch memory of a call of attend_block: queries, sums, scores, and weights in bfloat16.
inline int64_t scratch_floats(const Attention& attention) {
  const int64_t channels = round_up(attention.head_dim, kTileChannels);
  return kTileQueries * (2 * channels + kKeyBlock + kKeyBlock / 2);
}

// Floats of scratch memory of a call of differentiate_head.
inline int64_t backward_floats(const Attention& attention) {
  const int64_t channels = round_up(attention.head_dim, kChannelPanel);
  return 5 * packed_floats(attention) + kQueryBlock * (3 * channels + 2 * kKeyBlock);
}

#define MF_ATTENTION_KERNELS(ELEMENT)                                                                               \
  /* Copies the keys and values of an image and head into the layouts that attend_block reads. */                   \
  void pack_head(const Attention& attention, const ELEMENT* key, const ELEMENT* value, int64_t image, int64_t head, \
                 float* keys, float* values);                                                                       \
  /* Attends from the queries first..last-1 of an image and head, at most kQueryBlock, by AMX kTileQueries. */       \
  void attend_block(const Attention& attention, const ELEMENT* query, const float* keys, const float* values,       \
                    int64_t image, int64_t head, int64_t first, int64_t last, ELEMENT* result, float* statistics,   \
                    float* scratch);

MF_DECLARE_KERNELS(
    MF_ATTENTION_KERNELS(float) MF_ATTENTION_KERNELS(uint16_t)
    // Gradients of one image and head.
    void differentiate_head(const Attention& attention, const float* query, const float* key, const float* value,
                            const float* result, const float* statistics, const float* upstream, int64_t image,
                            int64_t head, const AttentionGradients& gradients, float* scratch);)

namespace avx512_bf16 {
MF_ATTENTION_KERNELS(uint16_t)
}
namespace avx512_amx {
MF_ATTENTION_KERNELS(uint16_t)
}

}  // namespace maskformer_fast
