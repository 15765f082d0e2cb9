// Positions of bilinear interpolation along one axis, in single precision as PyTorch computes them; for the host.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "resized_argmax/kernels.h"

namespace maskformer_fast {

// Output pixels of each cell between neighbouring positions of an axis.
struct CellTable {
  std::vector<int32_t> start;
  std::vector<float> share;

  CellTable(int64_t output, int64_t positions) : start(positions + 1), share(output) {
    const float scale = static_cast<float>(positions) / static_cast<float>(output);
    int64_t next = 0;
    for (int64_t i = 0; i < output; ++i) {
      const float at = std::max(scale * (static_cast<float>(i) + 0.5f) - 0.5f, 0.0f);
      const int64_t low = std::min(static_cast<int64_t>(at), positions - 1);
      while (next <= low) start[next++] = static_cast<int32_t>(i);
      share[i] = std::min(std::max(at - static_cast<float>(low), 0.0f), 1.0f);
    }
    while (next <= positions) start[next++] = static_cast<int32_t>(output);
  }
  CellAxis axis() const { return {start.data(), share.data()}; }
};

// Neighbours of each of the first `points` points of a finer axis on a coarse one.
struct Taps {
  std::vector<int32_t> low;
  std::vector<float> share;  // of the neighbour behind

  Taps(int64_t points, int64_t fine, int64_t coarse) : low(points), share(points) {
    const float scale = static_cast<float>(coarse) / static_cast<float>(fine);
    for (int64_t i = 0; i < points; ++i) {
      const float at = fine == coarse ? static_cast<float>(i)
                                      : std::max(scale * (static_cast<float>(i) + 0.5f) - 0.5f, 0.0f);
      low[i] = static_cast<int32_t>(std::min(static_cast<int64_t>(at), coarse - 1));
      share[i] = std::min(std::max(at - static_cast<float>(low[i]), 0.0f), 1.0f);
    }
  }
};

}  // namespace maskformer_fast
