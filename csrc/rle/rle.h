// COCO run-length encoding of bit-packed masks on the host.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace maskformer_fast {

// Returns COCO's compressed counts of each mask: lengths of alternating runs of 0 and 1 down the columns, 0 first. Each
// length is stored as the difference to the run two before, in characters of 5 bits.
// masks: [count, height, ceil(width / 8)], contiguous, pixel x in bit x % 8 of byte x / 8; padding bits are ignored.
// Uses at most `threads` threads, the calling one included. Throws std::bad_alloc.
std::vector<std::string> encode_packed_masks(const uint8_t* masks, int64_t count, int64_t height, int64_t width,
                                             int threads);

}  // namespace maskformer_fast
