// Matching costs of a batch on the host, for every decoder layer, image, query and target.
#pragma once

#include <array>
#include <cstdint>

#include "common/focal_loss.h"

namespace maskformer_fast {

struct MatchingBatch {
  int64_t layers, images, queries, classes;  // classes include no-object
  int64_t height, width;                     // of the mask logits
  int64_t slots;                             // largest number of targets of an image
  int64_t input_height, input_width;         // of the targets' masks

  const float* class_logits;  // [layers, images, queries, classes]
  // Factors of the mask logits: embeddings [layers, images, queries, depth] and pixels [images, depth, height, width]
  // with strides in elements. Where pixels is null, embeddings are the mask logits: [layers, images, queries, height,
  // width].
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

  float* cost;  // result, [layers, images, queries, slots], 0 beyond counts
};

// Computes the costs with at most `threads` threads, the calling one included.
// Throws std::invalid_argument on a count or label out of range, std::bad_alloc.
void matching_cost(const MatchingBatch& batch, int threads);

}  // namespace maskformer_fast
