// Kernels of 3x3 convolution by Winograd's algorithm F(4x4, 3x3), compiled once for each instruction set
// (common/cpu_isa.h). A call works on a block of output tiles.
#pragma once

#include <cstdint>

#include "common/cpu_isa.h"
#include "convolution/convolution.h"

namespace maskformer_fast {

constexpr int kOutputTile = 4;   // output pixels along a side of a tile
constexpr int kChunkPanels = 4;  // panels of weights whose products are in memory at a time

// Floats from a tap to the next in scratch memory, for so many numbers of a tap. A multiple of the page's size would put
// all taps of a number into the same few lines of the cache.
constexpr int64_t tap_step(int64_t numbers) { return (numbers / kPanel + 1 | 1) * kPanel; }

struct WinogradScratch {
  float* inputs;    // [kTaps, tiles, in_channels], taps tap_step apart
  float* products;  // [kTaps, tiles, kChunkPanels * kPanel], taps tap_step apart
};

MF_DECLARE_KERNELS(
    // Convolves tiles first..last-1. Tiles are numbered row by row and image by image.
    void convolve_tiles(const WinogradConvolution& conv, const float* images, float* result, int64_t first,
                        int64_t last, const WinogradScratch& scratch);
    void convolve_tiles(const WinogradConvolution& conv, const uint16_t* images, uint16_t* result, int64_t first,
                        int64_t last, const WinogradScratch& scratch);
    // Transforms tile tiles.first + tile, to the place of number `tile` in the result.
    void transform_image_tile(const WinogradTiles& tiles, const float* images, int64_t tile, float* result);
    void transform_gradient_tile(const WinogradTiles& tiles, const float* gradient, int64_t tile, float* result);)

}  // namespace maskformer_fast
