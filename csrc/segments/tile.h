// Tiles of resampled logits: bounds, taps, and the logits of a vector of pixels. Part of kernels.cpp.
#pragma once

#include "common/simd.h"
#include "segments/kernels.h"

namespace maskformer_fast {
namespace MF_ISA {
namespace {

static_assert(kTapSlack >= 2 * kLanes, "expand_rows reads past the taps");

struct Bounds {
  float low, high;
};

MF_INLINE Floats clamp_logit(Floats x) {  // NaN becomes the least
  return min(max(x, broadcast(-kLargestLogit)), broadcast(kLargestLogit));
}
MF_INLINE float clamp_logit(float x) {
  const float raised = x > -kLargestLogit ? x : -kLargestLogit;
  return raised < kLargestLogit ? raised : kLargestLogit;
}
MF_INLINE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

// Covers positions 0..count-1: calls vector(at) for vectors, the last of which may overlap the one before, or
// element(at) for each position where `count` is less than a vector.
template <class Vector, class Element>
MF_INLINE void cover(int64_t count, const Vector& vector, const Element& element) {
  if (count < kLanes) {
    for (int64_t at = 0; at < count; ++at) element(at);
    return;
  }
  for (int64_t at = 0; at < count; at += kLanes) vector(at + kLanes <= count ? at : count - kLanes);
}

// Computes the bounds, at each map column, of the rows that a row of tiles reads: low and high [columns].
void bound_columns(const MaskLogits& logits, const float* map, int64_t tile_row, float* low, float* high) {
  const int32_t* rows = logits.vertical.taps + tile_row * 2 * kTileRows;
  const int count = logits.vertical.counts[tile_row];
  cover(
      logits.columns,
      [&](int64_t at) {
        Floats lows = clamp_logit(load(map + rows[0] * logits.row_stride + at)), highs = lows;
        for (int r = 1; r < count; ++r) {
          const Floats value = clamp_logit(load(map + rows[r] * logits.row_stride + at));
          lows = min(lows, value);
          highs = max(highs, value);
        }
        store(low + at, lows);
        store(high + at, highs);
      },
      [&](int64_t at) {
        low[at] = high[at] = clamp_logit(map[rows[0] * logits.row_stride + at]);
        for (int r = 1; r < count; ++r) {
          const float value = clamp_logit(map[rows[r] * logits.row_stride + at]);
          low[at] = value < low[at] ? value : low[at];
          high[at] = value > high[at] ? value : high[at];
        }
      });
}

// Returns the bounds of one tile, from the bounds of its row of tiles by bound_columns.
MF_INLINE Bounds bound_tile(const MaskLogits& logits, int64_t tile_column, const float* low, const float* high) {
  const int32_t* columns = logits.horizontal.taps + tile_column * 2 * kTileColumns;
  const int count = logits.horizontal.counts[tile_column], run = logits.horizontal.runs[tile_column];
  Floats lows = broadcast(kLargestLogit), highs = broadcast(-kLargestLogit);
  Bounds others{kLargestLogit, -kLargestLogit};
  const auto include = [&](int64_t at) {
    const float l = low[columns[at]], h = high[columns[at]];
    others = {l < others.low ? l : others.low, h > others.high ? h : others.high};
  };
  cover(
      run,
      [&](int64_t at) {
        lows = min(lows, load(low + columns[0] + at));
        highs = max(highs, load(high + columns[0] + at));
      },
      include);
  for (int at = run; at < count; ++at) include(at);
  if (run < kLanes) return others;
  const float low_run = -highest(-lows), high_run = highest(highs);
  return {low_run < others.low ? low_run : others.low, high_run > others.high ? high_run : others.high};
}

// Copies the logits that a tile reads of one query's map to scratch.taps, clamped.
void read_taps(const MaskLogits& logits, const float* map, int64_t tile_row, int64_t tile_column,
               TileScratch& scratch) {
  const int32_t* rows = logits.vertical.taps + tile_row * 2 * kTileRows;
  const int32_t* columns = logits.horizontal.taps + tile_column * 2 * kTileColumns;
  const int count = logits.horizontal.counts[tile_column], run = logits.horizontal.runs[tile_column];
  for (int r = 0; r < logits.vertical.counts[tile_row]; ++r) {
    const float* source = map + rows[r] * logits.row_stride;
    float* taps = scratch.taps[r];
    const auto copy = [&](int64_t at) { taps[at] = clamp_logit(source[columns[at]]); };
    cover(run, [&](int64_t at) { store(taps + at, clamp_logit(load(source + columns[0] + at))); }, copy);
    for (int at = run; at < count; ++at) copy(at);
  }
}

// Resamples scratch.taps along the columns to scratch.rows.
void expand_rows(const MaskLogits& logits, int64_t tile_row, int64_t tile_column, TileScratch& scratch) {
  const int32_t* left = logits.horizontal.left + tile_column * kTileColumns;
  const float* weight = logits.horizontal.weight + tile_column * kTileColumns;
  const int count = logits.vertical.counts[tile_row];
  for (int v = 0; v < kTileColumns; v += kLanes) {
    const Floats weights = load(weight + v);
    const int first = left[v];
    if (left[v + kLanes - 1] - first < kLanes) {  // one vector holds all taps, as in upsampling
      const Ints lanes = load_ints(left + v) - first;
      for (int r = 0; r < count; ++r) {
        const Floats a = permute(load(scratch.taps[r] + first), lanes);
        const Floats b = permute(load(scratch.taps[r] + first + 1), lanes);
        store(scratch.rows[r] + v, a + weights * (b - a));
      }
    } else {
      for (int r = 0; r < count; ++r) {
        for (int l = v; l < v + kLanes; ++l) {
          const float a = scratch.taps[r][left[l]], b = scratch.taps[r][left[l] + 1];
          scratch.rows[r][l] = a + weight[l] * (b - a);
        }
      }
    }
  }
}

// Pixels of one tile of the output. logit_at computes their logits once the query's rows are expanded.
struct Tile {
  int64_t top, left;
  int rows, columns;
  const int32_t* upper;  // [rows], first of the two expanded rows that a row of pixels lies between
  const float* weight;   // [rows], share of the second

  Tile(const MaskLogits& logits, int64_t tile_row, int64_t tile_column)
      : top(tile_row * kTileRows),
        left(tile_column * kTileColumns),
        rows(static_cast<int>(least(kTileRows, logits.vertical.size - top))),
        columns(static_cast<int>(least(kTileColumns, logits.horizontal.size - left))),
        upper(logits.vertical.left + top),
        weight(logits.vertical.weight + top) {}

  int64_t pixels() const { return static_cast<int64_t>(rows) * columns; }
  int vectors() const { return (columns + kLanes - 1) / kLanes; }
};

MF_INLINE Floats logit_at(const TileScratch& scratch, const Tile& tile, int row, int column) {
  const Floats a = load(scratch.rows[tile.upper[row]] + column);
  const Floats b = load(scratch.rows[tile.upper[row] + 1] + column);
  return a + tile.weight[row] * (b - a);
}

// Returns the lanes of a vector that are pixels of the tile.
MF_INLINE Ints inside(const Tile& tile, int column) { return lane_numbers() < tile.columns - column; }

}  // namespace
}  // namespace MF_ISA
}  // namespace maskformer_fast
