// 3x3 convolution of stride 1 and unchanged size (zeros around) on the host, by Winograd's algorithm F(4x4, 3x3).
#pragma once

#include <cstdint>

namespace maskformer_fast {

constexpr int kTaps = 36;   // products of a tile of 4 x 4 pixels and a pair of channels
constexpr int kPanel = 16;  // output channels that are adjacent in the packed weights

struct WinogradConvolution {
  int64_t height, width;
  int64_t in_channels;  // a multiple of kPanel
  int64_t out_channels;
  const float* weights;  // [kTaps, ceil(out_channels / kPanel), in_channels, kPanel], transformed
  const float* bias;     // [out_channels], nullptr for none
  bool relu;
};

// Convolves images [count, height, width, in_channels] to result [count, height, width, out_channels]. Element is
// float, or uint16_t for bfloat16. Uses at most `threads` threads, the calling one included; the result does not depend
// on their number. Throws std::invalid_argument where in_channels is no multiple of kPanel, std::bad_alloc.
template <class Element>
void conv3x3_winograd(const WinogradConvolution& conv, const Element* images, int64_t count, Element* result,
                      int threads);
extern template void conv3x3_winograd(const WinogradConvolution&, const float*, int64_t, float*, int);
extern template void conv3x3_winograd(const WinogradConvolution&, const uint16_t*, int64_t, uint16_t*, int);

// Tiles of maps, for the gradient of the weights. Tiles of 4x4 pixels are numbered row by row and image by image.
struct WinogradTiles {
  int64_t height, width;
  int64_t channels;     // a multiple of kPanel
  int64_t first, last;  // tiles first..last-1
  int64_t step;         // floats from a tap to the next in the result, at least (last - first) * channels
};

// Transform tiles of maps [., height, width, channels] to result [kTaps, last - first, channels], taps `step` apart: of
// images as the convolution does; of the gradient of its result by the transpose of what the convolution does with
// products. The weights' gradient, transformed, is for each tap the product of both, summed over tiles. Use at most
// `threads` threads. Throw std::invalid_argument for other channels.
void winograd_image_tiles(const WinogradTiles& tiles, const float* images, float* result, int threads);
void winograd_gradient_tiles(const WinogradTiles& tiles, const float* gradient, float* result, int threads);

}  // namespace maskformer_fast
