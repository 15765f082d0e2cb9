// Mask probabilities of a tile, and their range, from low-resolution logits; part of semantic_kernel.cpp.
//
// Infinite logits (and finite ones beyond) count as +-1e30, so that interpolation never meets inf - inf: a tap at -inf
// pulls every pixel that it reaches to 0, and between opposite infinities the nearer one wins.
#pragma once

#if defined(__AVX2__)
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // GCC's own header starts vectors from themselves
#include <immintrin.h>
#pragma GCC diagnostic pop
#endif

#include "semantic.h"
#include "simd.h"

namespace maskformer_fast {
namespace MF_ISA {
namespace {

constexpr int kRowVectors = kTile / kLanes;  // vectors of one row of a tile
constexpr float kInfinity = __builtin_inff();
constexpr float kLogitLimit = 1e30f;

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};
typedef uint16_t Shorts __attribute__((vector_size(2 * kLanes)));
typedef uint32_t Words __attribute__((vector_size(4 * kLanes)));

MF_INLINE Words load_words(const void* p) {
  Shorts x;
  __builtin_memcpy(&x, p, sizeof x);
  return __builtin_convertvector(x, Words);
}

MF_INLINE Floats load_floats(const float* p) { return load(p); }
MF_INLINE Floats load_floats(const BFloat16* p) { return (Floats)(load_words(p) << 16); }
MF_INLINE Floats load_floats(const Float16* p) {
  const Words bits = load_words(p);
  const Words magnitude = (bits & 0x7fff) << 13;
  const Floats finite = (Floats)magnitude * 0x1p112f;  // rebiases the exponent, also of denormals
  const Words special = (Words)(magnitude >= (31u << 23)) & 0x7f800000;  // infinities and NaN
  return (Floats)((Words)finite | special | ((bits & 0x8000) << 16));
}

MF_INLINE float load_float(const float* p) { return *p; }
MF_INLINE float load_float(const BFloat16* p) {
  const uint32_t bits = uint32_t(p->bits) << 16;
  float x;
  __builtin_memcpy(&x, &bits, sizeof x);
  return x;
}
MF_INLINE float load_float(const Float16* p) {
  Shorts all = Shorts{} + p->bits;
  return load_floats(reinterpret_cast<const Float16*>(&all))[0];
}

// The limits are compared first, so that NaN stays.
MF_INLINE Floats limit_logits(Floats x) { return max(broadcast(-kLogitLimit), min(broadcast(kLogitLimit), x)); }

// 1 / (1 + e^-x) within 4 units in the last place, 0 below -87 (-126 log 2 with AVX-512); NaN stays NaN.
MF_INLINE Floats mask_probability(Floats x) {
#if defined(__AVX512F__)
  const Floats t = x * -1.44269504088896f;
  const Floats whole = _mm512_roundscale_ps(t, _MM_FROUND_TO_NEAREST_INT);
  const Floats f = t - whole;
  Floats p = broadcast(1.535336188319500e-4f);  // as in exp()
  p = p * f + 1.339887440266574e-3f;
  p = p * f + 9.618437357674640e-3f;
  p = p * f + 5.550332471162809e-2f;
  p = p * f + 2.402264791363012e-1f;
  p = p * f + 6.931472028550421e-1f;
  p = p * f + 1.0f;
  return 1.0f / (1.0f + (Floats)_mm512_scalef_ps(p, whole));
#else
  return select(x >= -87.0f, sigmoid(x), x * 0.0f);
#endif
}

// x[index[0]], x[index[1]], ...
MF_INLINE Floats permute(Floats x, Ints index) {
#if defined(__AVX512F__)
  return _mm512_permutexvar_ps((__m512i)index, x);
#elif defined(__AVX2__)
  return _mm256_permutevar8x32_ps(x, (__m256i)index);
#else
  Floats y;
  for (int lane = 0; lane < kLanes; ++lane) y[lane] = x[index[lane]];
  return y;
#endif
}

MF_INLINE float highest(Floats x) {
  float y = x[0];
#if defined(__AVX512F__)
  return _mm512_reduce_max_ps(x);
#elif defined(__AVX2__)
  __m128 z = _mm_max_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
  z = _mm_max_ps(z, _mm_movehl_ps(z, z));
  return _mm_cvtss_f32(_mm_max_ss(z, _mm_movehdup_ps(z)));
#else
  for (int lane = 1; lane < kLanes; ++lane) y = y > x[lane] ? y : x[lane];
#endif
  return y;
}

// What the pixels of a tile read. Pixels beyond the output repeat its last row and column.
struct Window {
  int top, left, height, width;               // the tile's part of the output
  int32_t low[kTile], high[kTile];            // rows of the maps
  float low_share[kTile], high_share[kTile];
  int32_t column_low[kTile], column_high[kTile];
  float column_low_share[kTile], column_high_share[kTile];
  int first_column, last_column;
  // narrow: the taps of each vector of pixels lie within kLanes columns, which one load from `start` fetches
  bool narrow;
  int32_t start[kRowVectors];
  int32_t lane_low[kTile], lane_high[kTile];
};

MF_INLINE Window find_window(const SemanticImage& image, int top, int left) {
  Window window;
  window.top = top;
  window.left = left;
  window.height = image.height - top < kTile ? image.height - top : kTile;
  window.width = image.width - left < kTile ? image.width - left : kTile;
  for (int i = 0; i < kTile; ++i) {
    const int y = top + (i < window.height ? i : window.height - 1);
    const int x = left + (i < window.width ? i : window.width - 1);
    window.low[i] = image.rows.low[y];
    window.high[i] = image.rows.high[y];
    window.high_share[i] = image.rows.share[y];
    window.low_share[i] = 1.0f - image.rows.share[y];
    window.column_low[i] = image.columns.low[x];
    window.column_high[i] = image.columns.high[x];
    window.column_high_share[i] = image.columns.share[x];
    window.column_low_share[i] = 1.0f - image.columns.share[x];
  }
  window.first_column = window.column_low[0];
  window.last_column = window.column_high[kTile - 1];
  window.narrow = image.map_width >= kLanes && image.mask_strides[2] == 1;
  for (int v = 0; v < kRowVectors; ++v) {
    const int last_start = image.map_width - kLanes;
    int start = window.column_low[v * kLanes];
    start = start < last_start ? start : last_start;
    window.start[v] = start;
    window.narrow = window.narrow && window.column_high[(v + 1) * kLanes - 1] - start < kLanes;
    for (int i = v * kLanes; i < (v + 1) * kLanes; ++i) {
      window.lane_low[i] = window.column_low[i] - start;
      window.lane_high[i] = window.column_high[i] - start;
    }
  }
  return window;
}

MF_INLINE Ints load_ints(const int32_t* p) {
  Ints x;
  __builtin_memcpy(&x, p, sizeof x);
  return x;
}

// One row of a map, interpolated to the columns of the v-th vector of pixels. The interpolation has the form
// a * (1 - t) + b * t: each step rounds monotonically, and so the result is monotone in the taps.
template <bool kNarrow, class T>
MF_INLINE Floats interpolate(const T* row, int64_t stride, const Window& window, int v) {
  Floats low, high;
  if (kNarrow) {
    const Floats taps = limit_logits(load_floats(row + window.start[v]));
    low = permute(taps, load_ints(window.lane_low + v * kLanes));
    high = permute(taps, load_ints(window.lane_high + v * kLanes));
  } else {
    float a[kLanes], b[kLanes];
    for (int lane = 0; lane < kLanes; ++lane) {
      a[lane] = load_float(row + window.column_low[v * kLanes + lane] * stride);
      b[lane] = load_float(row + window.column_high[v * kLanes + lane] * stride);
    }
    low = limit_logits(load(a));
    high = limit_logits(load(b));
  }
  return low * load(window.column_low_share + v * kLanes) + high * load(window.column_high_share + v * kLanes);
}

template <bool kNarrow, class T>
void fill_masks(const SemanticImage& image, const Window& window, const int32_t* queries, int count, unsigned panels,
                float* masks, int64_t panel_stride) {
  const int64_t row_stride = image.mask_strides[1], column_stride = image.mask_strides[2];
  for (int i = 0; i < count; ++i) {
    const T* map = static_cast<const T*>(image.masks) + queries[i] * image.mask_strides[0];
    for (int v = 0; v < kRowVectors; ++v) {
      Floats upper{}, lower{};
      int top = -1, bottom = -1;  // rows that these hold
      for (int y = 0; y < kTile; ++y) {
        const int panel = y / kPanelRows;
        if (!(panels >> panel & 1)) continue;
        if (top != window.low[y]) {
          top = window.low[y];
          upper = top == bottom ? lower : interpolate<kNarrow>(map + top * row_stride, column_stride, window, v);
        }
        if (bottom != window.high[y]) {
          bottom = window.high[y];
          lower = top == bottom ? upper : interpolate<kNarrow>(map + bottom * row_stride, column_stride, window, v);
        }
        float* out = masks + panel * panel_stride + i * kPanelPixels + y % kPanelRows * kTile + v * kLanes;
        store(out, mask_probability(upper * window.low_share[y] + lower * window.high_share[y]));
      }
    }
  }
}

// Least and largest logit of every query among the taps of a window; false if there is a NaN.
template <class T>
bool find_ranges(const SemanticImage& image, const Window& window, float* least, float* largest) {
  const int64_t row_stride = image.mask_strides[1], column_stride = image.mask_strides[2];
  const int first = window.first_column, last = window.last_column;
  const bool vectors = image.map_width >= kLanes && column_stride == 1;
  const int last_start = vectors && last - first + 1 < kLanes
                             ? (first < image.map_width - kLanes ? first : image.map_width - kLanes)
                             : last - kLanes + 1;
  Ints in_window;  // lanes of the last load
  for (int lane = 0; lane < kLanes; ++lane) {
    in_window[lane] = last_start + lane >= first && last_start + lane <= last ? -1 : 0;
  }
  Ints unordered{};
  bool scalar_nan = false;
  for (int query = 0; query < image.queries; ++query) {
    const T* map = static_cast<const T*>(image.masks) + query * image.mask_strides[0];
    Floats low = broadcast(kInfinity), high = broadcast(-kInfinity);
    float scalar_low = kInfinity, scalar_high = -kInfinity;
    int done = -1;
    for (int i = 0; i < 2 * kTile; ++i) {
      const int y = i % 2 ? window.high[i / 2] : window.low[i / 2];
      if (y <= done) continue;
      done = y;
      const T* row = map + y * row_stride;
      if (vectors) {
        for (int x = first; x < last_start; x += kLanes) {
          const Floats taps = load_floats(row + x);
          unordered |= taps != taps;
          low = min(low, taps);
          high = max(high, taps);
        }
        const Floats taps = load_floats(row + last_start);
        unordered |= (taps != taps) & in_window;
        low = min(low, select(in_window, taps, low));
        high = max(high, select(in_window, taps, high));
      } else {
        for (int x = first; x <= last; ++x) {
          const float tap = load_float(row + x * column_stride);
          scalar_nan |= tap != tap;
          scalar_low = tap < scalar_low ? tap : scalar_low;
          scalar_high = tap > scalar_high ? tap : scalar_high;
        }
      }
    }
    least[query] = vectors ? -highest(-low) : scalar_low;
    largest[query] = vectors ? highest(high) : scalar_high;
  }
  for (int lane = 0; lane < kLanes; ++lane) scalar_nan |= unordered[lane] != 0;
  return !scalar_nan;
}

template <class T>
void fill_masks(const SemanticImage& image, const Window& window, const int32_t* queries, int count, unsigned panels,
                float* masks, int64_t panel_stride) {
  if (window.narrow) {
    fill_masks<true, T>(image, window, queries, count, panels, masks, panel_stride);
  } else {
    fill_masks<false, T>(image, window, queries, count, panels, masks, panel_stride);
  }
}

// Mask probabilities of some queries, in some of the tile's panels (a bit each) -> masks [panel, query, pixel].
void fill_masks(const SemanticImage& image, const Window& window, const int32_t* queries, int count, unsigned panels,
                float* masks, int64_t panel_stride) {
  switch (image.mask_type) {
    case FloatType::float32: return fill_masks<float>(image, window, queries, count, panels, masks, panel_stride);
    case FloatType::bfloat16: return fill_masks<BFloat16>(image, window, queries, count, panels, masks, panel_stride);
    case FloatType::float16: return fill_masks<Float16>(image, window, queries, count, panels, masks, panel_stride);
  }
}

bool find_ranges(const SemanticImage& image, const Window& window, float* least, float* largest) {
  switch (image.mask_type) {
    case FloatType::float32: return find_ranges<float>(image, window, least, largest);
    case FloatType::bfloat16: return find_ranges<BFloat16>(image, window, least, largest);
    case FloatType::float16: return find_ranges<Float16>(image, window, least, largest);
  }
  return false;
}

}  // namespace
}  // namespace MF_ISA
}  // namespace maskformer_fast
