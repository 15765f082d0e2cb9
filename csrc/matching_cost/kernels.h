// The inner loops of the matching cost, compiled once for each instruction set (cpu_isa.h).
//
// They work on tiles: the mask logits of kTilePixels pixels and kTileQueries queries, [pixel][query], which stay in the
// first-level cache from the product that makes them to the sums that use them.
#pragma once

#include <cstdint>

namespace maskformer_fast {

constexpr int kTilePixels = 96;
constexpr int kTileQueries = 32;

// Loss of a pixel with logit x, sp = softplus, p = sigmoid:
//   where the target is on   on_weight * (1 - p)^gamma * sp(-x)
//   where it is off          off_weight * p^gamma * sp(x)
struct FocalLoss {
  float on_weight;
  float off_weight;
  float gamma;
};

// Consecutive pixels of a tile that the same targets cover: targets[first_target .. last_target).
struct Run {
  int pixels;
  int first_target;
  int last_target;
};

// Sums over pixels, for kTileQueries queries side by side.
struct QuerySums {
  float probability[kTileQueries];
  float off_loss[kTileQueries];  // the loss where the target is off
  float broken[kTileQueries];    // 0 where all logits are finite, else NaN
};
struct PairSums {  // over the pixels that the target covers
  float probability[kTileQueries];
  float rise[kTileQueries];  // what the loss rises by where the target is on
};

#define MF_DECLARE(ISA)                                                                                               \
  namespace ISA {                                                                                                     \
  /* logits = pixels^T embeddings; pixels: [depth][kTilePixels], embeddings: [depth][kTileQueries] */                 \
  void multiply_tile(int64_t depth, const float* pixels, const float* embeddings, float* logits);                     \
  /* Adds a tile to the sums of its queries and of every target that covers some of its pixels. */                    \
  void add_tile(const float* logits, const Run* runs, int run_count, const int* targets, const FocalLoss& loss,       \
                QuerySums& queries, PairSums* pairs);                                                                 \
  /* softmax(logits)[chosen[i]] for each of `count` choices */                                                        \
  void chosen_probabilities(const float* logits, int64_t classes, const int64_t* chosen, int64_t count, float* out);  \
  }
MF_DECLARE(baseline)
#if defined(__x86_64__)
MF_DECLARE(avx2)
MF_DECLARE(avx512)
#endif
#undef MF_DECLARE

}  // namespace maskformer_fast
