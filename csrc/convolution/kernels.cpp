// Winograd's algorithm with the interpolation points 0, +-1/sqrt(2), +-sqrt(2) and infinity. Their rounding errors are
// smaller than those of the usual points 0, +-1, +-2.
//
// Y = A^T [(G g G^T) * (B^T d B)] A for a tile d of 6x6 inputs and 3x3 weights g. The weights are transformed
// beforehand (maskformer_fast/ops/convolution.py). The element-wise products, summed over input channels, are 36 matrix
// products of [tiles, in_channels] by [in_channels, out_channels].
#include "convolution/kernels.h"

#include "common/elements.h"

namespace maskformer_fast {
namespace MF_ISA {
namespace {

constexpr float kA = 0.70710678118654752f;  // 1 / sqrt(2)
constexpr float kB = 1.41421356237309505f;  // sqrt(2)
constexpr int kSide = kOutputTile + 2;  // input pixels along a side of a tile
constexpr int kRows = 6;                // tiles whose sums are in registers at a time
#if defined(__AVX512F__)
constexpr int kVectors = 4;  // vectors of output channels whose sums are in registers at a time
#else
constexpr int kVectors = 2;
#endif
constexpr int kChunk = kChunkPanels * kPanel;

// Multiplies a column or row of inputs by B^T.
MF_INLINE void transform_input(const Floats* d, Floats* t) {
  const Floats even_a = d[4] - 2.0f * d[2], odd_a = kA * (d[3] - 2.0f * d[1]);
  const Floats even_b = d[4] - 0.5f * d[2], odd_b = kB * (d[3] - 0.5f * d[1]);
  t[0] = d[0] + d[4] - 2.5f * d[2];
  t[1] = even_a + odd_a;
  t[2] = even_a - odd_a;
  t[3] = even_b + odd_b;
  t[4] = even_b - odd_b;
  t[5] = d[1] + d[5] - 2.5f * d[3];
}

// Multiplies a column or row of products by A^T.
MF_INLINE void transform_output(const Floats* m, Floats* y) {
  const Floats sum_a = m[1] + m[2], difference_a = kA * (m[1] - m[2]);
  const Floats sum_b = m[3] + m[4], difference_b = kB * (m[3] - m[4]);
  y[0] = m[0] + sum_a + sum_b;
  y[1] = difference_a + difference_b;
  y[2] = 0.5f * sum_a + 2.0f * sum_b;
  y[3] = 0.5f * difference_a + 2.0f * difference_b + m[5];
}

// Multiplies a column or row of the result's gradient by A.
MF_INLINE void transform_gradient(const Floats* y, Floats* t) {
  const Floats even_a = y[0] + 0.5f * y[2], odd_a = kA * (y[1] + 0.5f * y[3]);
  const Floats even_b = y[0] + 2.0f * y[2], odd_b = kB * (y[1] + 2.0f * y[3]);
  t[0] = y[0];
  t[1] = even_a + odd_a;
  t[2] = even_a - odd_a;
  t[3] = even_b + odd_b;
  t[4] = even_b - odd_b;
  t[5] = y[3];
}

struct Tile {
  int64_t image, y, x;  // position of the first pixel
};

MF_INLINE Tile tile_at(int64_t height, int64_t width, int64_t index) {
  const int64_t columns = (width + kOutputTile - 1) / kOutputTile;
  const int64_t rows = (height + kOutputTile - 1) / kOutputTile;
  return {index / (rows * columns), index / columns % rows * kOutputTile, index % columns * kOutputTile};
}

template <class Element>
void read_tile(int64_t height, int64_t width, int64_t channels, const Element* images, const Tile& tile, int64_t step,
               float* inputs) {
  const Element* image = images + tile.image * height * width * channels;
  for (int64_t c = 0; c < channels; c += kLanes) {
    Floats rows[kSide][kSide];  // columns transformed
    for (int j = 0; j < kSide; ++j) {
      const int64_t x = tile.x + j - 1;
      Floats column[kSide], transformed[kSide];
      for (int i = 0; i < kSide; ++i) {
        const int64_t y = tile.y + i - 1;
        const bool inside = y >= 0 && y < height && x >= 0 && x < width;
        column[i] = inside ? load_elements(image + (y * width + x) * channels + c) : Floats{};
      }
      transform_input(column, transformed);
      for (int i = 0; i < kSide; ++i) rows[i][j] = transformed[i];
    }
    for (int i = 0; i < kSide; ++i) {
      Floats transformed[kSide];
      transform_input(rows[i], transformed);
      for (int j = 0; j < kSide; ++j) store(inputs + (i * kSide + j) * step + c, transformed[j]);
    }
  }
}

template <class Element>
void write_tile(const WinogradConvolution& conv, const float* products, const Tile& tile, int64_t step,
                int64_t first_channel, Element* result) {
  const int64_t channels = conv.out_channels;
  const int64_t count = channels - first_channel < kChunk ? channels - first_channel : kChunk;
  Element* image = result + tile.image * conv.height * conv.width * channels + first_channel;
  const float* bias = conv.bias ? conv.bias + first_channel : nullptr;
  for (int64_t c = 0; c < count; c += kLanes) {
    Floats offset{};
    if (bias && c + kLanes <= count) {
      offset = load(bias + c);
    } else if (bias) {
      for (int64_t lane = 0; c + lane < count; ++lane) offset[lane] = bias[c + lane];
    }
    Floats rows[kOutputTile][kSide];  // columns transformed
    for (int j = 0; j < kSide; ++j) {
      Floats column[kSide], transformed[kOutputTile];
      for (int i = 0; i < kSide; ++i) column[i] = load(products + (i * kSide + j) * step + c);
      transform_output(column, transformed);
      for (int i = 0; i < kOutputTile; ++i) rows[i][j] = transformed[i];
    }
    for (int i = 0; i < kOutputTile && tile.y + i < conv.height; ++i) {
      Floats pixels[kOutputTile];
      transform_output(rows[i], pixels);
      for (int j = 0; j < kOutputTile && tile.x + j < conv.width; ++j) {
        Floats pixel = pixels[j] + offset;
        // in this form NaN stays NaN, as in PyTorch
        if (conv.relu) pixel = select(pixel < 0.0f, Floats{}, pixel);
        store_elements(image + ((tile.y + i) * conv.width + tile.x + j) * channels + c, pixel, count - c);
      }
    }
  }
}

// Computes the products of `rows` tiles and `vectors` vectors of output channels from the panel's start on.
template <int rows, int vectors>
void multiply(const float* inputs, const float* weights, int64_t channels, float* products) {
  constexpr int kSplit = kPanel / kLanes;  // vectors of a panel
  Floats sums[rows][vectors];
#pragma GCC unroll 8
  for (int row = 0; row < rows; ++row) {
#pragma GCC unroll 8
    for (int v = 0; v < vectors; ++v) sums[row][v] = Floats{};
  }
  for (int64_t c = 0; c < channels; ++c) {
    Floats column[vectors];
#pragma GCC unroll 8
    for (int v = 0; v < vectors; ++v) {
      column[v] = load(weights + v / kSplit * channels * kPanel + c * kPanel + v % kSplit * kLanes);
    }
#pragma GCC unroll 8
    for (int row = 0; row < rows; ++row) {
      const Floats input = broadcast(inputs[row * channels + c]);
#pragma GCC unroll 8
      for (int v = 0; v < vectors; ++v) sums[row][v] += input * column[v];
    }
  }
#pragma GCC unroll 8
  for (int row = 0; row < rows; ++row) {
#pragma GCC unroll 8
    for (int v = 0; v < vectors; ++v) store(products + row * kChunk + v * kLanes, sums[row][v]);
  }
}

template <int vectors>
void multiply_rows(int64_t rows, const float* inputs, const float* weights, int64_t channels, float* products) {
  for (; rows >= kRows; rows -= kRows, inputs += kRows * channels, products += kRows * kChunk) {
    multiply<kRows, vectors>(inputs, weights, channels, products);
  }
  switch (rows) {
    case 1: return multiply<1, vectors>(inputs, weights, channels, products);
    case 2: return multiply<2, vectors>(inputs, weights, channels, products);
    case 3: return multiply<3, vectors>(inputs, weights, channels, products);
    case 4: return multiply<4, vectors>(inputs, weights, channels, products);
    case 5: return multiply<5, vectors>(inputs, weights, channels, products);
  }
}

// Computes one of the matrix products: [tiles, channels] by `panels` panels of weights.
void multiply_chunk(int64_t tiles, int64_t panels, const float* inputs, const float* weights, int64_t channels,
                    float* products) {
  constexpr int kSplit = kPanel / kLanes;
  const int64_t vectors = panels * kSplit;
  for (int64_t v = 0; v < vectors;) {
    const float* own = weights + v / kSplit * channels * kPanel + v % kSplit * kLanes;
    float* out = products + v * kLanes;
    // a full group begins a panel or lies within one; where a vector is a panel, any number of vectors may be left
    const int64_t rest = vectors - v;
    if (rest >= kVectors) {
      multiply_rows<kVectors>(tiles, inputs, own, channels, out);
      v += kVectors;
    } else if (rest == 3) {
      multiply_rows<3>(tiles, inputs, own, channels, out);
      v += 3;
    } else if (rest == 2) {
      multiply_rows<2>(tiles, inputs, own, channels, out);
      v += 2;
    } else {
      multiply_rows<1>(tiles, inputs, own, channels, out);
      ++v;
    }
  }
}

template <class Element>
void convolve(const WinogradConvolution& conv, const Element* images, Element* result, int64_t first, int64_t last,
              const WinogradScratch& scratch) {
  const int64_t tiles = last - first, channels = conv.in_channels;
  const int64_t panels = (conv.out_channels + kPanel - 1) / kPanel;
  const int64_t input_step = tap_step(tiles * channels), product_step = tap_step(tiles * kChunk);
  for (int64_t tile = 0; tile < tiles; ++tile) {
    read_tile(conv.height, conv.width, channels, images, tile_at(conv.height, conv.width, first + tile), input_step,
              scratch.inputs + tile * channels);
  }
  for (int64_t panel = 0; panel < panels; panel += kChunkPanels) {
    const int64_t width = panels - panel < kChunkPanels ? panels - panel : kChunkPanels;
    for (int tap = 0; tap < kTaps; ++tap) {
      multiply_chunk(tiles, width, scratch.inputs + tap * input_step,
                     conv.weights + (tap * panels + panel) * channels * kPanel, channels,
                     scratch.products + tap * product_step);
    }
    for (int64_t tile = 0; tile < tiles; ++tile) {
      write_tile(conv, scratch.products + tile * kChunk, tile_at(conv.height, conv.width, first + tile), product_step,
                 panel * kPanel, result);
    }
  }
}

}  // namespace

void convolve_tiles(const WinogradConvolution& conv, const float* images, float* result, int64_t first, int64_t last,
                    const WinogradScratch& scratch) {
  convolve(conv, images, result, first, last, scratch);
}

void convolve_tiles(const WinogradConvolution& conv, const uint16_t* images, uint16_t* result, int64_t first,
                    int64_t last, const WinogradScratch& scratch) {
  convolve(conv, images, result, first, last, scratch);
}

void transform_image_tile(const WinogradTiles& tiles, const float* images, int64_t tile, float* result) {
  read_tile(tiles.height, tiles.width, tiles.channels, images, tile_at(tiles.height, tiles.width, tiles.first + tile),
            tiles.step, result + tile * tiles.channels);
}

void transform_gradient_tile(const WinogradTiles& tiles, const float* gradient, int64_t tile, float* result) {
  const auto [image, top, left] = tile_at(tiles.height, tiles.width, tiles.first + tile);
  const float* pixels = gradient + image * tiles.height * tiles.width * tiles.channels;
  for (int64_t c = 0; c < tiles.channels; c += kLanes) {
    Floats rows[kSide][kOutputTile];  // columns transformed
    for (int j = 0; j < kOutputTile; ++j) {
      Floats column[kOutputTile], transformed[kSide];
      for (int i = 0; i < kOutputTile; ++i) {
        const bool inside = top + i < tiles.height && left + j < tiles.width;
        const float* pixel = pixels + ((top + i) * tiles.width + left + j) * tiles.channels + c;
        column[i] = inside ? load(pixel) : Floats{};
      }
      transform_gradient(column, transformed);
      for (int i = 0; i < kSide; ++i) rows[i][j] = transformed[i];
    }
    for (int i = 0; i < kSide; ++i) {
      Floats transformed[kSide];
      transform_gradient(rows[i], transformed);
      for (int j = 0; j < kSide; ++j) {
        store(result + (i * kSide + j) * tiles.step + tile * tiles.channels + c, transformed[j]);
      }
    }
  }
}

}  // namespace MF_ISA
}  // namespace maskformer_fast
