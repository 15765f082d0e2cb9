// Matching costs of a batch on the host: every decoder layer, image, query and target.
#pragma once

#include <array>
#include <cstdint>

#include "matching_cost/kernels.h"

namespace maskformer_fast {

struct MatchingBatch {
  int64_t layers, images, queries, classes;  // classes: with no-object
  int64_t height, width;                     // of the mask logits
  int64_t slots;                             // targets of each image, at most
  int64_t input_height, input_width;         // of the targets' masks

  const float* class_logits;  // [layers, images, queries, classes]
  // Mask logits as factors, [layers, images, queries, depth] and [images, depth, height, width] with strides in
  // elements; or, where pixels is null, multiplied out in `embeddings`: [layers, images, queries, height, width].
  const float* embeddings;
  const float* pixels;
  int64_t depth;
  std::array<int64_t, 4> pixel_strides;

  const int64_t* labels;       // [images, slots]
  const int64_t* counts;       // [images]
  const uint8_t* masks;        // [images, slots, input_height, ceil(input_width / 8)], least significant bit first
  const int64_t* valid_sizes;  // [images, 2], nullptr: all pixels count

  double class_weight, mask_weight, dice_weight;
  FocalLoss loss;

  float* cost;  // [layers, images, queries, slots] result, 0 beyond counts
};

// Computes the costs with at most `threads` threads, the calling one included.
// Throws std::invalid_argument on a count or label out of range, std::bad_alloc.
void matching_cost(const MatchingBatch& batch, int threads);

}  // namespace maskformer_fast
