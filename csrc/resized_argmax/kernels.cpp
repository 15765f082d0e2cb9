#include "resized_argmax/kernels.h"

#include "common/simd.h"

namespace maskformer_fast {
namespace MF_ISA {
namespace {

constexpr float kLeast = -3e38f;  // below every value, and finite: differences of it are 0

struct Corners {
  const float* at[4];  // upper left, upper right, lower left, lower right

  Corners() = default;
  Corners(const ScoreGrid& grid, int64_t row, int64_t column) {
    const int64_t below = grid.first_row + row + 1 < grid.grid_rows ? row + 1 : row;
    const int64_t right = column + 1 < grid.columns ? column + 1 : column;
    const int64_t points[4] = {row * grid.columns + column, row * grid.columns + right, below * grid.columns + column,
                               below * grid.columns + right};
    for (int k = 0; k < 4; ++k) {
      const int64_t index = grid.score_of_point ? grid.score_of_point[points[k]] : points[k];
      at[k] = grid.scores + index * grid.pitch;
    }
  }

  MF_INLINE Floats least(const Corners& c, int64_t v) {
    return min(min(load(c.at[0] + v), load(c.at[1] + v)), min(load(c.at[2] + v), load(c.at[3] + v)));
  }
  MF_INLINE Floats largest(const Corners& c, int64_t v) {
    return max(max(load(c.at[0] + v), load(c.at[1] + v)), max(load(c.at[2] + v), load(c.at[3] + v)));
  }
};

// Returns the lanes of a vector that are channels.
MF_INLINE Ints present(int64_t v, int64_t channels) {
  const int64_t left = channels - v;
  return lane_numbers() < static_cast<int32_t>(left < kLanes ? left : kLanes);
}

// Corners of a cell of the coarse grid.
MF_INLINE Corners coarse_corners(const CoarseGrid& coarse, int64_t row, int64_t column, int64_t pitch) {
  const int64_t below = row + 1 < coarse.rows ? row + 1 : row;
  const int64_t right = column + 1 < coarse.columns ? column + 1 : column;
  const float* upper = coarse.values + row * coarse.columns * pitch;
  const float* lower = coarse.values + below * coarse.columns * pitch;
  Corners corners;
  corners.at[0] = upper + column * pitch, corners.at[1] = upper + right * pitch;
  corners.at[2] = lower + column * pitch, corners.at[3] = lower + right * pitch;
  return corners;
}

template <ArgmaxKind kind>
MF_INLINE Floats rank(Floats value, const float* scale) {
  if constexpr (kind == ArgmaxKind::sigmoids) return load(scale) * sigmoid(value);
  return value;
}

// Pixels of one cell, and the channels that are computed there: their corners, compacted.
struct Cell {
  int64_t y0, y1, x0, x1;
  const float* row_share;
  const float* column_share;
  int64_t pixels() const { return (y1 - y0) * (x1 - x0); }
};

// Copies the corners of the listed channels to scratch and returns their number rounded up to vectors.
MF_INLINE int64_t compact(const Corners& corners, const int32_t* channels, int64_t count, const ArgmaxJob& job,
                          float* to) {
  const int64_t pitch = job.grid.pitch, padded = (count + kLanes - 1) / kLanes * kLanes;
  for (int64_t i = 0; i < padded; ++i) {
    const int64_t channel = i < count ? channels[i] : 0;
    for (int k = 0; k < 4; ++k) to[k * pitch + i] = i < count ? corners.at[k][channel] : kLeast;
    if (job.scale) to[6 * pitch + i] = i < count ? job.scale[channel] : -1.0f;
    if (job.own_value) to[7 * pitch + i] = i < count ? job.own_value[channel] : -kLeast;
  }
  return padded;
}

// Values of the compacted channels at the left edge of a row of pixels, and their change to the right edge.
MF_INLINE void start_row(float* corners, int64_t pitch, int64_t padded, float share) {
  for (int64_t i = 0; i < padded; i += kLanes) {
    const Floats a = load(corners + i), b = load(corners + pitch + i);
    const Floats left = a + share * (load(corners + 2 * pitch + i) - a);
    const Floats right = b + share * (load(corners + 3 * pitch + i) - b);
    store(corners + 4 * pitch + i, left);
    store(corners + 5 * pitch + i, right - left);
  }
}

MF_INLINE Floats value_at(const float* corners, int64_t pitch, int64_t i, float share) {
  return load(corners + 4 * pitch + i) + share * load(corners + 5 * pitch + i);
}

// Returns the number among the compacted channels of the first with the highest rank.
template <ArgmaxKind kind>
MF_INLINE int64_t first_highest(const float* corners, int64_t pitch, int64_t padded, float share) {
  Floats best = rank<kind>(value_at(corners, pitch, 0, share), corners + 6 * pitch);
  if (padded == kLanes) {
    const uint64_t bits = lane_bits(best == broadcast(highest(best)));
    return bits ? __builtin_ctzll(bits) : 0;
  }
  Ints vector{};
  for (int64_t i = kLanes; i < padded; i += kLanes) {
    const Floats value = rank<kind>(value_at(corners, pitch, i, share), corners + 6 * pitch + i);
    const Ints better = value > best;
    best = select(better, value, best);
    vector = select(better, broadcast(static_cast<int32_t>(i)), vector);
  }
  const Ints number = vector + lane_numbers();
  int64_t first = padded;
  for (uint64_t bits = lane_bits(best == broadcast(highest(best))); bits; bits &= bits - 1) {
    const int32_t lane = number[__builtin_ctzll(bits)];
    first = lane < first ? lane : first;
  }
  return first < padded ? first : 0;
}

template <class Label>
MF_INLINE void fill(const Cell& cell, int64_t width, Label* labels, Label label) {
  for (int64_t y = cell.y0; y < cell.y1; ++y) {
    Label* row = labels + y * width;
    for (int64_t x = cell.x0; x < cell.x1; ++x) row[x] = label;
  }
}

// Returns what is decided in all cells of the coarse grid that a cell of the finer grid touches, or -1.
MF_INLINE int32_t decided_around(const ArgmaxJob& job, int64_t row, int64_t column) {
  const CoarseGrid& coarse = *job.coarse;
  const int64_t below = row + 1 < job.grid.grid_rows ? row + 1 : row;
  const int64_t right = column + 1 < job.grid.columns ? column + 1 : column;
  const int32_t* upper = coarse.decided + coarse.row[row] * coarse.columns;
  const int32_t* lower = coarse.decided + coarse.row[below] * coarse.columns;
  const int32_t first = coarse.column[column], second = coarse.column[right], code = upper[first];
  return upper[second] == code && lower[first] == code && lower[second] == code ? code : -1;
}

// Writes the values of all channels at a point of the finer grid.
template <ArgmaxKind kind>
MF_INLINE void resize_point(const ArgmaxJob& job, int64_t row, int64_t column, float* to) {
  const CoarseGrid& coarse = *job.coarse;
  const Corners corners = coarse_corners(coarse, coarse.row[row], coarse.column[column], job.grid.pitch);
  const float down = coarse.row_share[row], across = coarse.column_share[column];
  for (int64_t v = 0; v < job.grid.channels; v += kLanes) {
    const Floats a = load(corners.at[0] + v), c = load(corners.at[2] + v);
    const Floats upper = a + across * (load(corners.at[1] + v) - a);
    const Floats lower = c + across * (load(corners.at[3] + v) - c);
    const Floats value = upper + down * (lower - upper);
    store(to + v, kind == ArgmaxKind::masks ? load(job.scale + v) * sigmoid(value) : value);
  }
}

// Corners of the cells of a row of the finer grid, from left to right; the right ones of a cell are kept for the next.
struct ResizedCorners {
  int64_t last = -2;  // column of the cell before
  bool swapped = false;
};

template <ArgmaxKind kind>
MF_INLINE Corners resize_corners(const ArgmaxJob& job, int64_t row, int64_t column, float* points,
                                 ResizedCorners& state) {
  const int64_t pitch = job.grid.pitch, below = row + 1 < job.grid.grid_rows ? row + 1 : row;
  const int64_t right = column + 1 < job.grid.columns ? column + 1 : column;
  if (state.last + 1 == column) {
    state.swapped = !state.swapped;
  } else {
    float* left = points + (state.swapped ? 2 * pitch : 0);
    resize_point<kind>(job, row, column, left);
    resize_point<kind>(job, below, column, left + pitch);
  }
  float *left = points + (state.swapped ? 2 * pitch : 0), *next = points + (state.swapped ? 0 : 2 * pitch);
  resize_point<kind>(job, row, right, next);
  resize_point<kind>(job, below, right, next + pitch);
  state.last = column;
  Corners corners;
  corners.at[0] = left, corners.at[1] = next, corners.at[2] = left + pitch, corners.at[3] = next + pitch;
  return corners;
}

template <class Label, ArgmaxKind kind, bool resized>
MF_INLINE void label_row(const ArgmaxJob& job, int64_t row, ArgmaxScratch& scratch) {
  constexpr bool counted = kind != ArgmaxKind::scores, only_own = kind == ArgmaxKind::sigmoids;
  const ScoreGrid& grid = job.grid;
  const int64_t pitch = grid.pitch, grid_row = grid.first_row + row;
  Label* labels = static_cast<Label*>(job.labels);
  Cell cell{job.vertical.start[grid_row], job.vertical.start[grid_row + 1], 0, 0, job.vertical.share,
            job.horizontal.share};
  if (cell.y0 == cell.y1) return;
  const int32_t* decided = job.decided ? job.decided + row * grid.columns : nullptr;
  ResizedCorners state;
  for (int64_t column = 0; column < grid.columns; ++column) {
    if constexpr (resized) {
      const int32_t code = decided_around(job, row, column);
      if (code >= 0) {
        int64_t end = column + 1;
        while (end < grid.columns && decided_around(job, row, end) == code) ++end;
        cell.x0 = job.horizontal.start[column];
        cell.x1 = job.horizontal.start[end];
        const int32_t winner = code / 2;
        const int64_t owned = code % 2 * cell.pixels();
        scratch.won[winner] += cell.pixels();
        scratch.owned[winner] += owned;
        if constexpr (only_own) scratch.both[winner] += owned;
        fill<Label>(cell, job.width, labels, only_own && code % 2 == 0 ? -1 : winner);
        column = end - 1;
        continue;
      }
    }
    cell.x0 = job.horizontal.start[column];
    cell.x1 = job.horizontal.start[column + 1];
    if (decided && decided[column] >= 0) {
      const int32_t label = decided[column];
      int64_t end = column + 1;
      while (end < grid.columns && decided[end] == label) ++end;
      cell.x1 = job.horizontal.start[end];
      fill<Label>(cell, job.width, labels, label);
      column = end - 1;
      continue;
    }
    if (cell.x0 == cell.x1) continue;
    const Corners corners = resized ? resize_corners<kind>(job, row, column, scratch.points, state)
                                    : Corners(grid, row, column);
    Floats lows = broadcast(kLeast);
    for (int64_t v = 0; v < grid.channels; v += kLanes) {
      const Floats low = rank<kind>(Corners::least(corners, v), job.scale + v);
      lows = max(select(present(v, grid.channels), low, lows), lows);
    }
    const Floats least = broadcast(highest(lows));
    int64_t candidates = 0, partial = 0;
    for (int64_t v = 0; v < grid.channels; v += kLanes) {
      const Floats high = Corners::largest(corners, v);
      const Ints in = present(v, grid.channels);
      for (uint64_t bits = lane_bits((rank<kind>(high, job.scale + v) >= least) & in); bits; bits &= bits - 1) {
        scratch.candidates[candidates++] = static_cast<int32_t>(v + __builtin_ctzll(bits));
      }
      if constexpr (counted) {
        const Floats own = load(job.own_value + v);
        const uint64_t some = lane_bits((high >= own) & in);
        if (some == 0) continue;
        const uint64_t all = some & lane_bits(Corners::least(corners, v) >= own);
        for (uint64_t bits = all; bits; bits &= bits - 1) scratch.owned[v + __builtin_ctzll(bits)] += cell.pixels();
        for (uint64_t bits = some & ~all; bits; bits &= bits - 1) {
          scratch.partial[partial++] = static_cast<int32_t>(v + __builtin_ctzll(bits));
        }
      }
    }
    if (candidates == 0) scratch.candidates[candidates++] = 0;  // NaN
    const int32_t first = scratch.candidates[0];
    bool single = candidates == 1;
    if constexpr (counted) {
      if (partial > 0) {
        const int64_t padded = compact(corners, scratch.partial, partial, job, scratch.corners);
        for (int64_t i = 0; i < padded; i += kLanes) {
          Ints count{};
          for (int64_t y = cell.y0; y < cell.y1; ++y) {
            start_row(scratch.corners, pitch, padded, cell.row_share[y]);
            for (int64_t x = cell.x0; x < cell.x1; ++x) {
              count -= value_at(scratch.corners, pitch, i, cell.column_share[x]) >=
                       load(scratch.corners + 7 * pitch + i);
            }
          }
          for (int lane = 0; lane < kLanes && i + lane < partial; ++lane) {
            scratch.owned[scratch.partial[i + lane]] += count[lane];
          }
        }
      }
      if (only_own && single) {
        float low = corners.at[0][first], high = low;
        for (int k = 1; k < 4; ++k) {
          low = corners.at[k][first] < low ? corners.at[k][first] : low;
          high = corners.at[k][first] > high ? corners.at[k][first] : high;
        }
        const bool all = low >= job.own_value[first];
        if (all || !(high >= job.own_value[first])) {
          scratch.won[first] += cell.pixels();
          if (all) scratch.both[first] += cell.pixels();
          fill<Label>(cell, job.width, labels, all ? first : -1);
          continue;
        }
        single = false;
      }
    }
    if (single) {
      if constexpr (counted) scratch.won[first] += cell.pixels();
      fill<Label>(cell, job.width, labels, first);
      continue;
    }
    const int64_t padded = compact(corners, scratch.candidates, candidates, job, scratch.corners);
    for (int64_t y = cell.y0; y < cell.y1; ++y) {
      start_row(scratch.corners, pitch, padded, cell.row_share[y]);
      for (int64_t x = cell.x0; x < cell.x1; ++x) {
        const float share = cell.column_share[x];
        const int64_t place = first_highest<kind>(scratch.corners, pitch, padded, share);
        const int32_t winner = scratch.candidates[place < candidates ? place : 0];
        bool own = true;
        if constexpr (counted) ++scratch.won[winner];
        if constexpr (only_own) {
          own = scratch.corners[4 * pitch + place] + share * scratch.corners[5 * pitch + place] >=
                scratch.corners[7 * pitch + place];
          scratch.both[winner] += own;
        }
        labels[y * job.width + x] = own ? winner : -1;
      }
    }
  }
}

}  // namespace

void label_cells(const ArgmaxJob& job, int64_t row, ArgmaxScratch& scratch) {
  switch (job.kind) {
    case ArgmaxKind::scores:
      return label_row<int64_t, ArgmaxKind::scores, false>(job, row, scratch);
    case ArgmaxKind::masks:
      return job.coarse ? label_row<int32_t, ArgmaxKind::masks, true>(job, row, scratch)
                        : label_row<int32_t, ArgmaxKind::masks, false>(job, row, scratch);
    case ArgmaxKind::sigmoids:
      return job.coarse ? label_row<int64_t, ArgmaxKind::sigmoids, true>(job, row, scratch)
                        : label_row<int64_t, ArgmaxKind::sigmoids, false>(job, row, scratch);
  }
}

void decide_winners(const ArgmaxJob& job, int64_t row) {
  constexpr float kRounding = 1e-5f;  // relative; where a value is as near to another it is computed
  const CoarseGrid& coarse = *job.coarse;
  const int64_t channels = job.grid.channels;
  const bool masks = job.kind == ArgmaxKind::masks;
  for (int64_t column = 0; column < coarse.columns; ++column) {
    const Corners corners = coarse_corners(coarse, row, column, job.grid.pitch);
    Floats lows = broadcast(kLeast);
    for (int64_t v = 0; v < channels; v += kLanes) {
      const Floats low = rank<ArgmaxKind::sigmoids>(Corners::least(corners, v), job.scale + v);
      lows = max(select(present(v, channels), low, lows), lows);
    }
    const Floats least = broadcast(highest(lows) * (1.0f - kRounding));
    int32_t code = -1;
    bool several = false;
    for (int64_t v = 0; v < channels && !several; v += kLanes) {
      const Ints in = present(v, channels);
      const Floats value = Corners::largest(corners, v), low = Corners::least(corners, v);
      const Floats high = rank<ArgmaxKind::sigmoids>(value, job.scale + v), own = load(job.own_value + v);
      const Floats slack = kRounding * max(max(own, -own), broadcast(1.0f));
      const uint64_t rivals = lane_bits((high >= least) & in);
      const uint64_t owners = lane_bits(((masks ? high : value) >= own - slack) & in);
      if ((rivals | owners) == 0) continue;
      const Floats sure = masks ? rank<ArgmaxKind::sigmoids>(low, job.scale + v) : low;
      const uint64_t all = lane_bits((sure >= own + slack) & in);
      several = code >= 0 || (rivals & (rivals - 1)) != 0 || (owners & ~(all & rivals)) != 0;
      if (rivals) code = 2 * (static_cast<int32_t>(v) + __builtin_ctzll(rivals)) + (owners != 0);
    }
    coarse.decided[row * coarse.columns + column] = several ? -1 : code;
  }
}

void decide_cells(const DecideJob& job, int64_t row) {
  const ScoreGrid& grid = job.grid;
  for (int64_t column = 0; column < grid.columns; ++column) {
    if (job.decided[row * grid.columns + column] >= 0) continue;
    const Corners corners(grid, row, column);
    Floats lows = broadcast(kLeast);
    for (int64_t v = 0; v < grid.channels; v += kLanes) {
      lows = max(select(present(v, grid.channels), Corners::least(corners, v), lows), lows);
    }
    const float least = highest(lows);
    int32_t label = -1;
    bool several = !(job.others < least);
    for (int64_t v = 0; v < grid.channels && !several; v += kLanes) {
      const Floats high = Corners::largest(corners, v) + load(job.slack + v);
      const uint64_t bits = lane_bits((high >= broadcast(least)) & present(v, grid.channels));
      if (bits == 0) continue;
      several = label >= 0 || (bits & (bits - 1)) != 0;
      label = job.labels[v + __builtin_ctzll(bits)];
    }
    job.decided[row * grid.columns + column] = several ? -1 : label;
  }
}

}  // namespace MF_ISA
}  // namespace maskformer_fast
