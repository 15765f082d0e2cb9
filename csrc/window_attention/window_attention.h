// Attention within the windows of Swin Transformer on the host.
#pragma once

#include <cstdint>

namespace maskformer_fast {

constexpr float kSeam = -100.0f;  // added to the score of tokens from opposite sides of the image

// Windows of `window` x `window` tokens cover the map, shifted by `shift` tokens to the right and below, cyclically. The
// map is padded to complete windows at the right and below first; all padding tokens have the same query, key and value.
struct WindowAttention {
  int64_t count, height, width;
  int64_t heads, head_dim;
  int64_t window, shift;  // 0 <= shift < window
  const float* bias;      // [heads, window * window, key_stride] added to the scores of a pair (query, key)
  int64_t key_stride;     // window * window, rounded up to a multiple of 16; the bias of the keys beyond is -1e30
};

// Attends: qkv [count, height, width, 3, heads, head_dim] to result [count, height, width, heads, head_dim]. `padding`
// [3, heads, head_dim] is the query, key and value of padding tokens, which is used only where there are some. Element
// is float, or uint16_t for bfloat16; sums are in float. Uses at most `threads` threads, the calling one included; the
// result does not depend on their number. Throws std::bad_alloc.
template <class Element>
void window_attention(const WindowAttention& attention, const Element* qkv, const Element* padding, Element* result,
                      int threads);
extern template void window_attention(const WindowAttention&, const float*, const float*, float*, int);
extern template void window_attention(const WindowAttention&, const uint16_t*, const uint16_t*, uint16_t*, int);

// Differentiates: gradient of the result -> by_qkv of the shape of qkv, by_padding [3, heads, head_dim] and by_bias of
// the shape of the bias, the latter two in float. What else is as above.
template <class Element>
void window_attention_backward(const WindowAttention& attention, const Element* gradient, const Element* qkv,
                               const Element* padding, Element* by_qkv, float* by_padding, float* by_bias, int threads);
extern template void window_attention_backward(const WindowAttention&, const float*, const float*, const float*, float*,
                                               float*, float*, int);
extern template void window_attention_backward(const WindowAttention&, const uint16_t*, const uint16_t*,
                                               const uint16_t*, uint16_t*, float*, float*, int);

}  // namespace maskformer_fast
