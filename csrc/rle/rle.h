// COCO run-length encoding of bit-packed masks.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace maskformer_fast {

// COCO's compressed counts of each mask: runs of 0 and 1 in turn down the columns, the first of 0, as variable-length
// differences to the run two before, 5 bits a character.
// masks: [count, height, ceil(width / 8)], rows adjacent, pixel x in bit x % 8 of byte x / 8; padding bits are ignored.
// Uses at most `threads` threads. Throws std::bad_alloc.
std::vector<std::string> encode_masks(const uint8_t* masks, int64_t count, int64_t height, int64_t width, int threads);

}  // namespace maskformer_fast
