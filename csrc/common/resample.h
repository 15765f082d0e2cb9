// Bilinear resampling along one axis, by the definition of maskformer_fast/ops/resample.py. For drivers, not kernels.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "common/axis_taps.h"

namespace maskformer_fast {

struct AxisPosition {
  int32_t low, high;  // the two map positions; both are the last one beyond the map's end
  float share;        // weight of `high`, in 0..1
};

// Finds the map positions of output position i. The output has `output` positions, which cover the first `extent` of
// `source` map positions (1 to 2^31 - 2).
inline AxisPosition read_position(int64_t i, int64_t output, double extent, int64_t source) {
  const double scale = extent / static_cast<double>(output);
  const double at = std::clamp((static_cast<double>(i) + 0.5) * scale - 0.5, 0.0, static_cast<double>(source - 1));
  const auto low = static_cast<int32_t>(at);
  return {low, static_cast<int32_t>(std::min<int64_t>(low + int64_t{1}, source - 1)), static_cast<float>(at - low)};
}

// Memory of AxisTaps with `count` entries, of the output positions from `first` on. Entries beyond `output` repeat the
// last output position.
class AxisTable {
 public:
  AxisTable(int64_t output, double extent, int64_t source, int64_t count, int64_t first = 0)
      : low_(count), high_(count), share_(count) {
    for (int64_t i = 0; i < count; ++i) {
      const AxisPosition position = read_position(std::min(first + i, output - 1), output, extent, source);
      low_[i] = position.low;
      high_[i] = position.high;
      share_[i] = position.share;
    }
  }

  AxisTaps taps() const { return {low_.data(), high_.data(), share_.data()}; }

 private:
  std::vector<int32_t> low_, high_;
  std::vector<float> share_;
};

}  // namespace maskformer_fast
