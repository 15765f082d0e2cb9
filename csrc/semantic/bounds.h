// Ranges of masks and bounds of scores in a tile, which decide what can be left out. Part of kernels.cpp.
#pragma once

#include "semantic/scratch.h"

namespace maskformer_fast {
namespace MF_ISA {
namespace {

constexpr int kRangeColumns = 512;  // most map columns of a strip whose ranges are computed with vectors

// Writes the least and the largest logit of a group's queries in each tile of a strip to [tile, all queries rounded up].
// Returns false if one of the logits is NaN. A query's rows are read once for the strip: the maps' addresses share few
// lines of the caches, so the rows would be evicted before the next tile.
template <class T>
bool find_ranges(const SemanticImage& image, const MaskGroup& group, const Window* windows, int tiles, float* least,
                 float* largest) {
  const int64_t row_stride = image.mask_row_stride, column_stride = image.mask_column_stride;
  const int64_t out_stride = round_up(image.queries + 1, 16);
  int rows[2 * kTile], count = 0;  // map rows that the tiles read, ascending
  for (int i = 0; i < 2 * kTile; ++i) {
    const int y = i % 2 ? windows->high[i / 2] : windows->low[i / 2];
    if (!count || y > rows[count - 1]) rows[count++] = y;
  }
  const int last_start = image.map_width - kLanes, last = windows[tiles - 1].last_column;
  const int base = windows->first_column < last_start ? windows->first_column : last_start;
  if (last_start < 0 || column_stride != 1 || last - base >= kRangeColumns) {
    bool valid = true;
    for (int query = 0; query < image.group_queries; ++query) {
      const T* map = static_cast<const T*>(group.masks) + query * image.mask_query_stride;
      for (int tile = 0; tile < tiles; ++tile) {
        float low = kInfinity, high = -kInfinity;
        for (int i = 0; i < count; ++i) {
          for (int64_t x = windows[tile].first_column; x <= windows[tile].last_column; ++x) {
            const float tap = load_float(map + rows[i] * row_stride + x * column_stride);
            valid = valid && tap == tap;
            low = tap < low ? tap : low;
            high = tap > high ? tap : high;
          }
        }
        least[tile * out_stride + query] = low;
        largest[tile * out_stride + query] = high;
      }
    }
    return valid;
  }
  // Ranges of each column. Queries alternate between two buffers, as a load that overlaps recent stores waits for them.
  float low_columns[2][kRangeColumns + 2 * kLanes] = {}, high_columns[2][kRangeColumns + 2 * kLanes] = {};
  Ints unordered{};
  for (int query = 0; query <= image.group_queries; ++query) {
    if (query < image.group_queries) {
      const T* map = static_cast<const T*>(group.masks) + query * image.mask_query_stride;
      const int ahead = query + 2 < image.group_queries ? query + 2 : query;  // no processor predicts these addresses
      const T* next = static_cast<const T*>(group.masks) + ahead * image.mask_query_stride;
      for (int x = base; x <= last; x += kLanes) {
        const int start = x < last_start ? x : last_start;
        Floats low = broadcast(kInfinity), high = broadcast(-kInfinity);
        for (int i = 0; i < count; ++i) {
          __builtin_prefetch(next + rows[i] * row_stride + start);
          const Floats taps = load_floats(map + rows[i] * row_stride + start);
          unordered |= taps != taps;
          low = min(low, taps);
          high = max(high, taps);
        }
        store(low_columns[query % 2] + start - base, low);
        store(high_columns[query % 2] + start - base, high);
      }
    }
    if (query == 0) continue;
    const int done = query - 1;
    for (int tile = 0; tile < tiles; ++tile) {
      const float* lows = low_columns[done % 2] - base;
      const float* highs = high_columns[done % 2] - base;
      Floats low = broadcast(kInfinity), high = broadcast(-kInfinity);
      for (int x = windows[tile].first_column; x <= windows[tile].last_column; x += kLanes) {
        const Ints inside = first_lanes(windows[tile].last_column + 1 - x);
        low = min(low, select(inside, load(lows + x), low));
        high = max(high, select(inside, load(highs + x), high));
      }
      least[tile * out_stride + done] = -highest(-low);
      largest[tile * out_stride + done] = highest(high);
    }
  }
  return !any(unordered);
}

// Does so for every group. `windows` has the tiles' positions in each group.
bool find_ranges(const SemanticImage& image, const Window* windows, int tiles, const Scratch& s) {
  bool valid = true;
  for (int group = 0; group * image.group_queries < image.queries; ++group, windows += kStripTiles) {
    const int64_t first = int64_t(group) * image.group_queries;
    const auto find = image.mask_type == FloatType::float32    ? find_ranges<float>
                      : image.mask_type == FloatType::bfloat16 ? find_ranges<BFloat16>
                                                               : find_ranges<Float16>;
    valid = find(image, image.groups[group], windows, tiles, s.least + first, s.largest + first) && valid;
  }
  return valid;
}

// Bounds the relative rounding error of a sum over queries. No term is negative, and adding one rounds by at most 2^-24
// of the sum so far. Without fused multiply-add the term itself is rounded too.
MF_INLINE float rounding(const SemanticImage& image) { return (image.queries + 16) * 0x1p-24f; }

// Computes s.middle, s.half and s.bound of every query in a tile from the range of its logits. Returns the largest
// bound.
//
// The computed interpolation is monotone in the taps. Of equal taps x it is within 6 * 2^-24 |x| of x: two axes with
// two products each and the rounding of 1 - t. The probability is within 4 units in the last place. So the computed
// mask of a pixel lies in [lo, hi], where logits and probabilities are both widened by 2^-20.
MF_INLINE float bound_queries(const SemanticImage& image, int tile, const Scratch& s) {
  const int64_t stride = round_up(image.queries + 1, 16);
  float* least = s.least + tile * stride;
  float* largest = s.largest + tile * stride;
  for (int q = image.queries; q < round_up(image.queries, kLanes); ++q) least[q] = largest[q] = -kInfinity;
  Floats top{};
  for (int q = 0; q < image.queries; q += kLanes) {
    const Floats low = limit_logits(load(least + q)), high = limit_logits(load(largest + q));
    const Floats lo = mask_probability(low - max(low, -low) * 0x1p-20f) * (1.0f - 0x1p-20f);
    const Floats hi = mask_probability(high + max(high, -high) * 0x1p-20f) * (1.0f + 0x1p-20f);
    const Floats bound = hi * load(image.largest + q);
    store(s.middle + q, 0.5f * (lo + hi));
    store(s.half + q, 0.5f * (hi - lo) + hi * 0x1p-22f);
    store(s.bound + q, bound);
    top = max(top, bound);
  }
  return highest(top);
}

// Returns the largest of 16 falling thresholds for which the weights up to it add up to at most `budget`, and writes
// that sum to `sum`. Returns -1 with a sum of 0 where none does.
float find_threshold(const SemanticImage& image, const float* weights, int count, float budget, float* sum) {
  constexpr int kThresholds = 16, kVectors = kThresholds / kLanes;
  float thresholds[kThresholds], sums[kThresholds];
  float threshold = budget;
  for (int i = 0; i < kThresholds; ++i, threshold *= 0.6f) thresholds[i] = threshold;
  for (int v = 0; v < kVectors; ++v) {
    const Floats limit = load(thresholds + v * kLanes);
    Floats even{}, odd{};
    int i = 0;
    for (; i + 1 < count; i += 2) {
      const Floats a = broadcast(weights[i]), b = broadcast(weights[i + 1]);
      even += select(a <= limit, a, Floats{});
      odd += select(b <= limit, b, Floats{});
    }
    if (i < count) even += select(broadcast(weights[i]) <= limit, broadcast(weights[i]), Floats{});
    store(sums + v * kLanes, (even + odd) * (1.0f + rounding(image)));
  }
  for (int i = 0; i < kThresholds; ++i) {
    *sum = sums[i];
    if (sums[i] <= budget) return thresholds[i];
  }
  *sum = 0.0f;
  return -1.0f;
}

// Bound of the absolute error of hundreds of sums below the least normal number, where rounding is not relative.
constexpr float kTiny = 1e-30f;

struct ClassBounds {
  Floats first, second;  // the two largest lower bounds of a score in each lane
};

// Bounds the scores of kVectors vectors of classes from c on.
template <int kVectors>
MF_INLINE void bound_class_vectors(const SemanticImage& image, const Scratch& s, int c, int live, float slack,
                                   ClassBounds& bounds) {
  const float error = rounding(image);
  Floats middle[kVectors]{}, half[kVectors]{};
  int32_t classes[kVectors * kLanes];
  const int count = image.classes - c < kVectors * kLanes ? image.classes - c : kVectors * kLanes;
  if (!image.probabilities) {
    for (int i = 0; i < count; ++i) classes[i] = c + i;
    for (int v = 0; v < kVectors; ++v) store(s.row + v * kLanes, broadcast(0.0f));
  }
  for (int i = 0; i < live; ++i) {
    const int q = s.live[i];
    const float* row = image.probabilities + q * image.probability_stride + c;
    if (!image.probabilities) {
      load_probabilities(image, q, classes, count, s.row);
      row = s.row;
    }
    const Floats query_middle = broadcast(s.middle[q]), query_half = broadcast(s.half[q]);
    for (int v = 0; v < kVectors; ++v) {
      const Floats p = load(row + v * kLanes);
      middle[v] += p * query_middle;
      half[v] += p * query_half;
    }
  }
  for (int v = 0; v < kVectors; ++v) {
    const Floats upper = (middle[v] + half[v]) * (1.0f + error) + (slack + kTiny);
    const Floats lower = middle[v] * (1.0f - error) - half[v] * (1.0f + error);
    store(s.upper + c + v * kLanes, upper);
    bounds.second = max(bounds.second, min(bounds.first, lower));
    bounds.first = max(bounds.first, lower);
  }
}

// Writes the classes that can win somewhere in the tile (with `runner_up`, or come second) to s.classes and returns
// their number. Live queries count with their ranges. `slack` bounds what the other queries add to a score.
MF_INLINE int bound_classes(const SemanticImage& image, const Scratch& s, int live, float slack, bool runner_up) {
  ClassBounds bounds{};
  int c = 0;
  for (; c + 4 * kLanes <= image.classes; c += 4 * kLanes) bound_class_vectors<4>(image, s, c, live, slack, bounds);
  for (; c < image.classes; c += kLanes) bound_class_vectors<1>(image, s, c, live, slack, bounds);
  float bar = highest(bounds.first);
  if (runner_up) {  // the second largest over all lanes
    float one = 0.0f, two = 0.0f;
    for (int lane = 0; lane < kLanes; ++lane) {
      const float pair[2] = {bounds.first[lane], bounds.second[lane]};
      for (const float x : pair) {
        const float lesser = x < one ? x : one;
        two = lesser > two ? lesser : two;
        one = x > one ? x : one;
      }
    }
    bar = two;
  }
  int count = 0;
  for (int v = 0; v < image.classes; v += kLanes) {
    if (!any(load(s.upper + v) >= bar)) continue;
    for (int i = v; i < v + kLanes && i < image.classes; ++i) {
      s.classes[count] = i;
      count += s.upper[i] >= bar;
    }
  }
  return count;
}

// Splits s.live: queries whose masks matter stay in it, and queries that their middles can replace go to s.dropped.
// Writes to `change` by how much the replacement may change the difference of two scores (with `values`, twice a
// score), which is at most `budget`.
MF_INLINE void choose_queries(const SemanticImage& image, const Scratch& s, float budget, int classes, bool values,
                              int* live, int* dropped, float* change) {
  for (int i = 0; i < *live; ++i) {
    const int q = s.live[i];
    float spread = image.largest[q];
    if (classes <= kClassBlock) {
      load_probabilities(image, q, s.classes, classes, s.row);
      Floats low = broadcast(kInfinity), high = broadcast(0.0f);
      for (int c = 0; c < classes; c += kLanes) {
        const Floats p = load(s.row + c);
        low = min(low, select(first_lanes(classes - c), p, low));
        high = max(high, p);
      }
      spread = values ? highest(high) : highest(high) + highest(-low);
    }
    s.weight[i] = (values ? 2.0f * spread : spread) * s.half[q] * (1.0f + 0x1p-20f);
  }
  const float cut = find_threshold(image, s.weight, *live, budget, change);
  int kept = 0;
  *dropped = 0;
  for (int i = 0; i < *live; ++i) {
    const int q = s.live[i];
    const bool keep = s.weight[i] > cut;
    s.dropped[*dropped] = q;
    *dropped += !keep;
    s.live[kept] = q;
    kept += keep;
  }
  *live = kept;
}

}  // namespace
}  // namespace MF_ISA
}  // namespace maskformer_fast
