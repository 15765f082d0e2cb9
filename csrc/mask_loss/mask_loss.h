// Sums of which the mask losses of matched pairs are made, and their gradient, on the host.
#pragma once

#include <cstdint>

#include "common/focal_loss.h"

namespace maskformer_fast {

struct MaskPairs {
  int64_t pairs;
  int64_t height, width;  // of the logits
  int64_t targets;
  int64_t input_height, input_width;  // of the targets' masks

  const float* logits;         // [pairs, height, width]
  const uint8_t* masks;        // [targets, input_height, ceil(input_width / 8)], least significant bit first
  const int64_t* rows;         // [pairs], the pair's target; negative for none
  const int64_t* valid_sizes;  // [targets, 2], nullptr: all pixels count
  FocalLoss loss;
};

// Writes weighted focal loss, p t, p and t, each summed over the counted pixels, to sums [pairs, 4]. A pair without a
// target gives zeros, whatever its logits. The first three are NaN where an upsampled logit of a counted pixel is not
// finite. Uses at most `threads` threads, the calling one included; the result does not depend on their number.
// Throws std::invalid_argument where a row is none of the targets, std::bad_alloc.
void mask_sums(const MaskPairs& batch, float* sums, int threads);

// Writes the gradient by the logits to gradient [pairs, height, width]. upstream: [pairs, 4], the gradient by the sums.
// Threads and errors are those of mask_sums.
void mask_sums_backward(const MaskPairs& batch, const float* upstream, float* gradient, int threads);

}  // namespace maskformer_fast
