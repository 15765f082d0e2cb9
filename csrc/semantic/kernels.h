// Kernels of semantic inference, compiled once for each instruction set (common/cpu_isa.h).
//
// The output is cut into tiles of 16 x 16 pixels, and a tile into panels of 4 x 16 pixels. The matrix product works on
// one panel at a time, so that the panel's masks stay in the first-level cache.
#pragma once

#include <cstdint>

#include "common/axis_taps.h"
#include "common/cpu_isa.h"
#include "semantic/semantic.h"

namespace maskformer_fast {

constexpr int kTile = 16;      // pixels along a side of a tile
constexpr int kPanelRows = 4;  // rows of a panel
constexpr int kPanels = kTile / kPanelRows;
constexpr int kPanelPixels = kPanelRows * kTile;
constexpr int kStripTiles = 8;     // adjacent tiles that one call works on
constexpr int kQueryBlock = 128;   // queries whose masks are in memory at a time
constexpr int kClassBlock = 96;    // classes scored at a time, a multiple of every kernel's register block
constexpr int kBlockStride = 112;  // floats from one query to the next in the block of probabilities
constexpr int kPositionFloats = 256;  // memory of the map positions that one tile reads in one group

// Queries that read their maps at positions of their own: those of one window.
struct MaskGroup {
  const void* masks;       // mask logits [group_queries, map_height, map_width]
  AxisTaps rows, columns;  // [height], [width]
};

// One image. Strides are in elements.
struct SemanticImage {
  const MaskGroup* groups;  // [queries / group_queries]
  int group_queries;
  FloatType mask_type;
  int64_t mask_query_stride, mask_row_stride, mask_column_stride;
  const void* logits;  // class logits [queries, classes + 1]
  FloatType logit_type;
  int64_t logit_query_stride, logit_class_stride;
  int queries, classes, map_height, map_width, height, width;
  // [queries], written by semantic_softmax
  float* peak;     // largest logit
  float* scale;    // 1 / sum of exponentials
  float* largest;  // largest probability of a class
  float* probabilities;  // [queries, probability_stride], zeros after the last class; nullptr: computed where needed
  int64_t probability_stride;
  SemanticPath path;
  int64_t row_pitch;  // from one row of the results to the next
  void* labels;       // [height, width], uint8 up to 255 classes, else int16
  float* scores;      // [height, width] or nullptr
  float* margins;     // [height, width] or nullptr
};

static constexpr int64_t round_up(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }

// Floats from one query's row of probabilities to the next. This is one cache line more than a multiple of 128 bytes:
// rows at a power of two would share few lines of the cache.
static constexpr int64_t semantic_probability_stride(int classes) { return round_up(classes + 1, 32) + 16; }

// Floats of scratch memory that one worker needs (the struct Scratch in scratch.h).
static constexpr int64_t semantic_scratch_floats(int queries, int groups, int classes) {
  const int64_t block = queries < kQueryBlock ? queries : kQueryBlock;
  return block * (kPanels * kPanelPixels + kBlockStride)                       // masks, probabilities
         + (queries > kQueryBlock ? kPanels * kClassBlock * kPanelPixels : 0)  // partial sums
         + 2 * semantic_probability_stride(classes)                            // bounds and list of classes
         + (6 + 2 * kStripTiles) * round_up(queries + 1, 16)                   // bounds and lists of queries
         + 3 * kPanels * kPanelPixels + 2 * kBlockStride + 64                  // winners, one row, alignment
         + groups * kStripTiles * kPositionFloats;                             // map positions
}

MF_DECLARE_KERNELS(
    // Computes the softmax of every query. Returns false if a probability is NaN.
    // scratch: semantic_scratch_floats floats.
    bool semantic_softmax(const SemanticImage& image, float* scratch);

    // Labels at most kStripTiles adjacent tiles, the first of which begins at pixel (top, left).
    void semantic_strip(const SemanticImage& image, int top, int left, int tiles, float* scratch);)

}  // namespace maskformer_fast
