// Mask probabilities of a tile from low-resolution logits. Part of kernels.cpp.
//
// Logits beyond +-1e30, infinite ones included, are clamped to it, so that interpolation never computes inf - inf. A
// tap at -inf makes every pixel that reads it 0, and between opposite infinities the nearer one wins.
#pragma once

#include "common/simd.h"
#include "semantic/kernels.h"

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

// Clamps to +-kLogitLimit. The limit is the first operand of min and max, so that NaN stays NaN.
MF_INLINE Floats limit_logits(Floats x) { return max(broadcast(-kLogitLimit), min(broadcast(kLogitLimit), x)); }

// Computes 1 / (1 + e^-x) within 4 units in the last place, and 0 below -87 (-126 log 2 with AVX-512). NaN stays NaN.
MF_INLINE Floats mask_probability(Floats x) {
#if defined(__AVX512F__)
  const Floats t = x * -1.44269504088896f;
  const Floats rounded = _mm512_roundscale_ps(t, _MM_FROUND_TO_NEAREST_INT);
  return 1.0f / (1.0f + (Floats)_mm512_scalef_ps(exp2_fraction(t - rounded), rounded));
#else
  return select(x >= -87.0f, sigmoid(x), x * 0.0f);
#endif
}

// Returns p[index[0]], p[index[1]], ...
MF_INLINE Floats gather(const float* p, Ints index) {
#if defined(__AVX512F__)
  return _mm512_mask_i32gather_ps(_mm512_setzero_ps(), 0xffff, (__m512i)index, p, 4);
#elif defined(__AVX2__)
  return _mm256_mask_i32gather_ps(_mm256_setzero_ps(), p, (__m256i)index, (__m256)broadcast(int32_t{-1}), 4);
#else
  Floats y;
  for (int lane = 0; lane < kLanes; ++lane) y[lane] = p[index[lane]];
  return y;
#endif
}

// Whether any lane of a comparison's result is set.
MF_INLINE bool any(Ints mask) {
#if defined(__AVX512F__)
  return _mm512_test_epi32_mask((__m512i)mask, (__m512i)mask) != 0;
#elif defined(__AVX2__)
  return _mm256_movemask_epi8((__m256i)mask) != 0;
#else
  int32_t set = 0;
  for (int lane = 0; lane < kLanes; ++lane) set |= mask[lane];
  return set != 0;
#endif
}

// Returns a mask of lanes 0..count-1.
MF_INLINE Ints first_lanes(int count) { return lane_numbers() < count; }

// Map positions and weights that the pixels of a tile read in the maps of one group. Pixels beyond the output repeat its last row and column.
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

static_assert(sizeof(Window) <= sizeof(float) * kPositionFloats, "room for the map positions");

