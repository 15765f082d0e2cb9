// 3x3 convolution of stride 1 and unchanged size (zeros around) on the host, by Winograd's algorithm F(4x4, 3x3).
#pragma once

#include <cstdint>

#include "convolution/kernels.h"

namespace maskformer_fast {

// Images and result are [count, height, width, channels]. At most `threads` threads, the calling one included; the same
// result for any number. Throws std::invalid_argument where in_channels is no multiple of kPanel, std::bad_alloc.
template <class Element>
void convolve_winograd(const WinogradConvolution& conv, const Element* images, int64_t count, Element* result,
                       int threads);
extern template void convolve_winograd(const WinogradConvolution&, const float*, int64_t, float*, int);
extern template void convolve_winograd(const WinogradConvolution&, const uint16_t*, int64_t, uint16_t*, int);

}  // namespace maskformer_fast
