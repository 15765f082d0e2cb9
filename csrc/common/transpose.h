// Rows to vectors with a lane for each, for kernel files (cpu_isa.h).
#pragma once

#include "common/elements.h"

namespace maskformer_fast {
namespace MF_ISA {

#if defined(__AVX512F__)
// Exchanges blocks of `step` lanes between vectors that are `step` apart.
template <int step>
MF_INLINE void exchange_blocks(Floats* rows) {
  const Ints lane = lane_numbers(), odd = (lane & step) != 0;
  const Ints first = select(odd, lane - step + kLanes, lane), second = select(odd, lane + kLanes, lane + step);
#pragma GCC unroll 16
  for (int i = 0; i < kLanes; ++i) {
    if (i & step) continue;
    const Floats a = rows[i], b = rows[i + step];
    rows[i] = _mm512_permutex2var_ps(a, (__m512i)first, b);
    rows[i + step] = _mm512_permutex2var_ps(a, (__m512i)second, b);
  }
}
#endif

// Writes the values of rows at `count` columns from `first` on: to[column * pitch + row], for kLanes rows, of which the
// first `present` are there and the others 0.
template <class Element>
MF_INLINE void transpose(const Element* const* rows, int64_t present, int64_t first, int64_t count, float* to,
                         int64_t pitch) {
  int64_t x = 0;
#if defined(__AVX512F__)
  for (; present >= kLanes && x + kLanes <= count; x += kLanes) {
    Floats block[kLanes];
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; ++i) block[i] = load_elements(rows[i] + first + x);
    exchange_blocks<1>(block);
    exchange_blocks<2>(block);
    exchange_blocks<4>(block);
    exchange_blocks<8>(block);
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; ++i) store(to + (x + i) * pitch, block[i]);
  }
#endif
  for (; x < count; x += kLanes) {
    const int64_t columns = x + kLanes < count ? kLanes : count - x;
    for (int64_t row = 0; row < kLanes; ++row) {
      const Floats values = row < present ? load_elements(rows[row] + first + x, columns) : Floats{};
      for (int64_t i = 0; i < columns; ++i) to[(x + i) * pitch + row] = values[i];
    }
  }
}

}  // namespace MF_ISA
}  // namespace maskformer_fast
