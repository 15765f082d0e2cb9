// Semantic inference on the host: what the dispatching file (semantic_cpu.cpp) and the kernels (semantic_kernel.cpp,
// compiled once for each instruction set) share.
//
// label(y, x) = argmax_c sum_q P[q, c] * M[q, y, x], P = softmax(class logits) less the last column,
// M = sigmoid(mask logits resampled bilinearly). The output is cut into tiles of 16 x 16 pixels, a tile into panels of
// 4 x 16 pixels. A panel is what the product works on at once: its masks stay in the first cache.
#pragma once

#include <array>
#include <cstdint>

namespace maskformer_fast {

enum class FloatType : int32_t { float32, bfloat16, float16 };
enum class SemanticPath : int32_t { automatic, dense, pruned };

constexpr int kTile = 16;          // pixels along a side of a tile
constexpr int kPanelRows = 4;      // rows of a panel
constexpr int kPanels = kTile / kPanelRows;
constexpr int kPanelPixels = kPanelRows * kTile;
constexpr int kStripTiles = 8;     // tiles side by side that are worked on in one go
constexpr int kQueryBlock = 128;   // queries whose masks are held at once
constexpr int kClassBlock = 96;    // classes scored at once, a multiple of every kernel's register block
constexpr int kBlockStride = 112;  // floats from one query to the next in the block of probabilities

// Where the output reads the maps along one axis: taps `low` and `high` with weights 1 - share and share.
struct AxisTaps {
  const int32_t* low;
  const int32_t* high;
  const float* share;
};

// One image. Strides are in elements.
struct SemanticImage {
  const void* masks;  // [queries, map_height, map_width]
  FloatType mask_type;
  std::array<int64_t, 3> mask_strides;
  const void* logits;  // [queries, classes + 1]
  FloatType logit_type;
  std::array<int64_t, 2> logit_strides;
  int queries, classes, map_height, map_width, height, width;
  AxisTaps rows, columns;  // [height], [width]
  // by semantic_prepare, for each query: largest logit, 1 / sum of exponentials, largest probability of a class
  float* peak;
  float* scale;
  float* largest;
  float* probabilities;  // [queries, probability_stride], zeros after the last class; nullptr: computed where needed
  int64_t probability_stride;
  SemanticPath path;
  void* labels;    // [height, width], uint8 up to 255 classes, else int16
  float* scores;   // [height, width] or nullptr
  float* margins;  // the same
};

constexpr int64_t round_up(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }

// Floats of one query's row of probabilities. One cache line more than a multiple of 128 bytes: rows at a power of two
// would fall into the same few lines of the cache.
constexpr int64_t semantic_probability_stride(int classes) { return round_up(classes + 1, 32) + 16; }

// Floats of scratch memory that one worker needs.
constexpr int64_t semantic_scratch_floats(int queries, int classes) {
  const int64_t block = queries < kQueryBlock ? queries : kQueryBlock;
  return block * (kPanels * kPanelPixels + kBlockStride)                         // masks, probabilities
         + (queries > kQueryBlock ? kPanels * kClassBlock * kPanelPixels : 0)    // partial sums
         + 2 * semantic_probability_stride(classes)                              // bounds and list of classes
         + (6 + 2 * kStripTiles) * round_up(queries + 1, 16)                     // the same of queries
         + 3 * kPanels * kPanelPixels + 2 * kBlockStride + 64;                   // winners, one row, alignment
}

#define MF_DECLARE_SEMANTIC(ISA)                                                                      \
  namespace ISA {                                                                                     \
  /* Softmax of every query; false if a probability is NaN. `scratch`: semantic_scratch_floats. */    \
  bool semantic_prepare(const SemanticImage& image, float* scratch);                                  \
  /* At most kStripTiles tiles side by side, the first of which has its first pixel at (top, left). */ \
  void semantic_strip(const SemanticImage& image, int top, int left, int tiles, float* scratch);      \
  }
MF_DECLARE_SEMANTIC(baseline)
#if defined(__x86_64__)
MF_DECLARE_SEMANTIC(avx2)
MF_DECLARE_SEMANTIC(avx512)
#endif
#undef MF_DECLARE_SEMANTIC

// A batch of images of one geometry.
struct SemanticBatch {
  const void* masks;  // [batch, queries, map_height, map_width]
  FloatType mask_type;
  std::array<int64_t, 4> mask_sizes, mask_strides;
  const void* logits;  // [batch, queries, classes + 1]
  FloatType logit_type;
  int64_t classes;
  std::array<int64_t, 3> logit_strides;
  std::array<double, 2> extent;  // part of the maps that the output covers, in map pixels
  std::array<int64_t, 2> output_size;
  void* labels;  // [batch, height, width], uint8 up to 255 classes, else int16
  float* scores;
  float* margins;
  SemanticPath path;
};

// At most `threads` threads, the calling one included. Temporaries stay below 16 MiB: with many queries and classes
// fewer threads run. Throws std::invalid_argument, std::bad_alloc.
void semantic_inference(const SemanticBatch& batch, int threads);

}  // namespace maskformer_fast
