// Where an output reads low-resolution maps along one axis: the definition of maskformer_fast/ops/resample.py.
#pragma once

#include <algorithm>
#include <cstdint>

namespace maskformer_fast {

struct AxisPosition {
  int32_t low, high;  // the two map positions; the last one twice beyond it
  float share;        // of `high`, in 0..1
};

// Of position i of `output` ones, which cover the first `extent` of `source` map positions (1 to 2^31 - 2).
inline AxisPosition read_position(int64_t i, int64_t output, double extent, int64_t source) {
  const double scale = extent / static_cast<double>(output);
  const double at = std::clamp((static_cast<double>(i) + 0.5) * scale - 0.5, 0.0, static_cast<double>(source - 1));
  const auto low = static_cast<int32_t>(at);
  return {low, static_cast<int32_t>(std::min<int64_t>(low + int64_t{1}, source - 1)), static_cast<float>(at - low)};
}

}  // namespace maskformer_fast
