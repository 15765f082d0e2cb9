// Panoptic and instance inference of a batch on the host (segments.h).
#pragma once

#include <array>
#include <cstdint>
#include <string>
#include <vector>

namespace maskformer_fast {

// Mask logits and the window of them that the output shows.
struct MaskWindow {
  const float* logits;             // [batch, queries, rows, columns], columns adjacent
  std::array<int64_t, 4> sizes;    // of logits
  std::array<int64_t, 3> strides;  // of batch, queries and rows, in floats
  std::array<double, 2> extent;    // height and width of the window, in map pixels
  std::array<int64_t, 2> output;   // height and width of the result, both positive
};

struct PanopticQuery {
  const float* scores;        // [batch, queries]
  const int64_t* categories;  // [batch, queries], negative for queries that take no part
  const bool* is_thing;       // [classes]
  int64_t classes;
  double overlap_threshold;
  std::string rule;  // maskformer, mask2former, huggingface
};

struct PanopticOutput {
  int32_t* id_map;  // [batch, height, width]
  int32_t* ids;     // [batch, queries]
  int64_t* areas;   // [batch, queries]
};

struct InstanceOutput {
  uint8_t* masks;  // [batch, queries, height, ceil(width / 8)]
  int64_t* areas;  // [batch, queries]
  float* boxes;    // [batch, queries, 4]
  float* scores;   // [batch, queries]
};

// Both use at most `threads` threads, the calling one included; results do not depend on their number.
// They throw std::invalid_argument on a category or rule that does not exist, and std::bad_alloc.
void infer_panoptic(const MaskWindow& window, const PanopticQuery& query, const PanopticOutput& output, int threads);
void infer_instances(const MaskWindow& window, const InstanceOutput& output, int threads);

}  // namespace maskformer_fast
