// Kernels of the matching cost of maps, compiled once for each instruction set (common/cpu_isa.h).
//
// Lanes are queries: a row of the maps of kMapQueries queries is transposed, so that a point reads four neighbouring
// vectors. Points are in the order of their rows, of which two are in the first-level cache at a time.
#pragma once

#include <cstdint>

#include "common/cpu_isa.h"
#include "common/focal_loss.h"

namespace maskformer_fast {

constexpr int kMapQueries = 16;
constexpr int64_t kMapPoints = 128;  // whose values stay in the first-level cache

// Points of an image in the order of their rows.
struct SortedPoints {
  const int32_t *row, *column;  // upper left neighbour: rows -1..height, columns -1..width
  const float *low, *right;     // shares of the lower and right neighbours
};

// Values of some points, a row for each. In the first-level cache there is room for two rows and not for three.
struct MapValues {
  float rise[kMapPoints][kMapQueries];  // the logit at first, then the loss with the target on less that with it off
  float probability[kMapPoints][kMapQueries];
};

// A target and the points where it is not 0.
struct TargetPoints {
  int32_t target, count;
  const int32_t* numbers;
  const float* truth;
};

// Sums over points of each query.
struct MapSums {
  double probability[kMapQueries];
  double off_loss[kMapQueries];  // loss with the target off
  double broken[kMapQueries];    // zeros where all logits are finite, else NaN
};

// Sums over points of each query with one target.
struct MapPairSums {
  double probability[kMapQueries];
  double rise[kMapQueries];
};

MF_DECLARE_KERNELS(
    // Transposes a row of `queries` maps that are `stride` apart to [width, kMapQueries]; missing queries are 0.
    void transpose_row(const float* maps, int64_t stride, int64_t queries, int64_t width, float* row);
    void transpose_row(const uint16_t* maps, int64_t stride, int64_t queries, int64_t width, float* row);

    // Samples `count` points of one row. Rows have a border of a zero column before and of two behind.
    void sample_rows(const float* upper, const float* lower, const SortedPoints& points, int64_t first, int64_t count,
                     float* logits);

    // Replaces the logits of `count` points by probabilities and losses, and adds them up.
    void add_map_losses(MapValues& values, int64_t count, const FocalLoss& loss, MapSums& sums);

    // Adds the products of values and the truth [count, targets].
    void add_map_products(const MapValues& values, const float* truth, int64_t count, int64_t targets,
                          MapPairSums* pairs);

    // Adds the same of some targets, whose truth is 0 at most points.
    void add_sparse_products(const MapValues& values, const TargetPoints* targets, int64_t count, MapPairSums* pairs);)

}  // namespace maskformer_fast
