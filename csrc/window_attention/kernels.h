// Kernels of attention within windows, compiled once for each instruction set (common/cpu_isa.h).
#pragma once

#include <cstdint>

#include "common/cpu_isa.h"
#include "window_attention/window_attention.h"

namespace maskformer_fast {

constexpr int64_t kKeyPanel = 16;  // keys and channels are padded to multiples of it in scratch memory
constexpr int64_t kMaxRows = 7;    // most queries whose sums are in registers at a time

constexpr int64_t round_to_panels(int64_t size) { return (size + kKeyPanel - 1) / kKeyPanel * kKeyPanel; }

// Floats that the places of a window's tokens take, as int64_t.
inline int64_t place_floats(const WindowAttention& attention) {
  return round_to_panels(2 * attention.window * attention.window);
}

// Floats of scratch memory that a call of attend_windows needs: places, queries, keys (as they are and transposed) and
// values of a window, scores and sums of some queries.
inline int64_t scratch_floats(const WindowAttention& attention) {
  const int64_t tokens = attention.window * attention.window, channels = round_to_panels(attention.head_dim);
  return place_floats(attention) + (tokens + 3 * attention.key_stride) * channels +
         kMaxRows * (attention.key_stride + channels);
}

// The same for differentiate_windows: also values transposed, gradients of results and of scores; all scores and sums.
inline int64_t backward_scratch_floats(const WindowAttention& attention) {
  const int64_t tokens = attention.window * attention.window, channels = round_to_panels(attention.head_dim);
  return place_floats(attention) + (3 * tokens + 4 * attention.key_stride) * channels +
         2 * tokens * attention.key_stride;
}

MF_DECLARE_KERNELS(
    // Attends in windows first..last-1. Windows are numbered row by row and image by image.
    void attend_windows(const WindowAttention& attention, const float* qkv, const float* padding, float* result,
                        int64_t first, int64_t last, float* scratch);
    void attend_windows(const WindowAttention& attention, const uint16_t* qkv, const uint16_t* padding,
                        uint16_t* result, int64_t first, int64_t last, float* scratch);
    // Writes the gradient of a head's queries, keys and values in windows first..last-1 to by_qkv, and adds those of
    // padding tokens to by_padding [3, heads, head_dim] and of scores to by_bias [window * window, key_stride].
    void differentiate_windows(const WindowAttention& attention, const float* gradient, const float* qkv,
                               const float* padding, float* by_qkv, float* by_padding, float* by_bias, int64_t head,
                               int64_t first, int64_t last, float* scratch);
    void differentiate_windows(const WindowAttention& attention, const uint16_t* gradient, const uint16_t* qkv,
                               const uint16_t* padding, uint16_t* by_qkv, float* by_padding, float* by_bias,
                               int64_t head, int64_t first, int64_t last, float* scratch);)

}  // namespace maskformer_fast
