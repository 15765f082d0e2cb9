// Packed masks resized by nearest neighbours on the host.
#pragma once

#include <cstdint>

namespace maskformer_fast {

// Masks [count, height, ceil(width / 8)], contiguous, pixel x in bit x % 8 of byte x / 8; padding bits are ignored. The
// result's pixel (y, x) is that of row rows[y] and column columns[x]; neither list descends.
struct NearestMasks {
  const uint8_t* masks;
  int64_t count, height, width;
  const int64_t* rows;
  const int64_t* columns;
  int64_t out_height, out_width;
};

// Writes the masks [count, out_height, ceil(out_width / 8)], padding bits 0, and their boxes [count, 4]: first column,
// first row, one past the last column and row; zeros for a mask without pixels. Uses at most `threads` threads, the
// calling one included. Throws std::invalid_argument for rows and columns out of range or order, std::bad_alloc.
void nearest_masks(const NearestMasks& input, uint8_t* result, float* boxes, int threads);

}  // namespace maskformer_fast
