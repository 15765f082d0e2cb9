// Argmax over channels of bilinearly resized maps, on the host.
#pragma once

#include <array>
#include <cstdint>

#include "resized_argmax/kernels.h"

namespace maskformer_fast {

struct ArgmaxOutput {
  void* labels;                 // [height, width]
  std::array<int64_t, 2> size;  // height and width of the complete output
  int64_t* won;                 // [channels], added to: pixels that a channel wins, owns, and both; null for scores
  int64_t* owned;
  int64_t* both;
};

// Labels the output pixels that belong to the cells of a band of grid rows. Positions are computed in single precision
// as PyTorch's interpolation does. Uses at most `threads` threads; results do not depend on their number. Throws
// std::invalid_argument on sizes that do not fit.
void resized_argmax(const ScoreGrid& grid, const int32_t* decided, ArgmaxKind kind, const float* scale,
                    const float* own_value, const ArgmaxOutput& output, int threads);

// Mask logits that are resized to a grid, cropped to its upper left window and resized to the output.
struct TwiceResized {
  const float* values;  // [rows, columns, pitch], channels innermost
  int64_t rows, columns;
  int64_t channels, pitch;
  std::array<int64_t, 2> grid, window;
};

// Winners as of `resized_argmax`, of masks (scale * sigmoid of the logits at the grid is resized) or sigmoids. Values
// at the grid are computed only near the borders between winners.
void twice_resized_winners(const TwiceResized& maps, ArgmaxKind kind, const float* scale, const float* own_value,
                           const ArgmaxOutput& output, int threads);

// Labels the cells of a band that one channel surely fills. `decided` is -1 before, or a label that stays.
void decide_cells(const DecideJob& job, int threads);

}  // namespace maskformer_fast
