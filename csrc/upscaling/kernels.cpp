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

// Convolves three rows, one vector of channels after the other, so that its weights and window stay in registers:
// writes [columns, padded] at every `padded` floats. `flip` turns the window around, as the gradient needs it.
template <bool flip>
MF_INLINE void convolve_row(const Shape& shape, const float* const (&rows)[3], const float* weights, float* written) {
  for (int64_t c = 0; c < shape.padded; c += kLanes) {
    Floats weight[kTaps], window[kTaps];
    for (int tap = 0; tap < kTaps; ++tap) {
      weight[tap] = load(weights + (flip ? kTaps - 1 - tap : tap) * shape.padded + c);
    }
    for (int row = 0; row < 3; ++row) {
      window[3 * row] = load(rows[row] + c);
      window[3 * row + 1] = load(rows[row] + shape.padded + c);
    }
    for (int64_t column = 0; column < shape.columns; ++column) {
      Floats value{};
      for (int row = 0; row < 3; ++row) {
        window[3 * row + 2] = load(rows[row] + (column + 2) * shape.padded + c);
        for (int tap = 3 * row; tap < 3 * row + 3; ++tap) value += window[tap] * weight[tap];
        window[3 * row] = window[3 * row + 1];
        window[3 * row + 1] = window[3 * row + 2];
      }
      store(written + column * shape.padded + c, value);
    }
  }
}

// Mean and scale of a pixel [padded], whose unused channels are 0.
MF_INLINE Moments moments_of(const Upscaling& sizes, const Shape& shape, const float* pixel) {
  Floats total{};
  for (int64_t c = 0; c < shape.padded; c += kLanes) total += load(pixel + c);
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
  float *ring = scratch, *weights = ring + kRing * shape.stride, *values = weights + kWeightRows * shape.padded;
  copy_weights(sizes, shape, weights);
  const float *scales = weights + kTaps * shape.padded, *biases = scales + shape.padded;
  read_row(sizes, shape, maps, image, first - 1, ring);
  read_row(sizes, shape, maps, image, first, ring);
  for (int64_t row = first; row < last; ++row) {
    read_row(sizes, shape, maps, image, row + 1, ring);
    const float* const rows[3] = {ring_row(ring, shape, row - 1), ring_row(ring, shape, row),
                                  ring_row(ring, shape, row + 1)};
    convolve_row<false>(shape, rows, weights, values);
    Element* written = result + (image * shape.rows + row) * shape.columns * shape.channels;
    for (int64_t column = 0; column < shape.columns; ++column, written += shape.channels) {
      const float* pixel = values + column * shape.padded;
      const Moments moments = moments_of(sizes, shape, pixel);
      for (int64_t c = 0; c < shape.channels; c += kLanes) {
        const Floats x = (load(pixel + c) - moments.mean) * moments.scale;
        store_elements(written + c, x * load(scales + c) + load(biases + c), shape.channels - c);
      }
    }
  }
}

// Turns the gradient of a pixel's result into that by its convolution, `written` [padded], whose unused channels stay 0,
// and adds those of the norm's weight and bias, if `sums` [2, padded] is given.
MF_INLINE void differentiate_norm(const Shape& shape, const float* gradient, const float* pixel, const Moments moments,
                                  const float* scales, float* written, float* sums) {
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
    store_elements(written + c, (upstream * load(scales + c) - mean - x * slope) * moments.scale, shape.channels - c);
    if (sums == nullptr) continue;
    store(sums + c, load(sums + c) + upstream * x);
    store(sums + shape.padded + c, load(sums + shape.padded + c) + upstream);
  }
}

