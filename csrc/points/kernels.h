// Kernels at points, compiled once for each instruction set (common/cpu_isa.h). Points are worked on in chunks, whose
// places, samples and losses stay in the first-level cache.
#pragma once

#include <cstdint>

#include "common/cpu_isa.h"
#include "common/focal_loss.h"

namespace maskformer_fast {

constexpr int64_t kChunk = 1024;  // points
constexpr int kMostPointLanes = 16;
constexpr int kBlock = 4;         // queries that are compared with the targets together

// Neighbours of the points of a chunk: column and row of the upper left one, and shares of the right and lower ones.
// Columns are in -1..width, rows in -1..height.
struct Places {
  int32_t column[kChunk], row[kChunk];
  float right[kChunk], low[kChunk];
};

// Lanes of sums over the points of one query.
struct QueryLanes {
  float probability[kMostPointLanes];
  float off_loss[kMostPointLanes];  // loss with the target off
  float broken[kMostPointLanes];    // zeros where all logits are finite, else NaN
};

// Values of a block at a chunk: of each query the probability and the loss with the target on less that with it off.
struct BlockValues {
  float probability[kBlock][kChunk];
  float rise[kBlock][kChunk];
};

// Lanes of sums over the points of a query and target.
struct PairLanes {
  float probability[kBlock][kMostPointLanes];
  float rise[kBlock][kMostPointLanes];
};

// A zero border around a map: one row and column before it, two behind it.
constexpr int64_t padded_width(int64_t width) { return width + 3; }
constexpr int64_t padded_size(int64_t height, int64_t width) { return (height + 3) * padded_width(width); }

MF_DECLARE_KERNELS(
    // Finds the neighbours of `count` points, which are parts of extent_height x extent_width, in a map.
    void place_points(const float* points, int64_t count, int64_t extent_height, int64_t extent_width, int64_t height,
                      int64_t width, Places& places);

    // Writes a map to the interior of the padded one.
    void pad_map(const float* map, int64_t height, int64_t width, float* padded);
    void pad_map(const uint16_t* map, int64_t height, int64_t width, float* padded);

    // Copies `count` logits.
    void copy_logits(const float* logits, int64_t count, float* result);
    void copy_logits(const uint16_t* logits, int64_t count, float* result);

    // Samples a padded map.
    void sample_map(const float* padded, int64_t width, const Places& places, int64_t count, float* result);

    // Samples a map without a border, of less than 2^31 values, which is read from memory rather than from the cache.
    void sample_dense(const float* map, int64_t height, int64_t width, const Places& places, int64_t count,
                      float* result);

    // Adds up the losses of a chunk of query `query` of a block, and writes its values.
    void add_losses(const float* logits, int64_t count, const FocalLoss& loss, QueryLanes& lanes, int query,
                    BlockValues& values);

    // Adds the products of the values of a block and the truth [targets][stride] at a chunk to `pairs`.
    void add_products(const BlockValues& values, const float* truth, int64_t stride, int64_t targets, int64_t count,
                      PairLanes* pairs);

    // Adds a chunk to the four sums of a pair.
    void add_sums(const float* logits, const float* truth, int64_t count, const FocalLoss& loss, double* sums);

    // Writes the gradient of a chunk by its logits.
    void differentiate_sums(const float* logits, const float* truth, int64_t count, const FocalLoss& loss,
                            const float* upstream, float* gradient);

    // Adds gradients by samples to the padded gradient of the map.
    void scatter(const float* gradient, const Places& places, int64_t count, int64_t width, float* padded);

    // Writes the interior of a padded map to a map.
    void unpad_map(const float* padded, int64_t height, int64_t width, float* map);
    void unpad_map(const float* padded, int64_t height, int64_t width, uint16_t* map);

    // Adds up numbers.
    double total(const float* values, int64_t count);)

}  // namespace maskformer_fast
