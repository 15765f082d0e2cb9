// The inner loops of 3x3 convolution by Winograd's algorithm F(4x4, 3x3), compiled once for each instruction set
// (cpu_isa.h): a block of output tiles at a time.
#pragma once

#include <cstdint>

namespace maskformer_fast {

constexpr int kOutputTile = 4;   // pixels of a side that one tile computes
constexpr int kTaps = 36;        // products a tile and pair of channels, for 4 x 4 pixels of 9 taps each
constexpr int kPanel = 16;       // output channels that lie together in the packed weights
constexpr int kChunkPanels = 4;  // panels whose products are kept at a time

// Channels are innermost in both images. Elements are float or bfloat16, which is a uint16_t here.
struct WinogradConvolution {
  int64_t height, width;
  int64_t in_channels;   // a multiple of kPanel
  int64_t out_channels;
  const float* weights;  // [kTaps, ceil(out_channels / kPanel), in_channels, kPanel]
  const float* bias;     // [out_channels], nullptr for none
  bool relu;
};

struct WinogradScratch {
  float* inputs;    // [kTaps, tiles, in_channels]
  float* products;  // [kTaps, tiles, kChunkPanels * kPanel]
};

#define MF_DECLARE(ISA)                                                                                              \
  namespace ISA {                                                                                                    \
  /* Tiles first..last-1 of the images' tiles, which are numbered row by row and image by image. */                  \
  void convolve_tiles(const WinogradConvolution& conv, const float* images, float* result, int64_t first,            \
                      int64_t last, const WinogradScratch& scratch);                                                 \
  void convolve_tiles(const WinogradConvolution& conv, const uint16_t* images, uint16_t* result, int64_t first,      \
                      int64_t last, const WinogradScratch& scratch);                                                 \
  }
MF_DECLARE(baseline)
#if defined(__x86_64__)
MF_DECLARE(avx2)
MF_DECLARE(avx512)
#endif
#undef MF_DECLARE

}  // namespace maskformer_fast
