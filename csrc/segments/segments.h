// Panoptic and instance inference of a batch on the host.
#pragma once

#include <array>
#include <cstdint>
#include <string>
#include <vector>

namespace maskformer_fast {

// Mask logits and the window of the maps that the output covers.
struct MaskWindow {
  const float* logits;             // [batch, queries, rows, columns], columns adjacent
  std::array<int64_t, 4> sizes;    // of logits
  std::array<int64_t, 3> strides;  // of batch, queries and rows, in floats
  std::array<double, 2> extent;    // height and width of the window, in map pixels
  std::array<int64_t, 2> output;   // height and width of the result, both positive
};

// Classes and scores of the queries, and the rule by which they become segments.
struct PanopticInput {
  const float* scores;        // [batch, queries]
  const int64_t* categories;  // [batch, queries], negative for queries that are left out
  const bool* is_thing;       // [classes]
  int64_t classes;
  double overlap_threshold;
  std::string rule;  // maskformer, mask2former or huggingface
};

struct PanopticOutput {
  int32_t* id_map;  // [batch, height, width], segment of each pixel, or -1
  int32_t* ids;     // [batch, queries], segment of each query, or -1
  int64_t* areas;   // [batch, queries], pixels of each query, whether it has a segment or not
};

struct InstanceOutput {
  uint8_t* masks;  // [batch, queries, height, ceil(width / 8)], least significant bit first
  int64_t* areas;  // [batch, queries]
  float* boxes;    // [batch, queries, 4]
  float* scores;   // [batch, queries]
};

// Both functions use at most `threads` threads, the calling one included; results do not depend on their number. Both
// throw std::invalid_argument on maps that are too large or empty, std::bad_alloc. panoptic_inference also throws
// std::invalid_argument on an unknown category or rule.
void panoptic_inference(const MaskWindow& window, const PanopticInput& input, const PanopticOutput& output,
                        int threads);
void instance_inference(const MaskWindow& window, const InstanceOutput& output, int threads);

}  // namespace maskformer_fast