// Adds the gradients of the convolution's weights by a row of gradients by its results, which begins at `slopes`.
MF_INLINE void add_weight_gradients(const Shape& shape, const float* const (&rows)[3], const float* slopes,
                                    float* sums) {
  for (int64_t c = 0; c < shape.padded; c += kLanes) {
    Floats total[kTaps], window[kTaps];
    for (int tap = 0; tap < kTaps; ++tap) total[tap] = load(sums + tap * shape.padded + c);
    for (int row = 0; row < 3; ++row) {
      window[3 * row] = load(rows[row] + c);
      window[3 * row + 1] = load(rows[row] + shape.padded + c);
    }
    for (int64_t column = 0; column < shape.columns; ++column) {
      const Floats slope = load(slopes + column * shape.padded + c);
      for (int row = 0; row < 3; ++row) {
        window[3 * row + 2] = load(rows[row] + (column + 2) * shape.padded + c);
        for (int tap = 3 * row; tap < 3 * row + 3; ++tap) total[tap] += window[tap] * slope;
        window[3 * row] = window[3 * row + 1];
        window[3 * row + 1] = window[3 * row + 2];
      }
    }
    for (int tap = 0; tap < kTaps; ++tap) store(sums + tap * shape.padded + c, total[tap]);
  }
}

// Gradients by the convolution's results in row `row`, into their ring, and those of the weights, if `sums`
// [kWeightRows, padded] is given.
void differentiate_row(const Upscaling& sizes, const Shape& shape, const float* gradient, int64_t image, int64_t row,
                       float* ring, float* slopes, const float* weights, float* values, float* sums) {
  float* written = ring_row(slopes, shape, row);
  std::fill_n(written, shape.stride, 0.0f);
  if (row < 0 || row >= shape.rows) return;
  const float* const rows[3] = {ring_row(ring, shape, row - 1), ring_row(ring, shape, row),
                                ring_row(ring, shape, row + 1)};
  convolve_row<false>(shape, rows, weights, values);
  const float* upstream = gradient + (image * shape.rows + row) * shape.columns * shape.channels;
  for (int64_t column = 0; column < shape.columns; ++column, upstream += shape.channels) {
    const float* pixel = values + column * shape.padded;
    differentiate_norm(shape, upstream, pixel, moments_of(sizes, shape, pixel), weights + kTaps * shape.padded,
                       written + (column + 1) * shape.padded, sums == nullptr ? nullptr : sums + kTaps * shape.padded);
  }
  if (sums != nullptr) add_weight_gradients(shape, rows, written + shape.padded, sums);
}

// Gradients of the maps behind row `row` of the result, from the rows of the other ring around it.
void write_gradient(const Upscaling& sizes, const Shape& shape, const float* maps, float* by_maps, int64_t image,
                    int64_t row, float* slopes, const float* weights, float* values) {
  const float* const rows[3] = {ring_row(slopes, shape, row - 1), ring_row(slopes, shape, row),
                                ring_row(slopes, shape, row + 1)};
  convolve_row<true>(shape, rows, weights, values);
  for (int64_t column = 0; column < shape.columns; ++column) {
    const float *pixel = behind(maps, shape, image, row, column), *value = values + column * shape.padded;
    float* written = behind(by_maps, shape, image, row, column);
    for (int64_t c = 0; c < shape.channels; c += kLanes) {
      Floats slope = load(value + c);
      if (sizes.gelu) {
        const Floats x = load_elements(pixel + c, shape.channels - c);
        const Normal at = normal(x);
        slope *= at.below + x * at.density;
      }
      store_elements(written + c, slope, shape.channels - c);
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
  float *sums = weights + kWeightRows * shape.padded, *values = sums + kWeightRows * shape.padded;
  copy_weights(sizes, shape, weights);
  std::fill_n(sums, kWeightRows * shape.padded, 0.0f);
  read_row(sizes, shape, maps, image, first - 2, ring);
  read_row(sizes, shape, maps, image, first - 1, ring);
  for (int64_t row = first - 1; row <= last; ++row) {  // a row of slopes on each side belongs to other bands
    read_row(sizes, shape, maps, image, row + 1, ring);
    const bool own = row >= first && row < last;
    differentiate_row(sizes, shape, gradient, image, row, ring, slopes, weights, values, own ? sums : nullptr);
    if (row > first) write_gradient(sizes, shape, maps, by_maps, image, row - 1, slopes, weights, values);
  }
  for (int64_t row = 0; row < kWeightRows; ++row) {
    std::copy_n(sums + row * shape.padded, shape.channels, by_weights + row * shape.channels);
  }
}

}  // namespace MF_ISA
}  // namespace maskformer_fast
