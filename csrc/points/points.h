// Maps and masks at points of images: samples, the choice of uncertain points, and costs and losses there.
//
// Points are (x, y) in 0..1 of an image. Samples are bilinear; outside of a map, and at points that are not finite,
// are zeros. Maps are float, or bfloat16 as uint16_t. Results do not depend on the number of threads.
#pragma once

#include <cstdint>

#include "common/focal_loss.h"

namespace maskformer_fast {

enum class MaskFormat { float32, bytes, packed };  // packed: 8 pixels a byte, least significant bit first

// Masks, and for each sampled row the mask and the points.
struct MaskSamples {
  MaskFormat format;
  const void* masks;            // [masks, height, width], packed: [masks, height, ceil(width / 8)]
  int64_t count, height, width;
  int64_t extent_height, extent_width;  // size of which points are parts
  int64_t rows;
  const int64_t* mask_of_row;   // [rows], -1: zeros
  const int64_t* group_of_row;  // [rows]
  const float* points;          // [groups, points, 2]
  int64_t groups, points_count;
};

// Samples masks -> result [rows, points]. Throws std::invalid_argument on a row out of range.
void sample_masks(const MaskSamples& samples, float* result, int threads);

// Random points among which each map gets those of least |logit|, and others that it gets in any case.
struct PointChoice {
  int64_t count, height, width;  // maps
  const int64_t* groups;         // [count], group of points of each map, -1: none
  const float* candidates;       // [group_count, candidate_count, 2]
  const float* random;           // [group_count, random_count, 2]
  int64_t group_count, candidate_count, random_count;
  int64_t uncertain;             // number of candidates to choose
};

// Chooses points -> result [count, uncertain + random_count, 2]; zeros for maps without a group.
template <class Element>
void choose_points(const PointChoice& choice, const Element* maps, float* result, int threads);

// Maps, each with points of its own and the target there.
struct PointPairs {
  int64_t count, height, width, points_count;
  const int64_t* rows;  // [count], -1: not a pair
  const float* points;  // [count, points_count, 2]
  const float* truth;   // [count, points_count]
  FocalLoss loss;
};

// Sums over the points of each pair -> sums [count, 4]: loss, probability where the target is on, probability, target.
template <class Element>
void point_sums(const PointPairs& pairs, const Element* maps, float* sums, int threads);

// Gradient by the maps from that by the sums [count, 4] -> gradient [count, height, width].
template <class Element>
void point_sums_backward(const PointPairs& pairs, const float* upstream, const Element* maps, Element* gradient,
                         int threads);

// Costs of every pair of a query and a target.
struct PointCosts {
  int64_t layers, images, queries, classes;  // classes include no-object
  int64_t height, width;                     // of the maps, where points are given
  int64_t slots, points_count;
  int64_t point_layers;        // layers, or 1 where all layers have the same points and truth
  const float* class_logits;   // [layers, images, queries, classes]
  const float* points;         // [point_layers, images, points_count, 2]; null: logits are at the points
  const float* truth;          // [point_layers, images, slots, points_count]
  const int64_t* labels;       // [images, slots]
  const int64_t* counts;       // [images]
  double class_weight, mask_weight, dice_weight;
  FocalLoss loss;
};

// Throws std::invalid_argument on a count or label out of range.
void check_point_costs(const PointCosts& costs);

// Computes costs [layers, images, queries, slots], 0 beyond counts, from logits at the points [layers, images, queries,
// points_count]; from maps `map_cost` does (map_cost/map_cost.h). Throws std::invalid_argument as `check_point_costs`.
template <class Element>
void point_cost(const PointCosts& costs, const Element* logits, float* result, int threads);

}  // namespace maskformer_fast
