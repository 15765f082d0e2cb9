// Labels by class scores that are computed at a grid and resized, on the host.
#pragma once

#include <array>
#include <cstdint>

namespace maskformer_fast {

// Mask logits that are resized to a grid, whose upper left window is resized to the output, and the weights of queries
// and classes. Kept queries are those that matter almost everywhere, and live classes those that they may have.
struct GridScores {
  const float* logits;    // [queries, rows, columns]
  const int32_t* order;   // [queries], the kept ones first
  const float* weights;   // [queries, pitch] in this order; pitch a multiple of 16
  int64_t queries, rows, columns, classes, pitch;
  int64_t kept;           // 0: there are no bounds, and scores are computed everywhere
  const float* live_weights;   // [kept, live_pitch]; live_pitch a multiple of 16
  const float* slack;          // [live_pitch], most that the other queries add to a live class
  const int32_t* live_classes;  // [live], their numbers
  int64_t live, live_pitch;
  float others;                // bound of the scores of all other classes
  std::array<int64_t, 2> grid, window;
};

// Labels every pixel by the largest resized score, of equal ones the first. Bounds settle most cells of the logits'
// own grid; scores of live classes most of those that are left; complete scores are computed at the corners of the
// others. Uses at most `threads` threads; labels do not depend on their number. Throws std::invalid_argument on sizes
// that do not fit.
void grid_semantic(const GridScores& scores, int64_t* labels, std::array<int64_t, 2> size, int threads);

}  // namespace maskformer_fast
