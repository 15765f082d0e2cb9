// Kernels of the matching cost, compiled once for each instruction set (common/cpu_isa.h).
//
// They work on tiles: the mask logits of kTilePixels pixels and kTileQueries queries, [pixel][query]. A tile stays in
// the first-level cache from the product that computes it to the sums that read it.
#pragma once

#include <cstdint>

#include "common/cpu_isa.h"
#include "common/focal_loss.h"

namespace maskformer_fast {

constexpr int kTilePixels = 96;
constexpr int kTileQueries = 32;

// Consecutive pixels of a tile that the same targets cover: targets[first_target .. last_target).
struct Run {
  int pixels;
  int first_target;
  int last_target;
};

// Sums over pixels, for kTileQueries queries.
struct QuerySums {
  float probability[kTileQueries];
  float off_loss[kTileQueries];  // loss with the target off
  float broken[kTileQueries];    // 0 where all logits are finite, else NaN
};

// Sums over the pixels that a target covers, for kTileQueries queries.
struct PairSums {
  float probability[kTileQueries];
  float rise[kTileQueries];  // loss with the target on less loss with the target off
};

MF_DECLARE_KERNELS(
    // logits = pixels^T embeddings; pixels: [depth][kTilePixels], embeddings: [depth][kTileQueries].
    void multiply_tile(int64_t depth, const float* pixels, const float* embeddings, float* logits);

    // Writes `pixels` adjacent logits of `queries` maps to a tile.
    void transpose_logits(const float* const* maps, int64_t queries, int64_t first, int64_t pixels, float* logits);

    // Adds a tile to the sums of its queries, of which the first `present` are there, and of every target that covers
    // some of its pixels.
    void add_tile(const float* logits, int present, const Run* runs, int run_count, const int* targets,
                  const FocalLoss& loss, QuerySums& queries, PairSums* pairs);

    // Writes softmax(logits)[chosen[i]] to out[i] for each of `count` choices.
    void chosen_probabilities(const float* logits, int64_t classes, const int64_t* chosen, int64_t count, float* out);)

}  // namespace maskformer_fast
