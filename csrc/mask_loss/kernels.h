// Kernels of the mask losses, compiled once for each instruction set (common/cpu_isa.h). A call works on rows of pixels
// of one pair: a mask's logits and its packed target.
#pragma once

#include <cstdint>

#include "common/axis_taps.h"
#include "common/cpu_isa.h"
#include "common/focal_loss.h"

namespace maskformer_fast {

constexpr int kMostLanes = 16;  // floats in the widest vector of any instruction set

// A cell is a pixel of the low-resolution logits.
struct MaskPair {
  const float* logits;  // [height, width] cells
  int64_t height, width;
  AxisTaps rows;     // [pixels of a column]
  AxisTaps columns;  // [pixels of a row, rounded up to a multiple of kMostLanes]
  const uint8_t* mask;  // least significant bit first
  int64_t mask_bytes;   // of a row
  int64_t counted_rows, counted_columns;
  FocalLoss loss;
};

struct MaskSums {
  double loss, overlap, total;
  int64_t area;
};

// Gradient by the sums of a pair.
struct MaskGradient {
  float loss, overlap, total;
};

struct MaskScratch {
  float* cells;      // [width + kMostLanes], zeros at the end: a row of pixels, upsampled vertically
  float* low_rows;   // [pixels of a row, rounded up to a multiple of kMostLanes]: gradient by a row of cells, not yet
                     // downsampled horizontally
  float* high_rows;  // as low_rows, of the next row of cells
};

MF_DECLARE_KERNELS(
    // Adds rows of pixels first..last-1 to the sums. Adds NaN where one of their logits is not finite.
    void add_mask(const MaskPair& pair, int64_t first, int64_t last, const MaskScratch& scratch, MaskSums& sums);

    // Overwrites rows of cells first..last-1 of `gradient`, which points to row 0, with the gradient by the cells.
    void differentiate_mask(const MaskPair& pair, const MaskGradient& upstream, int64_t first, int64_t last,
                            const MaskScratch& scratch, float* gradient);)

}  // namespace maskformer_fast
