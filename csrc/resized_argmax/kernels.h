// Kernels of the argmax of resized maps, compiled once for each instruction set (common/cpu_isa.h).
//
// A map has the values of all channels at the points of a grid, channels innermost. Four neighbouring points are the
// corners of a cell, and between them every channel is bilinear: it lies between its least and its largest corner. So a
// channel whose largest corner is below the least corner of another one is not the largest anywhere in the cell. Where
// one channel is left, it fills the cell; otherwise the channels that are left are computed pixel by pixel.
#pragma once

#include <cstdint>

#include "common/cpu_isa.h"

namespace maskformer_fast {

// A band of rows of the grid. Cells of a grid row lie between it and the next one, which must be in the band too.
struct ScoreGrid {
  const float* scores;            // [points, pitch], readable up to a multiple of the widest vector behind a channel
  const int32_t* score_of_point;  // [rows, columns], index into scores of each point, or null: the point's own number
  int64_t first_row;              // of the band
  int64_t rows;                   // of the band
  int64_t grid_rows;              // of the complete grid
  int64_t columns;
  int64_t channels, pitch;
};

// Output pixels of each cell: those from start[i] to start[i + 1] read positions i and i + 1 with shares 1 - share and
// share.
struct CellAxis {
  const int32_t* start;  // [positions + 1]
  const float* share;    // [pixels]
};

// Mask logits from which the values at the points of a grid are resized where they are needed. Between four
// neighbouring logits every channel is bilinear too, so most cells of the coarse grid have one winner at all points of
// the finer one.
struct CoarseGrid {
  const float* values;  // [rows, columns, pitch] logits, channels innermost
  int64_t rows, columns;
  const int32_t *row, *column;             // upper and left neighbour of each row and column of the finer grid
  const float *row_share, *column_share;   // shares of the lower and right ones
  int32_t* decided;  // [rows, columns], 2 * winner + (1 if it owns the cell), where others own nothing; else -1
};

enum class ArgmaxKind {
  scores,   // the largest value; labels are int64
  masks,    // the same with counts of pixels; labels are int32
  sigmoids  // the largest scale * sigmoid(value), counted, where its value is at least own_value; labels are int64
};

struct ArgmaxJob {
  ScoreGrid grid;
  const int32_t* decided;  // [rows, columns], label of all pixels of a cell, or -1 where it must be computed; or null
  CellAxis vertical, horizontal;
  ArgmaxKind kind;
  const float* scale;      // [pitch], of sigmoids, and of masks with a coarse grid
  const float* own_value;  // [pitch], least value of the pixels that a channel owns; of masks and sigmoids
  void* labels;            // [height, width]
  int64_t width;
  const CoarseGrid* coarse;  // in place of scores, or null; of masks (values are scale * sigmoid) and sigmoids
};

// Scratch memory of one worker.
struct ArgmaxScratch {
  int32_t* candidates;  // [pitch]
  int32_t* partial;     // [pitch], channels that own some pixels of the cell
  float* corners;       // [8, pitch]
  float* points;        // [4, pitch], with a coarse grid: values at the corners of a cell
  int64_t* won;         // [pitch], sums over this worker's pixels
  int64_t* owned;
  int64_t* both;
};

struct DecideJob {
  ScoreGrid grid;
  const float* slack;     // [pitch], how much larger than in the grid a channel may be
  float others;           // bound of all channels that are not in the grid
  const int32_t* labels;  // [channels], labels of the grid's channels
  int32_t* decided;       // [rows, columns], -1, or the label of a cell that is left as it is
};

MF_DECLARE_KERNELS(
    // Writes the labels of the output rows that belong to the cells of one grid row, a row of the band.
    void label_cells(const ArgmaxJob& job, int64_t row, ArgmaxScratch& scratch);

    // Finds the winners of the cells of one row of the coarse grid.
    void decide_winners(const ArgmaxJob& job, int64_t row);

    // Writes the label of each cell of one row that has none and that one channel surely fills.
    void decide_cells(const DecideJob& job, int64_t row);)

}  // namespace maskformer_fast
