// Kernels of the upscaling, compiled once for each instruction set (common/cpu_isa.h).
#pragma once

#include <cstdint>

#include "common/cpu_isa.h"
#include "upscaling/upscaling.h"

namespace maskformer_fast {

constexpr int kTaps = 9;
constexpr int64_t kWeightRows = kTaps + 2;   // with the norm's weight and bias
constexpr int64_t kChannelBlock = 16;        // channels of a pixel in scratch memory are padded to a multiple of it
constexpr int64_t kRing = 3;                 // rows of the map that the convolution of a row needs

// Channels of a pixel in scratch memory.
inline int64_t padded_channels(const Upscaling& sizes) {
  return (sizes.channels + kChannelBlock - 1) / kChannelBlock * kChannelBlock;
}

// Floats of scratch memory: rows of the map with a column of zeros on both sides, weights, and a row of results.
inline int64_t scratch_floats(const Upscaling& sizes) {
  const int64_t padded = padded_channels(sizes);
  return (kRing * (2 * sizes.width + 2) + kWeightRows + 2 * sizes.width) * padded;
}

// The same for the backward pass: also rows of the gradient by the convolution, and sums of the weights' gradients.
inline int64_t backward_scratch_floats(const Upscaling& sizes) {
  const int64_t padded = padded_channels(sizes);
  return (2 * kRing * (2 * sizes.width + 2) + 2 * kWeightRows + 2 * sizes.width) * padded;
}

MF_DECLARE_KERNELS(
    // Computes rows first..last-1 of the result of an image.
    void upscale_rows(const Upscaling& sizes, const float* maps, float* result, int64_t image, int64_t first,
                      int64_t last, float* scratch);
    void upscale_rows(const Upscaling& sizes, const uint16_t* maps, uint16_t* result, int64_t image, int64_t first,
                      int64_t last, float* scratch);
    // Computes the gradients of the maps behind rows first..last-1 of the result, and those of the weights [kWeightRows,
    // channels] by these rows.
    void differentiate_rows(const Upscaling& sizes, const float* gradient, const float* maps, float* by_maps,
                            float* by_weights, int64_t image, int64_t first, int64_t last, float* scratch);)

}  // namespace maskformer_fast
