// Semantic inference of a batch on the host.
//
// label(y, x) = argmax_c sum_q P[q, c] * M[q, y, x], where P = softmax(class logits) without its last column and
// M = sigmoid(mask logits resampled bilinearly).
#pragma once

#include <array>
#include <cstdint>

namespace maskformer_fast {

enum class FloatType : int32_t { float32, bfloat16, float16 };

// dense: scores all queries and classes. pruned: leaves out those that cannot change a label. automatic: prunes the
// tiles where this saves work. All three give the same labels.
enum class SemanticPath : int32_t { automatic, dense, pruned };

// A batch of images that have one size, and its results. Strides are in elements.
struct SemanticBatch {
  const void* masks;  // mask logits [batch, queries, map_height, map_width]
  FloatType mask_type;
  std::array<int64_t, 4> mask_sizes, mask_strides;
  const void* logits;  // class logits [batch, queries, classes + 1]
  FloatType logit_type;
  int64_t classes;
  std::array<int64_t, 3> logit_strides;
  std::array<double, 2> extent;  // height and width of the part of the maps that the output covers, in map pixels
  std::array<int64_t, 2> output_size;  // height and width
  void* labels;    // [batch, height, width], uint8 up to 255 classes, else int16
  float* scores;   // [batch, height, width], largest score of a class; nullptr: not wanted
  float* margins;  // [batch, height, width], lead of the largest score over the second; nullptr: not wanted
  SemanticPath path;
};

// Predictions for overlapping windows of one picture, and its labels. Strides are in elements.
struct SemanticWindows {
  const void* masks;  // mask logits [windows, queries, map_height, map_width]
  FloatType mask_type;
  std::array<int64_t, 4> mask_sizes, mask_strides;
  const float* probabilities;  // [windows, queries, classes], contiguous
  int64_t classes;
  const int64_t* origins;               // [windows, 2], first row and column of each window in the picture
  std::array<int64_t, 2> window_size;   // height and width; what reaches beyond the picture is cut off
  std::array<int64_t, 2> picture_size;  // height and width
  void* labels;                         // [height, width], uint8 up to 255 classes, else int16
};

// Labels each pixel by the sum over the queries of all windows that cover it: argmax_c sum_w sum_q P[w, q, c]
// * M[w, q, y - top_w, x - left_w]. Pixels without a window have label 0. Temporaries and errors are those of
// `semantic_inference`, with as many queries as windows cover one pixel.
void windowed_semantic(const SemanticWindows& windows, int threads);

// Labels the batch with at most `threads` threads, the calling one included. Temporaries stay below 16 MiB: with many
// queries and classes fewer threads run. Throws std::invalid_argument, std::bad_alloc.
void semantic_inference(const SemanticBatch& batch, int threads);

}  // namespace maskformer_fast
