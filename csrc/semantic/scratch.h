// Scratch memory of a worker, and probabilities of classes. Part of kernels.cpp.
#pragma once

#include "semantic/masks.h"

namespace maskformer_fast {
namespace MF_ISA {
namespace {

constexpr int kTilePixels = kPanels * kPanelPixels;

// Parts of a worker's scratch memory. semantic_scratch_floats adds up their sizes.
struct Scratch {
  float* masks;    // [kPanels, kQueryBlock or fewer, kPanelPixels]
  float* block;    // [kQueryBlock or fewer, kBlockStride], probabilities of some queries and classes
  float* partial;  // [kPanels, kClassBlock, kPanelPixels], sums so far, where there are several blocks of queries
  float* upper;    // [classes], upper bounds of the scores
  int32_t* classes;  // [classes], ascending, the classes that can win
  float *least, *largest;  // [kStripTiles, queries], range of the logits in each tile of a strip
  float *middle, *half;    // [queries], middle and half width of the range of the masks in the tile
  float* bound;            // [queries], upper bound of what a query adds to a score
  float* weight;           // [queries], upper bound of the change of a score where the middle replaces the mask
  int32_t* live;           // [queries], queries that are scored with their masks
  int32_t* dropped;        // [queries], queries whose masks are replaced by their middles
  float *best, *second;    // [kTilePixels], scores of winner and runner-up
  int32_t* label;          // [kTilePixels], winner
  float* row;              // [kBlockStride], probabilities of one query
  float* bias;             // [kBlockStride], scores by the dropped queries
  Window* windows;         // [groups, kStripTiles], map positions of each tile
};

MF_INLINE Scratch split_scratch(const SemanticImage& image, float* memory) {
  const int64_t block = image.queries < kQueryBlock ? image.queries : kQueryBlock;
  const int64_t queries = round_up(image.queries + 1, 16);
  const int64_t classes = semantic_probability_stride(image.classes);
  const int64_t groups = image.queries > 0 ? image.queries / image.group_queries : 1;
  memory += (64 - reinterpret_cast<uintptr_t>(memory) % 64) % 64 / sizeof(float);
  const auto take = [&](int64_t count) {
    float* part = memory;
    memory += count;
    return part;
  };
  Scratch scratch;
  scratch.windows = reinterpret_cast<Window*>(take(groups * kStripTiles * kPositionFloats));
  scratch.masks = take(block * kTilePixels);
  scratch.best = take(kTilePixels);
  scratch.second = take(kTilePixels);
  scratch.label = reinterpret_cast<int32_t*>(take(kTilePixels));
  scratch.partial = take(image.queries > kQueryBlock ? kClassBlock * kTilePixels : 0);
  scratch.block = take(block * kBlockStride);
  scratch.row = take(kBlockStride);
  scratch.bias = take(kBlockStride);
  scratch.upper = take(classes);
  scratch.classes = reinterpret_cast<int32_t*>(take(classes));
  scratch.least = take(kStripTiles * queries);
  scratch.largest = take(kStripTiles * queries);
  scratch.middle = take(queries);
  scratch.half = take(queries);
  scratch.bound = take(queries);
  scratch.weight = take(queries);
  scratch.live = reinterpret_cast<int32_t*>(take(queries));
  scratch.dropped = reinterpret_cast<int32_t*>(take(queries));
  return scratch;
}

// Computes e^x for x <= 0, and 0 below -87. NaN stays NaN.
MF_INLINE Floats softmax_exp(Floats x) {
  return select(x >= -87.0f, exp(x), select(x == x, broadcast(0.0f), x));
}

MF_INLINE float logit(const SemanticImage& image, int query, int c) {
  const int64_t at = query * image.logit_query_stride + c * image.logit_class_stride;
  switch (image.logit_type) {
    case FloatType::bfloat16: return load_float(static_cast<const BFloat16*>(image.logits) + at);
    case FloatType::float16: return load_float(static_cast<const Float16*>(image.logits) + at);
    default: return static_cast<const float*>(image.logits)[at];
  }
}

// Writes P[query, classes[0..count)] to `out`, and zeros up to a multiple of kLanes.
MF_INLINE void load_probabilities(const SemanticImage& image, int query, const int32_t* classes, int count,
                                  float* out) {
  const int padded = static_cast<int>(round_up(count, kLanes));
  if (image.probabilities) {
    const float* row = image.probabilities + query * image.probability_stride;
    const bool adjacent = classes[count - 1] - classes[0] == count - 1;
    for (int c = 0; c < padded; c += kLanes) {
      const Ints inside = first_lanes(count - c);
      // lanes beyond `count` read other classes or the zeros at the end of the row
      const Floats p = adjacent ? load(row + classes[0] + c)
                                : gather(row, select(inside, load_ints(classes + c), Ints{}));
      store(out + c, select(inside, p, Floats{}));
    }
    return;
  }
  for (int c = 0; c < count; ++c) out[c] = logit(image, query, classes[c]);
  for (int c = count; c < padded; ++c) out[c] = -kInfinity;
  for (int c = 0; c < padded; c += kLanes) {
    store(out + c, softmax_exp(load(out + c) - image.peak[query]) * image.scale[query]);
  }
}

}  // namespace
}  // namespace MF_ISA
}  // namespace maskformer_fast
