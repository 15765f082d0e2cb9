// Bilinear taps along one axis, as kernels read them.
#pragma once

#include <cstdint>

namespace maskformer_fast {

// Output position i reads map positions low[i] and high[i] with weights 1 - share[i] and share[i].
struct AxisTaps {
  const int32_t* low;
  const int32_t* high;
  const float* share;
};

}  // namespace maskformer_fast
