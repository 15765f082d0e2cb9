// The inner loops of the mask losses, compiled once for each instruction set (cpu_isa.h): a pair of a mask's logits and
// its packed target, a row of pixels at a time.
#pragma once

#include <cstdint>

#include "matching_cost/kernels.h"  // FocalLoss

namespace maskformer_fast {

constexpr int kMostLanes = 16;  // of any instruction set

// Between which cells of the low-resolution logits each pixel lies, along one axis (resample.h).
struct Axis {
  const int32_t* low;
  const int32_t* high;
  const float* share;  // of `high`
};

struct MaskPair {
  const float* logits;  // [height, width] cells
  int64_t height, width;
  Axis rows;
  Axis columns;  // of as many pixels as whole vectors of kMostLanes have
  const uint8_t* mask;  // least significant bit first
  int64_t mask_bytes;   // of a row
  int64_t counted_rows, counted_columns;
  FocalLoss loss;
};

struct MaskSums {
  double loss, overlap, total;
  int64_t area;
};

// Derivatives of what is differentiated by the sums of a pair.
struct MaskGradient {
  float loss, overlap, total;
};

struct MaskScratch {
  float* cells;     // [width + kMostLanes], zero: a row of pixels, upsampled vertically
  float* low_rows;  // [pixels of a row in whole vectors]: gradients at the pixels' columns and one row of cells
  float* high_rows;  // the same of the next row
};

#define MF_DECLARE(ISA)                                                                                               \
  namespace ISA {                                                                                                     \
  /* Adds the pixels of rows first..last-1; where a logit of theirs is not finite, NaN. */                            \
  void add_mask(const MaskPair& pair, int64_t first, int64_t last, const MaskScratch& scratch, MaskSums& sums);       \
  /* Rows first..last-1 of the gradient by the cells, `gradient` being that of row 0; overwrites them. */             \
  void differentiate_mask(const MaskPair& pair, const MaskGradient& upstream, int64_t first, int64_t last,            \
                          const MaskScratch& scratch, float* gradient);                                               \
  }
MF_DECLARE(baseline)
#if defined(__x86_64__)
MF_DECLARE(avx2)
MF_DECLARE(avx512)
#endif
#undef MF_DECLARE

}  // namespace maskformer_fast
