// Rows of the map after GELU go round in a ring of three, those of its gradient in another, so that nothing of the map's
// size is written but the results. Channels of a pixel are adjacent: a vector is a part of them.
#include "upscaling/kernels.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "common/elements.h"

namespace maskformer_fast {
namespace MF_ISA {
namespace {

// Normal distribution: the probability below x, and its density.
struct Normal {
  Floats below, density;
};

// Within 2e-6 of the probability, below x = 0 too. The tail is a polynomial in 1 / (1 + 0.32 |x|), fitted to the scaled
// complementary error function, times exp(-x^2 / 2).
MF_INLINE Normal normal(Floats x) {
  const Floats distance = max(x, -x);
  const Floats t = 1.0f / (1.0f + 0.32f * distance);
  Floats p = broadcast(0.0345191173255f);
  p = p * t - 0.1224253699183f;
  p = p * t + 0.1061068773270f;
  p = p * t + 0.0155956251547f;
  p = p * t + 0.0973712876439f;
  p = p * t + 0.1134394109249f;
  p = p * t + 0.1277333647013f;
  p = p * t + 0.1276599019766f;
  const Floats e = exp(x * x * -0.5f);
  const Floats tail = p * t * e;
  return {select(x > 0.0f, 1.0f - tail, tail), e * 0.3989422804014f};
}

MF_INLINE Floats gelu(Floats x) { return x * normal(x).below; }

struct Shape {
  int64_t rows, columns, channels, padded, stride;  // of the result; stride: floats of a row in scratch memory
};

Shape shape_of(const Upscaling& sizes) {
  const int64_t padded = padded_channels(sizes);
  return {2 * sizes.height, 2 * sizes.width, sizes.channels, padded, (2 * sizes.width + 2) * padded};
}

// Address of row `row` in a ring.
MF_INLINE float* ring_row(float* ring, const Shape& shape, int64_t row) {
  return ring + (row + kRing) % kRing * shape.stride;
}

// Address of the maps' values behind pixel (row, column) of the result.
template <class T>
MF_INLINE T* behind(T* maps, const Shape& shape, int64_t image, int64_t row, int64_t column) {
  const int64_t window = (image * (shape.rows / 2) + row / 2) * (shape.columns / 2) + column / 2;
  return maps + (4 * window + row % 2 * 2 + column % 2) * shape.channels;
}

// Writes row `row` of the map after GELU into the ring; zeros outside the map.
template <class Element>
void read_row(const Upscaling& sizes, const Shape& shape, const Element* maps, int64_t image, int64_t row,
              float* ring) {
  float* written = ring_row(ring, shape, row);
  if (row < 0 || row >= shape.rows) {
    std::fill_n(written, shape.stride, 0.0f);
    return;
  }
  std::fill_n(written, shape.padded, 0.0f);
  std::fill_n(written + shape.stride - shape.padded, shape.padded, 0.0f);
  for (int64_t column = 0; column < shape.columns; ++column) {
    const Element* pixel = behind(maps, shape, image, row, column);
    float* target = written + (column + 1) * shape.padded;
    for (int64_t c = 0; c < shape.padded; c += kLanes) {
      const Floats x = load_elements(pixel + std::min(c, shape.channels), shape.channels - c);
      store(target + c, sizes.gelu ? gelu(x) : x);
    }
  }
}

// Copies weights [9, channels] and those of the norm to rows of padded channels.
void copy_weights(const Upscaling& sizes, const Shape& shape, float* weights) {
  std::fill_n(weights, kWeightRows * shape.padded, 0.0f);
  for (int64_t tap = 0; tap < kTaps; ++tap) {
    std::copy_n(sizes.weight + tap * shape.channels, shape.channels, weights + tap * shape.padded);
  }
  std::copy_n(sizes.norm_weight, shape.channels, weights + kTaps * shape.padded);
  std::copy_n(sizes.norm_bias, shape.channels, weights + (kTaps + 1) * shape.padded);
}

struct Moments {
  float mean, scale;  // scale: one over the standard deviation
};

// Convolves one pixel, whose 3x3 window begins at `corners` in three rows, into `pixel` [padded] -> its moments.
MF_INLINE Moments convolve(const Upscaling& sizes, const Shape& shape, const float* const (&corners)[3],
                           const float* weights, float* pixel) {
  Floats total{};
  for (int64_t c = 0; c < shape.padded; c += kLanes) {
    Floats value{};
    for (int64_t tap = 0; tap < kTaps; ++tap) {
      value += load(corners[tap / 3] + tap % 3 * shape.padded + c) * load(weights + tap * shape.padded + c);
    }
    store(pixel + c, value);
    total += value;
  }
  const float mean = sum(total) / static_cast<float>(shape.channels);
  Floats squares{};
  int64_t c = 0;
  for (; c + kLanes <= shape.channels; c += kLanes) {
    const Floats x = load(pixel + c) - mean;
    squares += x * x;
  }
  float variance = sum(squares);
  for (; c < shape.channels; ++c) variance += (pixel[c] - mean) * (pixel[c] - mean);
  return {mean, 1.0f / std::sqrt(variance / static_cast<float>(shape.channels) + sizes.epsilon)};
}

template <class Element>
void upscale(const Upscaling& sizes, const Element* maps, Element* result, int64_t image, int64_t first, int64_t last,
             float* scratch) {
  const Shape shape = shape_of(sizes);
  float *ring = scratch, *weights = ring + kRing * shape.stride, *pixel = weights + kWeightRows * shape.padded;
  copy_weights(sizes, shape, weights);
  const float *scales = weights + kTaps * shape.padded, *biases = scales + shape.padded;
  read_row(sizes, shape, maps, image, first - 1, ring);
  read_row(sizes, shape, maps, image, first, ring);
  for (int64_t row = first; row < last; ++row) {
    read_row(sizes, shape, maps, image, row + 1, ring);
    const float* rows[3] = {ring_row(ring, shape, row - 1), ring_row(ring, shape, row), ring_row(ring, shape, row + 1)};
    Element* written = result + (image * shape.rows + row) * shape.columns * shape.channels;
    for (int64_t column = 0; column < shape.columns; ++column, written += shape.channels) {
      const int64_t at = column * shape.padded;
      const float* const corners[3] = {rows[0] + at, rows[1] + at, rows[2] + at};
      const Moments moments = convolve(sizes, shape, corners, weights, pixel);
      for (int64_t c = 0; c < shape.channels; c += kLanes) {
        const Floats x = (load(pixel + c) - moments.mean) * moments.scale;
        store_elements(written + c, x * load(scales + c) + load(biases + c), shape.channels - c);
      }
    }
  }
}

// Turns the gradient of a pixel's result into that by its convolution, `written` [padded], whose unused channels stay 0,
// and adds those of the weights, if `sums` [kWeightRows, padded] is given.
MF_INLINE void differentiate_pixel(const Shape& shape, const float* gradient, const float* pixel, const Moments moments,
                                   const float* scales, const float* const (&corners)[3], float* written, float* sums) {
  Floats total{}, product{};
  for (int64_t c = 0; c < shape.channels; c += kLanes) {
    const Floats upstream = load_elements(gradient + c, shape.channels - c) * load(scales + c);
    total += upstream;
    product += upstream * ((load(pixel + c) - moments.mean) * moments.scale);
  }
  const float count = static_cast<float>(shape.channels), mean = sum(total) / count, slope = sum(product) / count;
  for (int64_t c = 0; c < shape.channels; c += kLanes) {
    const Floats upstream = load_elements(gradient + c, shape.channels - c);
    const Floats x = (load(pixel + c) - moments.mean) * moments.scale;
    const Floats by_value = (upstream * load(scales + c) - mean - x * slope) * moments.scale;
    store_elements(written + c, by_value, shape.channels - c);
    if (sums == nullptr) continue;
    for (int64_t tap = 0; tap < kTaps; ++tap) {
      float* sum = sums + tap * shape.padded + c;
      store(sum, load(sum) + by_value * load(corners[tap / 3] + tap % 3 * shape.padded + c));
    }
    float *by_scale = sums + kTaps * shape.padded + c, *by_bias = by_scale + shape.padded;
    store(by_scale, load(by_scale) + upstream * x);
    store(by_bias, load(by_bias) + upstream);
  }
}

// Gradients by the convolution's results in row `row`, into their ring, and those of the weights.
void differentiate_row(const Upscaling& sizes, const Shape& shape, const float* gradient, int64_t image, int64_t row,
                       float* ring, float* slopes, const float* weights, float* pixel, float* sums) {
  float* written = ring_row(slopes, shape, row);
  std::fill_n(written, shape.stride, 0.0f);
  if (row < 0 || row >= shape.rows) return;
  const float* rows[3] = {ring_row(ring, shape, row - 1), ring_row(ring, shape, row), ring_row(ring, shape, row + 1)};
  const float* upstream = gradient + (image * shape.rows + row) * shape.columns * shape.channels;
  for (int64_t column = 0; column < shape.columns; ++column, upstream += shape.channels) {
    const int64_t at = column * shape.padded;
    const float* const corners[3] = {rows[0] + at, rows[1] + at, rows[2] + at};
    const Moments moments = convolve(sizes, shape, corners, weights, pixel);
    differentiate_pixel(shape, upstream, pixel, moments, weights + kTaps * shape.padded, corners,
                        written + at + shape.padded, sums);
  }
}

// Gradients of the maps behind row `row` of the result, from the rows of the other ring around it.
void write_gradient(const Upscaling& sizes, const Shape& shape, const float* maps, float* by_maps, int64_t image,
                    int64_t row, float* slopes, const float* weights) {
  const float* rows[3] = {ring_row(slopes, shape, row + 1), ring_row(slopes, shape, row),
                          ring_row(slopes, shape, row - 1)};  // the first row of the window saw this one from below
  for (int64_t column = 0; column < shape.columns; ++column) {
    const float* pixel = behind(maps, shape, image, row, column);
    float* written = behind(by_maps, shape, image, row, column);
    for (int64_t c = 0; c < shape.channels; c += kLanes) {
      Floats value{};
      for (int64_t tap = 0; tap < kTaps; ++tap) {
        value += load(rows[tap / 3] + (column + 2 - tap % 3) * shape.padded + c) *
                 load(weights + tap * shape.padded + c);
      }
      if (sizes.gelu) {
        const Floats x = load_elements(pixel + c, shape.channels - c);
        const Normal at = normal(x);
        value *= at.below + x * at.density;
      }
      store_elements(written + c, value, shape.channels - c);
    }
  }
}

}  // namespace

void upscale_rows(const Upscaling& sizes, const float* maps, float* result, int64_t image, int64_t first, int64_t last,
                  float* scratch) {
  upscale(sizes, maps, result, image, first, last, scratch);
}

void upscale_rows(const Upscaling& sizes, const uint16_t* maps, uint16_t* result, int64_t image, int64_t first,
                  int64_t last, float* scratch) {
  upscale(sizes, maps, result, image, first, last, scratch);
}

void differentiate_rows(const Upscaling& sizes, const float* gradient, const float* maps, float* by_maps,
                        float* by_weights, int64_t image, int64_t first, int64_t last, float* scratch) {
  const Shape shape = shape_of(sizes);
  float *ring = scratch, *slopes = ring + kRing * shape.stride, *weights = slopes + kRing * shape.stride;
  float *sums = weights + kWeightRows * shape.padded, *pixel = sums + kWeightRows * shape.padded;
  copy_weights(sizes, shape, weights);
  std::fill_n(sums, kWeightRows * shape.padded, 0.0f);
  read_row(sizes, shape, maps, image, first - 2, ring);
  read_row(sizes, shape, maps, image, first - 1, ring);
  for (int64_t row = first - 1; row <= last; ++row) {  // a row of slopes on each side belongs to other bands
    read_row(sizes, shape, maps, image, row + 1, ring);
    const bool own = row >= first && row < last;
    differentiate_row(sizes, shape, gradient, image, row, ring, slopes, weights, pixel, own ? sums : nullptr);
    if (row > first) write_gradient(sizes, shape, maps, by_maps, image, row - 1, slopes, weights);
  }
  for (int64_t row = 0; row < kWeightRows; ++row) {
    std::copy_n(sums + row * shape.padded, shape.channels, by_weights + row * shape.channels);
  }
}

}  // namespace MF_ISA
}  // namespace maskformer_fast
