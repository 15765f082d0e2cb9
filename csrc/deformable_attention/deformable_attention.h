// Multi-scale deformable attention of Deformable DETR, and its gradient, on the host.
#pragma once

#include <cstdint>

namespace maskformer_fast {

// A point of a level of h x w cells is at column reference_x * w - 0.5 + offset_x and row reference_y * h - 0.5 +
// offset_y, in cells; cell (0, 0) has its centre at (0, 0). Cells outside the level are zeros.
struct DeformableAttention {
  int64_t count, cells, heads, dim;  // images; cells of all levels; channels of a head
  int64_t queries, levels, points;
  const int64_t* level_sizes;     // [levels, 2] height and width; the sum of their products is `cells`
  const float* reference_points;  // [count, queries, levels, 2] x, y in 0..1
};

// Attends: value [count, cells, heads, dim], offsets [count, queries, heads, levels, points, 2] and logits [count,
// queries, heads, levels, points] to result [count, queries, heads, dim]. The weights of the points are the softmax of
// the logits over levels and points. A location that is not finite reads nothing. Logits that are NaN, +inf or all -inf
// give NaN. Element is float, or uint16_t for bfloat16; sums are in float. Uses at most `threads` threads, the calling
// one included; the result does not depend on their number. Throws std::bad_alloc.
template <class Element>
void deformable_attention(const DeformableAttention& attention, const Element* value, const Element* offsets,
                          const Element* logits, Element* result, int threads);
extern template void deformable_attention(const DeformableAttention&, const float*, const float*, const float*, float*,
                                          int);
extern template void deformable_attention(const DeformableAttention&, const uint16_t*, const uint16_t*,
                                          const uint16_t*, uint16_t*, int);

// Gradients by the inputs, in their shapes. A thread works on all queries of one image and head, in their order, so
// that the result does not depend on the number of threads here either. It keeps the head's value and its gradient,
// `cells` x `dim` floats each.
template <class Element>
struct DeformableGradients {
  Element* by_value;
  Element* by_offset;
  Element* by_logit;
};

// upstream: gradient by the result, [count, queries, heads, dim].
template <class Element>
void deformable_attention_backward(const DeformableAttention& attention, const Element* upstream, const Element* value,
                                   const Element* offsets, const Element* logits,
                                   const DeformableGradients<Element>& gradients, int threads);
extern template void deformable_attention_backward(const DeformableAttention&, const float*, const float*, const float*,
                                                   const float*, const DeformableGradients<float>&, int);
extern template void deformable_attention_backward(const DeformableAttention&, const uint16_t*, const uint16_t*,
                                                   const uint16_t*, const uint16_t*,
                                                   const DeformableGradients<uint16_t>&, int);

}  // namespace maskformer_fast
