#include "points/kernels.h"

#include "common/elements.h"
#include "common/pixel_loss.h"
#include "common/simd.h"

namespace maskformer_fast {
namespace MF_ISA {
namespace {

static_assert(kLanes <= kMostPointLanes && kChunk % kLanes == 0, "lanes of sums have room, chunks are whole vectors");

// Rows and targets whose products are in registers together.
#if defined(__AVX512F__)
constexpr int kRows = 2 * kBlock, kTargets = 3;
#else
constexpr int kRows = kBlock, kTargets = 2;
#endif

MF_INLINE Ints present(int64_t left_over) { return lane_numbers() < static_cast<int32_t>(left_over); }

// Position less its fraction, in -1..limit, and the fraction. Not finite: the limit or -1, which read zeros.
MF_INLINE Ints floor(Floats x, int64_t limit, Floats& fraction) {
  const Floats inner = max(min(x, broadcast(static_cast<float>(limit))), broadcast(-1.0f));
  Ints whole = __builtin_convertvector(inner, Ints);
  whole += (Ints)(__builtin_convertvector(whole, Floats) > inner);  // true is -1
  fraction = inner - __builtin_convertvector(whole, Floats);
  return whole;
}

struct Axes {
  Floats x, y;
};

// Splits x, y, x, y, ... of two vectors.
MF_INLINE Axes split(Floats a, Floats b) {
#if defined(__AVX512F__)
  const __m512i even = (__m512i)(2 * lane_numbers()), odd = (__m512i)(2 * lane_numbers() + 1);
  return {_mm512_permutex2var_ps(a, even, b), _mm512_permutex2var_ps(a, odd, b)};
#elif defined(__AVX2__)
  const Ints order = {0, 1, 4, 5, 2, 3, 6, 7};  // of halves of registers, within which shuffles work
  return {permute(_mm256_shuffle_ps(a, b, 0x88), order), permute(_mm256_shuffle_ps(a, b, 0xdd), order)};
#else
  Axes result{};
  for (int lane = 0; lane < kLanes; ++lane) {
    const Floats from = lane < kLanes / 2 ? a : b;
    result.x[lane] = from[2 * lane % kLanes];
    result.y[lane] = from[2 * lane % kLanes + 1];
  }
  return result;
#endif
}

// Two neighbours of each lane: p[cell] and p[cell + 1].
struct Neighbours {
  Floats left, right;
};

#if defined(__AVX2__)
// p[cell[k]], p[cell[k] + 1], p[cell[k + 1]], p[cell[k + 1] + 1]; the processors' gathers are slower than such loads.
MF_INLINE __m128 two_pairs(const float* p, const int32_t* cell) {
  double first, second;  // as bits: addresses are multiples of four bytes only
  __builtin_memcpy(&first, p + cell[0], sizeof first);
  __builtin_memcpy(&second, p + cell[1], sizeof second);
  return _mm_castpd_ps(_mm_set_pd(second, first));
}
MF_INLINE __m256 four_pairs(const float* p, const int32_t* cell) {
  return _mm256_set_m128(two_pairs(p, cell + 2), two_pairs(p, cell));
}
#endif

MF_INLINE Neighbours gather(const float* p, const int32_t* cell) {
#if defined(__AVX2__)
#if defined(__AVX512F__)
  const auto eight_pairs = [=](const int32_t* first) {
    const __m512d low = _mm512_zextpd256_pd512(_mm256_castps_pd(four_pairs(p, first)));
    return _mm512_castpd_ps(_mm512_maskz_insertf64x4(0xff, low, _mm256_castps_pd(four_pairs(p, first + 4)), 1));
  };
  const Axes pairs = split(eight_pairs(cell), eight_pairs(cell + 8));
#else
  const Axes pairs = split(four_pairs(p, cell), four_pairs(p, cell + 4));
#endif
  return {pairs.x, pairs.y};
#else
  Neighbours result{};
  for (int lane = 0; lane < kLanes; ++lane) {
    result.left[lane] = p[cell[lane]];
    result.right[lane] = p[cell[lane] + 1];
  }
  return result;
#endif
}

template <class Element>
void pad(const Element* map, int64_t height, int64_t width, float* padded) {
  const int64_t stride = padded_width(width);
  for (int64_t y = 0; y < height; ++y) {
    const Element* from = map + y * width;
    float* to = padded + (y + 1) * stride + 1;
    for (int64_t x = 0; x < width; x += kLanes) store_elements(to + x, load_elements(from + x, width - x), width - x);
  }
}

template <class Element>
void unpad(const float* padded, int64_t height, int64_t width, Element* map) {
  const int64_t stride = padded_width(width);
  for (int64_t y = 0; y < height; ++y) {
    const float* from = padded + (y + 1) * stride + 1;
    Element* to = map + y * width;
    for (int64_t x = 0; x < width; x += kLanes) store_elements(to + x, load_elements(from + x, width - x), width - x);
  }
}

template <class Element>
void copy(const Element* logits, int64_t count, float* result) {
  for (int64_t i = 0; i < count; i += kLanes) {
    store_elements(result + i, load_elements(logits + i, count - i), count - i);
  }
}

// Logarithm of numbers >= 1 that are finite.
MF_INLINE Floats log_above_one(Floats x) {
  const Ints bits = (Ints)x, exponent = (bits >> 23) - 127;
  const Floats mantissa = (Floats)((bits & 0x7fffff) | 0x3f800000);
  return __builtin_convertvector(exponent, Floats) * 0.693147180559945f + log1p_unit(mantissa - 1.0f);
}

MF_INLINE void add_to(float* sums, Floats x) { store(sums, load(sums) + x); }

template <Exponent exponent>
void losses(const float* logits, int64_t count, const FocalLoss& loss, QueryLanes& lanes, float* probability,
            float* rise) {
  Floats all_p{}, all_off{}, broken{};
  for (int64_t i = 0; i < count; i += kLanes) {
    const Floats x = load(logits + i);
    const PixelLoss pixel = pixel_loss<exponent>(x, loss);
    const Ints valid = present(count - i);
    const Floats off = select(valid, pixel.off_weight * pixel.off, Floats{});
    const Floats on = select(valid, pixel.on_weight * pixel.on, Floats{});
    const Floats p = select(valid, pixel.probability, Floats{});
    store(probability + i, p);
    store(rise + i, on - off);
    all_p += p;
    all_off += off;
    broken += select(valid, x * 0.0f, Floats{});  // exp clamps, which would hide NaN and infinities
  }
  add_to(lanes.probability, all_p);
  add_to(lanes.off_loss, all_off);
  add_to(lanes.broken, broken);
}

// The losses of cross-entropy without weights: those with the target on and off differ by x, and the logarithms of many
// points are one of a product, of at most 2^kFactors.
void cross_entropies(const float* logits, int64_t count, QueryLanes& lanes, float* probability, float* rise) {
  constexpr int64_t kFactors = 32;
  Floats all_p{}, all_off{}, broken{};
  for (int64_t first = 0; first < count; first += kFactors * kLanes) {
    const int64_t last = first + kFactors * kLanes < count ? first + kFactors * kLanes : count;
    Floats product = broadcast(1.0f);
    for (int64_t i = first; i < last; i += kLanes) {
      const Ints valid = present(last - i);
      const Floats x = select(valid, load(logits + i), broadcast(-88.0f));  // of probability and loss 0 in float
      const Ints positive = x > 0.0f;
      const Floats e = exp(select(positive, -x, x)), sum = 1.0f + e, reciprocal = 1.0f / sum;
      const Floats p = select(valid, select(positive, reciprocal, e * reciprocal), Floats{});
      store(probability + i, p);
      store(rise + i, select(valid, -x, Floats{}));
      all_p += p;
      all_off += max(x, Floats{});
      product *= sum;
      broken += x * 0.0f;
    }
    all_off += log_above_one(product);
  }
  add_to(lanes.probability, all_p);
  add_to(lanes.off_loss, all_off);
  add_to(lanes.broken, broken);
}

// Row of the values of a block: probabilities first.
MF_INLINE const float* row_of(const BlockValues& values, int row) {
  return row < kBlock ? values.probability[row] : values.rise[row - kBlock];
}
MF_INLINE float* lanes_of(PairLanes& pair, int row) {
  return row < kBlock ? pair.probability[row] : pair.rise[row - kBlock];
}

template <int targets>
void multiply(const BlockValues& values, const float* truth, int64_t stride, int64_t count, PairLanes* pairs) {
  for (int first = 0; first < 2 * kBlock; first += kRows) {
    Floats sums[kRows][targets] = {};
    for (int64_t i = 0; i < count; i += kLanes) {
      Floats on[targets];
      for (int t = 0; t < targets; ++t) on[t] = load_elements(truth + t * stride + i, count - i);
#pragma GCC unroll 8
      for (int row = 0; row < kRows; ++row) {
        const Floats value = load(row_of(values, first + row) + i);
        for (int t = 0; t < targets; ++t) sums[row][t] += value * on[t];
      }
    }
    for (int row = 0; row < kRows; ++row) {
      for (int t = 0; t < targets; ++t) add_to(lanes_of(pairs[t], first + row), sums[row][t]);
    }
  }
}

template <Exponent exponent>
void sums_of(const float* logits, const float* truth, int64_t count, const FocalLoss& loss, double* sums) {
  Floats all_loss{}, overlap{}, all_p{}, area{};
  for (int64_t i = 0; i < count; i += kLanes) {
    const Floats x = load(logits + i), t = load_elements(truth + i, count - i);
    const PixelLoss pixel = pixel_loss<exponent>(x, loss);
    const Floats off = pixel.off_weight * pixel.off, on = pixel.on_weight * pixel.on;
    const Ints valid = present(count - i);
    const Floats broken = x * 0.0f, p = select(valid, pixel.probability + broken, Floats{});
    all_loss += select(valid, off + t * (on - off) + broken, Floats{});
    overlap += p * t;
    all_p += p;
    area += t;
  }
  sums[0] += static_cast<double>(sum(all_loss));
  sums[1] += static_cast<double>(sum(overlap));
  sums[2] += static_cast<double>(sum(all_p));
  sums[3] += static_cast<double>(sum(area));
}

template <Exponent exponent>
void gradients_of(const float* logits, const float* truth, int64_t count, const FocalLoss& loss, const float* upstream,
                  float* gradient) {
  for (int64_t i = 0; i < count; i += kLanes) {
    const Floats x = load(logits + i), t = load_elements(truth + i, count - i);
    const PixelLoss pixel = pixel_loss<exponent>(x, loss);
    const Floats p = pixel.probability, q = pixel.rest;
    Floats off = p, on = -q;  // derivatives of softplus(x) and softplus(-x)
    if (exponent != Exponent::zero) {
      off += loss.gamma * q * pixel.off;
      on -= loss.gamma * p * pixel.on;
    }
    off *= pixel.off_weight, on *= pixel.on_weight;
    store(gradient + i, upstream[0] * (off + t * (on - off)) + p * q * (upstream[1] * t + upstream[2]) + x * 0.0f);
  }
}

}  // namespace

void place_points(const float* points, int64_t count, int64_t extent_height, int64_t extent_width, int64_t height,
                  int64_t width, Places& places) {
  for (int64_t i = 0; i < count; i += kLanes) {
    const float* from = points + 2 * i;
    const Axes at = split(load_elements(from, 2 * (count - i)), load_elements(from + kLanes, 2 * (count - i) - kLanes));
    Floats right, low;
    store(places.column + i, floor(at.x * static_cast<float>(extent_width) - 0.5f, width, right));
    store(places.row + i, floor(at.y * static_cast<float>(extent_height) - 0.5f, height, low));
    store(places.right + i, right);
    store(places.low + i, low);
  }
}

void pad_map(const float* map, int64_t height, int64_t width, float* padded) { pad(map, height, width, padded); }
void pad_map(const uint16_t* map, int64_t height, int64_t width, float* padded) { pad(map, height, width, padded); }
void unpad_map(const float* padded, int64_t height, int64_t width, float* map) { unpad(padded, height, width, map); }
void unpad_map(const float* padded, int64_t height, int64_t width, uint16_t* map) {
  unpad(padded, height, width, map);
}
void copy_logits(const float* logits, int64_t count, float* result) { copy(logits, count, result); }
void copy_logits(const uint16_t* logits, int64_t count, float* result) { copy(logits, count, result); }

void sample_map(const float* padded, int64_t width, const Places& places, int64_t count, float* result) {
  const int64_t stride = padded_width(width);
  const float* origin = padded + stride + 1;
  for (int64_t i = 0; i < count; i += kLanes) {
    int32_t cell[kLanes];
    store(cell, load_ints(places.row + i) * static_cast<int32_t>(stride) + load_ints(places.column + i));
    const Floats right = load(places.right + i), low = load(places.low + i);
    const Neighbours above = gather(origin, cell), below = gather(origin + stride, cell);
    const Floats upper = (1.0f - right) * above.left + right * above.right;
    const Floats lower = (1.0f - right) * below.left + right * below.right;
    store(result + i, (1.0f - low) * upper + low * lower);
  }
}

void sample_dense(const float* map, int64_t height, int64_t width, const Places& places, int64_t count,
                  float* result) {
  constexpr int64_t kAhead = 32;  // points; in no order, so that the processor does not foresee what is read
  const auto inner = [=](int64_t row, int64_t column) {
    return row >= 0 && row < height && column >= 0 && column < width ? map[row * width + column] : 0.0f;
  };
  const auto cells = [&](int64_t i) {
    return load_ints(places.row + i) * static_cast<int32_t>(width) + load_ints(places.column + i);
  };
  const Ints last_row = broadcast(static_cast<int32_t>(height - 1));
  const Ints last_column = broadcast(static_cast<int32_t>(width - 1));
  for (int64_t i = 0; i < count; i += kLanes) {
    if (i + kAhead + kLanes <= count) {
      int32_t later[kLanes];
      store(later, cells(i + kAhead));
      for (const int32_t cell : later) {  // a prefetch outside of the map does nothing
        const uintptr_t address = reinterpret_cast<uintptr_t>(map) + 4 * static_cast<int64_t>(cell);
        __builtin_prefetch(reinterpret_cast<const void*>(address));
        __builtin_prefetch(reinterpret_cast<const void*>(address + 4 * width));
      }
    }
    const Ints row = load_ints(places.row + i), column = load_ints(places.column + i);
    const Ints inside = (row >= 0) & (column >= 0) & (row < last_row) & (column < last_column);
    if (i + kLanes <= count && lane_bits(inside) == (uint64_t{1} << kLanes) - 1) {
      int32_t cell[kLanes];
      store(cell, cells(i));
      const Floats right = load(places.right + i), low = load(places.low + i);
      const Neighbours above = gather(map, cell), below = gather(map + width, cell);
      const Floats upper = (1.0f - right) * above.left + right * above.right;
      const Floats lower = (1.0f - right) * below.left + right * below.right;
      store(result + i, (1.0f - low) * upper + low * lower);
      continue;
    }
    for (int64_t k = i; k < i + kLanes && k < count; ++k) {
      const int64_t y = places.row[k], x = places.column[k];
      const float right = places.right[k], low = places.low[k];
      const float upper = (1.0f - right) * inner(y, x) + right * inner(y, x + 1);
      const float lower = (1.0f - right) * inner(y + 1, x) + right * inner(y + 1, x + 1);
      result[k] = (1.0f - low) * upper + low * lower;
    }
  }
}

void add_losses(const float* logits, int64_t count, const FocalLoss& loss, QueryLanes& lanes, int query,
                BlockValues& values) {
  const Exponent exponent = exponent_of(loss);
  if (exponent == Exponent::zero && loss.on_weight == 1.0f && loss.off_weight == 1.0f) {
    return cross_entropies(logits, count, lanes, values.probability[query], values.rise[query]);
  }
  const auto chosen = exponent == Exponent::zero  ? losses<Exponent::zero>
                      : exponent == Exponent::two ? losses<Exponent::two>
                                                  : losses<Exponent::other>;
  chosen(logits, count, loss, lanes, values.probability[query], values.rise[query]);
}

void add_products(const BlockValues& values, const float* truth, int64_t stride, int64_t targets, int64_t count,
                  PairLanes* pairs) {
  int64_t t = 0;
  for (; t + kTargets <= targets; t += kTargets) {
    multiply<kTargets>(values, truth + t * stride, stride, count, pairs + t);
  }
  for (; t < targets; ++t) multiply<1>(values, truth + t * stride, stride, count, pairs + t);
}

void add_sums(const float* logits, const float* truth, int64_t count, const FocalLoss& loss, double* sums) {
  const Exponent exponent = exponent_of(loss);
  const auto chosen = exponent == Exponent::zero  ? sums_of<Exponent::zero>
                      : exponent == Exponent::two ? sums_of<Exponent::two>
                                                  : sums_of<Exponent::other>;
  chosen(logits, truth, count, loss, sums);
}

void differentiate_sums(const float* logits, const float* truth, int64_t count, const FocalLoss& loss,
                        const float* upstream, float* gradient) {
  const Exponent exponent = exponent_of(loss);
  const auto chosen = exponent == Exponent::zero  ? gradients_of<Exponent::zero>
                      : exponent == Exponent::two ? gradients_of<Exponent::two>
                                                  : gradients_of<Exponent::other>;
  chosen(logits, truth, count, loss, upstream, gradient);
}

void scatter(const float* gradient, const Places& places, int64_t count, int64_t width, float* padded) {
  const int64_t stride = padded_width(width);
  float* origin = padded + stride + 1;
  for (int64_t i = 0; i < count; ++i) {
    float* cell = origin + places.row[i] * stride + places.column[i];
    const float lower = places.low[i] * gradient[i], upper = gradient[i] - lower, right = places.right[i];
    cell[0] += (1.0f - right) * upper;
    cell[1] += right * upper;
    cell[stride] += (1.0f - right) * lower;
    cell[stride + 1] += right * lower;
  }
}

double total(const float* values, int64_t count) {
  Floats sums{};
  for (int64_t i = 0; i < count; i += kLanes) sums += load_elements(values + i, count - i);
  return static_cast<double>(sum(sums));
}

}  // namespace MF_ISA
}  // namespace maskformer_fast
