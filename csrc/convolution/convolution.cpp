// A task is a block of consecutive tiles, possibly of several images. Its transformed inputs stay in the processor's
// cache.
#include "convolution/convolution.h"

#include <algorithm>
#include <memory>
#include <stdexcept>
#include <string>

#include "common/cpu_isa.h"
#include "common/threads.h"
#include "convolution/kernels.h"

namespace maskformer_fast {
namespace {

constexpr int64_t kBlockTiles = 36;  // tiles of a task, a multiple of those whose sums are in registers at a time

void check_channels(const char* name, int64_t channels) {
  if (channels % kPanel == 0) return;
  throw std::invalid_argument(std::string(name) + ": expected a multiple of " + std::to_string(kPanel) + ", got " +
                              std::to_string(channels));
}

}  // namespace

template <class Element>
void conv3x3_winograd(const WinogradConvolution& conv, const Element* images, int64_t count, Element* result,
                      int threads) {
  check_channels("in_channels", conv.in_channels);
  const int64_t rows = (conv.height + kOutputTile - 1) / kOutputTile;
  const int64_t columns = (conv.width + kOutputTile - 1) / kOutputTile, tiles = count * rows * columns;
  if (tiles == 0 || conv.out_channels == 0) return;
  // a multiple of the number of threads, so that all are busy to the end
  int64_t blocks = (tiles + kBlockTiles - 1) / kBlockTiles;
  blocks = std::min(tiles, (blocks + threads - 1) / threads * threads);
  const int64_t most = (tiles + blocks - 1) / blocks;
  threads = static_cast<int>(std::min<int64_t>(threads, blocks));
  const int64_t inputs = kTaps * tap_step(most * conv.in_channels);
  const int64_t products = kTaps * tap_step(most * kChunkPanels * kPanel);
  const std::unique_ptr<float[]> scratch(new float[threads * (inputs + products)]);
  parallel_for(blocks, threads, [&](int worker, int64_t block) {
    float* own = scratch.get() + worker * (inputs + products);
    MF_DISPATCH(convolve_tiles, conv, images, result, tiles * block / blocks, tiles * (block + 1) / blocks,
                {own, own + inputs});
  });
}

template void conv3x3_winograd(const WinogradConvolution&, const float*, int64_t, float*, int);
template void conv3x3_winograd(const WinogradConvolution&, const uint16_t*, int64_t, uint16_t*, int);

void winograd_image_tiles(const WinogradTiles& tiles, const float* images, float* result, int threads) {
  check_channels("channels", tiles.channels);
  parallel_for(tiles.last - tiles.first, threads,
               [&](int, int64_t tile) { MF_DISPATCH(transform_image_tile, tiles, images, tile, result); });
}

void winograd_gradient_tiles(const WinogradTiles& tiles, const float* gradient, float* result, int threads) {
  check_channels("channels", tiles.channels);
  parallel_for(tiles.last - tiles.first, threads,
               [&](int, int64_t tile) { MF_DISPATCH(transform_gradient_tile, tiles, gradient, tile, result); });
}

}  // namespace maskformer_fast
