#include "matching_cost/kernels.h"

#include "common/pixel_loss.h"
#include "common/simd.h"
#include "common/transpose.h"

namespace maskformer_fast {
namespace MF_ISA {
namespace {

// Pixels and vectors of queries whose logits are in registers during one pass over the depth.
#if defined(__AVX512F__)
constexpr int kPixels = 12;
#else
constexpr int kPixels = 6;
#endif
constexpr int kVectors = 2;
static_assert(kTilePixels % kPixels == 0 && kTileQueries % (kVectors * kLanes) == 0, "full tiles only");

template <Exponent exponent>
void add(const float* logits, int present, const Run* runs, int run_count, const int* targets, const FocalLoss& loss,
         QuerySums& queries, PairSums* pairs) {
  for (int first = 0; first < present; first += kLanes) {
    const float* logit = logits + first;
    Floats all_p{}, all_off{}, broken{};
    for (int r = 0; r < run_count; ++r) {
      Floats run_p{}, run_on{}, run_off{};
      for (int i = 0; i < runs[r].pixels; ++i, logit += kTileQueries) {
        const Floats x = load(logit);
        const PixelLoss pixel = pixel_loss<exponent>(x, loss);
        run_p += pixel.probability;
        run_on += pixel.on_weight * pixel.on;
        run_off += pixel.off_weight * pixel.off;
        broken += x * 0.0f;  // exp clamps, which would hide NaN and infinities
      }
      all_p += run_p;
      all_off += run_off;
      const Floats rise = run_on - run_off;
      for (int k = runs[r].first_target; k < runs[r].last_target; ++k) {
        PairSums& pair = pairs[targets[k]];
        store(pair.probability + first, load(pair.probability + first) + run_p);
        store(pair.rise + first, load(pair.rise + first) + rise);
      }
    }
    store(queries.probability + first, load(queries.probability + first) + all_p);
    store(queries.off_loss + first, load(queries.off_loss + first) + all_off);
    store(queries.broken + first, load(queries.broken + first) + broken);
  }
}

}  // namespace

void multiply_tile(int64_t depth, const float* pixels, const float* embeddings, float* logits) {
  for (int query = 0; query < kTileQueries; query += kVectors * kLanes) {
    for (int pixel = 0; pixel < kTilePixels; pixel += kPixels) {
      Floats sum[kPixels][kVectors] = {};
      for (int64_t d = 0; d < depth; ++d) {
        Floats embedding[kVectors];
        for (int v = 0; v < kVectors; ++v) embedding[v] = load(embeddings + d * kTileQueries + query + v * kLanes);
#pragma GCC unroll 16
        for (int i = 0; i < kPixels; ++i) {
          const Floats value = broadcast(pixels[d * kTilePixels + pixel + i]);
          for (int v = 0; v < kVectors; ++v) sum[i][v] += value * embedding[v];
        }
      }
      for (int i = 0; i < kPixels; ++i) {
        for (int v = 0; v < kVectors; ++v) store(logits + (pixel + i) * kTileQueries + query + v * kLanes, sum[i][v]);
      }
    }
  }
}

void transpose_logits(const float* const* maps, int64_t queries, int64_t first, int64_t pixels, float* logits) {
  for (int64_t query = 0; query < queries; query += kLanes) {
    transpose(maps + query, queries - query, first, pixels, logits + query, kTileQueries);
  }
}

void add_tile(const float* logits, int present, const Run* runs, int run_count, const int* targets,
              const FocalLoss& loss, QuerySums& queries, PairSums* pairs) {
  const Exponent exponent = exponent_of(loss);
  const auto chosen = exponent == Exponent::zero  ? add<Exponent::zero>
                      : exponent == Exponent::two ? add<Exponent::two>
                                                  : add<Exponent::other>;
  chosen(logits, present, runs, run_count, targets, loss, queries, pairs);
}

void chosen_probabilities(const float* logits, int64_t classes, const int64_t* chosen, int64_t count, float* out) {
  float largest = logits[0];
  bool invalid = false;
  for (int64_t c = 0; c < classes; ++c) {
    largest = logits[c] > largest ? logits[c] : largest;
    invalid |= logits[c] != logits[c];
  }
  const float broken = invalid ? __builtin_nanf("") : largest * 0.0f;  // exp clamps, which would hide NaN
  Floats sums{};
  int64_t c = 0;
  for (; c + kLanes <= classes; c += kLanes) sums += exp(load(logits + c) - largest);
  float total = sum(sums);
  for (; c < classes; ++c) total += exp(broadcast(logits[c] - largest))[0];
  for (int64_t i = 0; i < count; ++i) out[i] = exp(broadcast(logits[chosen[i]] - largest))[0] / total + broken;
}

}  // namespace MF_ISA
}  // namespace maskformer_fast
