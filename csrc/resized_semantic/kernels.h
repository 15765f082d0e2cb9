// Kernels of class scores at the points of a grid, compiled once for each instruction set (common/cpu_isa.h).
//
// A score is the sum over queries of weight times mask probability, and mask logits are resized to the grid. In a cell
// between four neighbouring logits every query lies between its least and its largest corner, so its probability lies
// between their sigmoids, and the score of a class between two sums of these.
#pragma once

#include <cstdint>

#include "common/cpu_isa.h"

namespace maskformer_fast {

struct BoundsJob {
  const float* logits;  // [any, rows, columns]
  int64_t rows, columns;
  const int32_t* queries;  // [kept]
  int64_t kept;
  const float* weights;  // [kept, pitch]
  int64_t classes, pitch;
  const float* slack;     // [classes], most that other queries add to each class
  float others;           // bound of the scores of all other classes
  const int32_t* labels;  // [classes]
  int32_t* decided;       // [rows, columns]
};

// Scratch memory of one worker; `width` is the columns rounded up to a multiple of the widest vector.
struct BoundsScratch {
  float* edges;   // [2, width + widest vector], least and largest of two rows
  float* limits;  // [2, kept, width], least and largest probabilities
  float* upper;   // [classes, widest vector]
};

struct PointsJob {
  const float* logits;     // [any, depth], queries innermost and zeros behind them; depth a multiple of the widest vector
  const int32_t* corners;  // [points, 4], rows of `logits`: upper left, upper right, lower left, lower right
  const float* shares;     // [points, 2], of the lower and of the right ones
  int64_t points, queries, depth;
  const float* weights;  // [queries, pitch]
  int64_t pitch;
  float* masks;   // [kPointsAtOnce, depth], scratch
  float* scores;  // [points, pitch]
};

constexpr int64_t kPointsAtOnce = 42;  // a multiple of the rows that products.h has in registers

MF_DECLARE_KERNELS(
    // Writes the class that surely has the largest score in each cell of one row, else -1.
    void bound_cells(const BoundsJob& job, int64_t row, BoundsScratch& scratch);

    // Computes the scores of all classes at some points.
    void score_points(const PointsJob& job);)

}  // namespace maskformer_fast
