// What follows the transposed convolution of EoMT's upscaling blocks, on the host: GELU, a depthwise 3x3 convolution with
// zeros around the map, and LayerNorm over the channels.
#pragma once

#include <cstdint>

namespace maskformer_fast {

// Maps [count, height, width, 2, 2, channels] become [count, 2 height, 2 width, channels].
struct Upscaling {
  int64_t count, height, width, channels;
  bool gelu;                // else the maps have been through GELU
  const float* weight;      // [9, channels], row by row of the 3x3 window
  const float* norm_weight; // [channels]
  const float* norm_bias;   // [channels]
  float epsilon;            // added to the variance
};

// Element is float, or uint16_t for bfloat16; sums are in float. Uses at most `threads` threads, the calling one
// included; the result does not depend on their number. Throws std::bad_alloc.
template <class Element>
void upscaling(const Upscaling& sizes, const Element* maps, Element* result, int threads);
extern template void upscaling(const Upscaling&, const float*, float*, int);
extern template void upscaling(const Upscaling&, const uint16_t*, uint16_t*, int);

// Gradient of the result -> those of the maps, and [9 + 2, channels] of weight, norm_weight and norm_bias. What lies
// between the maps and the result is computed again. Throws std::bad_alloc.
void upscaling_backward(const Upscaling& sizes, const float* gradient, const float* maps, float* by_maps,
                        float* by_weights, int threads);

}  // namespace maskformer_fast