MF_INLINE Window find_window(const SemanticImage& image, const MaskGroup& group, int top, int left) {
  Window window;
  window.top = top;
  window.left = left;
  window.height = image.height - top < kTile ? image.height - top : kTile;
  window.width = image.width - left < kTile ? image.width - left : kTile;
  for (int i = 0; i < kTile; ++i) {
    const int y = top + (i < window.height ? i : window.height - 1);
    const int x = left + (i < window.width ? i : window.width - 1);
    window.low[i] = group.rows.low[y];
    window.high[i] = group.rows.high[y];
    window.high_share[i] = group.rows.share[y];
    window.low_share[i] = 1.0f - group.rows.share[y];
    window.column_low[i] = group.columns.low[x];
    window.column_high[i] = group.columns.high[x];
    window.column_high_share[i] = group.columns.share[x];
    window.column_low_share[i] = 1.0f - group.columns.share[x];
  }
  window.first_column = window.column_low[0];
  window.last_column = window.column_high[kTile - 1];
  window.narrow = image.map_width >= kLanes && image.mask_column_stride == 1;
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

// Part of a Window for one vector of pixels of a row.
struct Columns {
  int start;
  Ints lane_low, lane_high;
  Floats low_share, high_share;
  const int32_t *low, *high;
};

MF_INLINE Columns find_columns(const Window& window, int v) {
  const int i = v * kLanes;
  return {window.start[v],
          load_ints(window.lane_low + i),
          load_ints(window.lane_high + i),
          load(window.column_low_share + i),
          load(window.column_high_share + i),
          window.column_low + i,
          window.column_high + i};
}

// Interpolates one row of a map at a vector of pixels. In a * (1 - t) + b * t each step rounds monotonically, so the
// result is monotone in the taps.
template <bool kNarrow, class T>
MF_INLINE Floats interpolate(const T* row, int64_t stride, const Columns& columns) {
  Floats low, high;
  if (kNarrow) {
    const Floats taps = limit_logits(load_floats(row + columns.start));
    low = permute(taps, columns.lane_low);
    high = permute(taps, columns.lane_high);
  } else {
    float a[kLanes], b[kLanes];
    for (int lane = 0; lane < kLanes; ++lane) {
      a[lane] = load_float(row + columns.low[lane] * stride);
      b[lane] = load_float(row + columns.high[lane] * stride);
    }
    low = limit_logits(load(a));
    high = limit_logits(load(b));
  }
  return low * columns.low_share + high * columns.high_share;
}

template <bool kNarrow, class T>
void fill_masks(const SemanticImage& image, int group, const Window& window, const int32_t* queries, int count,
                unsigned rows, float* masks, int64_t panel_stride) {
  const int64_t row_stride = image.mask_row_stride, column_stride = image.mask_column_stride;
  struct Row {
    int64_t out;
    int low, high;  // indices into `taps`
    float low_share, high_share;
  } wanted[kTile];
  int64_t taps[2 * kTile];  // distinct rows of the maps, as offsets in elements
  int tap_count = 0, last_tap = -1, wanted_count = 0;
  for (int y = 0; y < kTile; ++y) {
    if (!(rows >> y & 1)) continue;
    Row& row = wanted[wanted_count++];
    row.out = y / kPanelRows * panel_stride + y % kPanelRows * kTile;
    row.low_share = window.low_share[y];
    row.high_share = window.high_share[y];
    const int difference = last_tap - window.low[y];  // 1: `low` is the last tap but one
    if (tap_count == 0 || difference < 0) taps[tap_count++] = window.low[y] * row_stride;
    row.low = difference == 1 && tap_count > 1 ? tap_count - 2 : tap_count - 1;
    if (window.high[y] != window.low[y] && !(difference == 1)) taps[tap_count++] = window.high[y] * row_stride;
    row.high = tap_count - 1;
    last_tap = window.high[y];
  }
  for (int v = 0; v < kRowVectors; ++v) {
    const Columns columns = find_columns(window, v);
    for (int i = 0; i < count; ++i) {
      const int query = queries[i] - group * image.group_queries;
      const T* map = static_cast<const T*>(image.groups[group].masks) + query * image.mask_query_stride;
      float* out = masks + int64_t(i) * kPanelPixels + v * kLanes;
      Floats tap_rows[2 * kTile];
      for (int k = 0; k < tap_count; ++k) tap_rows[k] = interpolate<kNarrow>(map + taps[k], column_stride, columns);
      for (int k = 0; k < wanted_count; ++k) {
        const Row& row = wanted[k];
        store(out + row.out,
              mask_probability(tap_rows[row.low] * row.low_share + tap_rows[row.high] * row.high_share));
      }
    }
  }
}

template <class T>
void fill_masks(const SemanticImage& image, const Window* windows, const int32_t* queries, int count, unsigned rows,
                float* masks, int64_t panel_stride) {
  for (int i = 0, n; i < count; i += n) {  // queries ascend: those of a group are adjacent
    const int group = queries[i] / image.group_queries, end = (group + 1) * image.group_queries;
    for (n = 1; i + n < count && queries[i + n] < end;) ++n;
    const Window& window = windows[group * kStripTiles];
    const auto fill = window.narrow ? fill_masks<true, T> : fill_masks<false, T>;
    fill(image, group, window, queries + i, n, rows, masks + int64_t(i) * kPanelPixels, panel_stride);
  }
}

// Writes the mask probabilities of some queries, in the tile's rows whose bits are set, to masks [panel, query, pixel].
// `windows` has the tile's positions in each group, kStripTiles apart.
void fill_masks(const SemanticImage& image, const Window* windows, const int32_t* queries, int count, unsigned rows,
                float* masks, int64_t panel_stride) {
  switch (image.mask_type) {
    case FloatType::float32: return fill_masks<float>(image, windows, queries, count, rows, masks, panel_stride);
    case FloatType::bfloat16: return fill_masks<BFloat16>(image, windows, queries, count, rows, masks, panel_stride);
    case FloatType::float16: return fill_masks<Float16>(image, windows, queries, count, rows, masks, panel_stride);
  }
}

}  // namespace
}  // namespace MF_ISA
}  // namespace maskformer_fast
