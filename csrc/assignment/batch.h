// A batch of assignment problems, on the host or on a device.
#pragma once

#include <array>
#include <cstdint>

namespace maskformer_fast {

template <class T>
struct AssignmentBatch {
  const T* cost;                   // [batch, rows, columns]
  std::array<int64_t, 3> sizes;    // batch, rows, columns
  std::array<int64_t, 3> strides;  // of cost, in elements
  const int64_t* counts;           // [batch], valid columns of each problem; nullptr: all of them
  int64_t* row_of;                 // [batch, columns] result: the row of each column, or -1
};

}  // namespace maskformer_fast
