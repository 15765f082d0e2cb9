#include "map_cost/kernels.h"

#include "common/elements.h"
#include "common/pixel_loss.h"
#include "common/simd.h"
#include "common/transpose.h"

namespace maskformer_fast {
namespace MF_ISA {
namespace {

constexpr int kVectors = kMapQueries / kLanes;
static_assert(kMapQueries % kLanes == 0, "queries are whole vectors");

// Targets whose products are in registers together.
constexpr int kTargets = kLanes == 16 ? 6 : kLanes == 8 ? 3 : 1;

template <class Element>
MF_INLINE void transpose_block(const Element* maps, int64_t stride, int64_t queries, int64_t width, float* row) {
  const Element* rows[kMapQueries];
  for (int64_t q = 0; q < kMapQueries; ++q) rows[q] = maps + (q < queries ? q : 0) * stride;
  for (int64_t q = 0; q < kMapQueries; q += kLanes) transpose(rows + q, queries - q, 0, width, row + q, kMapQueries);
}

MF_INLINE void add_to(double* sums, Floats x) {
  for (int lane = 0; lane < kLanes; ++lane) sums[lane] += static_cast<double>(x[lane]);
}

// Logarithm of numbers >= 1 that are finite.
MF_INLINE Floats log_above_one(Floats x) {
  const Ints bits = (Ints)x, exponent = (bits >> 23) - 127;
  const Floats mantissa = (Floats)((bits & 0x7fffff) | 0x3f800000);
  return __builtin_convertvector(exponent, Floats) * 0.693147180559945f + log1p_unit(mantissa - 1.0f);
}

// Cross-entropy without weights: losses with the target on and off differ by the logit, and the logarithms of many
// points are one of a product, of at most 2^kFactors.
MF_INLINE void cross_entropies(MapValues& values, int64_t count, int lane, MapSums& sums) {
  constexpr int64_t kFactors = 32;
  Floats all_p{}, all_off{}, broken{};
  for (int64_t first = 0; first < count; first += kFactors) {
    const int64_t last = first + kFactors < count ? first + kFactors : count;
    Floats product = broadcast(1.0f);
    for (int64_t i = first; i < last; ++i) {
      const Floats x = load(values.rise[i] + lane);
      const Ints positive = x > 0.0f;
      const Floats e = exp(select(positive, -x, x)), sum = 1.0f + e, reciprocal = 1.0f / sum;
      const Floats p = select(positive, reciprocal, e * reciprocal);
      store(values.probability[i] + lane, p);
      store(values.rise[i] + lane, -x);
      all_p += p;
      all_off += max(x, Floats{});
      product *= sum;
      broken += x * 0.0f;  // exp clamps, which would hide NaN and infinities
    }
    all_off += log_above_one(product);
  }
  add_to(sums.probability + lane, all_p);
  add_to(sums.off_loss + lane, all_off);
  add_to(sums.broken + lane, broken);
}

template <Exponent exponent>
void losses(MapValues& values, int64_t count, const FocalLoss& loss, int lane, MapSums& sums) {
  Floats all_p{}, all_off{}, broken{};
  for (int64_t i = 0; i < count; ++i) {
    const Floats x = load(values.rise[i] + lane);
    const PixelLoss pixel = pixel_loss<exponent>(x, loss);
    const Floats off = pixel.off_weight * pixel.off;
    store(values.probability[i] + lane, pixel.probability);
    store(values.rise[i] + lane, pixel.on_weight * pixel.on - off);
    all_p += pixel.probability;
    all_off += off;
    broken += x * 0.0f;
  }
  add_to(sums.probability + lane, all_p);
  add_to(sums.off_loss + lane, all_off);
  add_to(sums.broken + lane, broken);
}

template <int targets>
MF_INLINE void multiply(const MapValues& values, const float* truth, int64_t stride, int64_t count,
                        MapPairSums* pairs) {
  Floats p[targets][kVectors] = {}, rise[targets][kVectors] = {};
  for (int64_t i = 0; i < count; ++i) {
    for (int v = 0; v < kVectors; ++v) {
      const Floats probability = load(values.probability[i] + v * kLanes), change = load(values.rise[i] + v * kLanes);
#pragma GCC unroll 8
      for (int t = 0; t < targets; ++t) {
        const Floats on = broadcast(truth[i * stride + t]);
        p[t][v] += probability * on;
        rise[t][v] += change * on;
      }
    }
  }
  for (int t = 0; t < targets; ++t) {
    for (int v = 0; v < kVectors; ++v) {
      add_to(pairs[t].probability + v * kLanes, p[t][v]);
      add_to(pairs[t].rise + v * kLanes, rise[t][v]);
    }
  }
}

}  // namespace

void transpose_row(const float* maps, int64_t stride, int64_t queries, int64_t width, float* row) {
  transpose_block(maps, stride, queries, width, row);
}
void transpose_row(const uint16_t* maps, int64_t stride, int64_t queries, int64_t width, float* row) {
  transpose_block(maps, stride, queries, width, row);
}

void sample_rows(const float* upper, const float* lower, const SortedPoints& points, int64_t first, int64_t count,
                 float* logits) {
  for (int64_t i = 0; i < count; ++i) {
    const float right = points.right[first + i], low = points.low[first + i];
    const int64_t place = (points.column[first + i] + 1) * kMapQueries;
    for (int v = 0; v < kMapQueries; v += kLanes) {
      const float *above = upper + place + v, *below = lower + place + v;
      const Floats a = (1.0f - right) * load(above) + right * load(above + kMapQueries);
      const Floats b = (1.0f - right) * load(below) + right * load(below + kMapQueries);
      store(logits + i * kMapQueries + v, (1.0f - low) * a + low * b);
    }
  }
}

void add_map_losses(MapValues& values, int64_t count, const FocalLoss& loss, MapSums& sums) {
  const Exponent exponent = exponent_of(loss);
  const bool plain = exponent == Exponent::zero && loss.on_weight == 1.0f && loss.off_weight == 1.0f;
  const auto chosen = exponent == Exponent::zero  ? losses<Exponent::zero>
                      : exponent == Exponent::two ? losses<Exponent::two>
                                                  : losses<Exponent::other>;
  for (int lane = 0; lane < kMapQueries; lane += kLanes) {
    if (plain) {
      cross_entropies(values, count, lane, sums);
    } else {
      chosen(values, count, loss, lane, sums);
    }
  }
}

void add_map_products(const MapValues& values, const float* truth, int64_t count, int64_t targets,
                      MapPairSums* pairs) {
  int64_t t = 0;
  for (; t + kTargets <= targets; t += kTargets) multiply<kTargets>(values, truth + t, targets, count, pairs + t);
  for (; t < targets; ++t) multiply<1>(values, truth + t, targets, count, pairs + t);
}

void add_sparse_products(const MapValues& values, const TargetPoints* targets, int64_t count, MapPairSums* pairs) {
  for (const TargetPoints* target = targets; target < targets + count; ++target) {
    Floats p[kVectors] = {}, rise[kVectors] = {};
    for (int32_t k = 0; k < target->count; ++k) {
      const int32_t i = target->numbers[k];
      const Floats on = broadcast(target->truth[k]);
      for (int v = 0; v < kVectors; ++v) {
        p[v] += load(values.probability[i] + v * kLanes) * on;
        rise[v] += load(values.rise[i] + v * kLanes) * on;
      }
    }
    MapPairSums& pair = pairs[target->target];
    for (int v = 0; v < kVectors; ++v) {
      add_to(pair.probability + v * kLanes, p[v]);
      add_to(pair.rise + v * kLanes, rise[v]);
    }
  }
}

}  // namespace MF_ISA
}  // namespace maskformer_fast
