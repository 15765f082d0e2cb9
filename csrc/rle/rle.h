// COCO run-length encoding of bit-packed masks on the host.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace maskformer_fast {

// Returns COCO's compressed counts of each mask: lengths of alternating runs of 0 and 1 down the columns, 0 first. Each
// length is stored as the difference to the run two before, in characters of 5 bits.
// masks: [count, height, ceil(width / 8)], contiguous, pixel x in bit x % 8 of byte x / 8; padding bits are ignored.
// Writes the pixels of each mask to `areas` [count] where it is not null. Uses at most `threads` threads, the calling one
// included. Throws std::bad_alloc.
std::vector<std::string> encode_packed_masks(const uint8_t* masks, int64_t count, int64_t height, int64_t width,
                                             int threads, int64_t* areas = nullptr);

enum class MapType { uint8, int16, int32, int64, float32 };

// Returns the counts of the pixels of a map [height, width] that have each of some values, all different, and writes
// areas [values] and boxes [values, 4]: first column, first row, one past the last column and row; zeros without a
// pixel. Throws std::invalid_argument where the values span 2^20 or more.
std::vector<std::string> encode_map(MapType type, const void* map, int64_t height, int64_t width,
                                    const std::vector<int64_t>& values, int64_t* areas, int64_t* boxes);

}  // namespace maskformer_fast
