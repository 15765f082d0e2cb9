// Vectors of float for kernel files (cpu_isa.h), by GCC's and Clang's vector extensions. A vector is as wide as a
// register of the instruction set. Every function is inlined into its caller.
#pragma once

#include <cstdint>

#if defined(__AVX2__)
#if !defined(__clang__)
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // GCC's own header starts vectors from themselves
#endif
#include <immintrin.h>
#if !defined(__clang__)
#pragma GCC diagnostic pop
#endif
#endif

#define MF_INLINE static inline __attribute__((always_inline))

namespace maskformer_fast {
namespace MF_ISA {

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX2__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif

typedef float Floats __attribute__((vector_size(4 * kLanes)));
typedef int32_t Ints __attribute__((vector_size(4 * kLanes)));

MF_INLINE Floats load(const float* p) {
  Floats x;
  __builtin_memcpy(&x, p, sizeof x);
  return x;
}
MF_INLINE Ints load_ints(const int32_t* p) {
  Ints x;
  __builtin_memcpy(&x, p, sizeof x);
  return x;
}
MF_INLINE void store(float* p, Floats x) { __builtin_memcpy(p, &x, sizeof x); }
MF_INLINE void store(int32_t* p, Ints x) { __builtin_memcpy(p, &x, sizeof x); }
// x - 0 is x, so that this is a load of one number to all lanes; x + 0 would be an addition, for the sake of -0.
MF_INLINE Floats broadcast(float x) { return x - Floats{}; }
MF_INLINE Ints broadcast(int32_t x) { return Ints{} + x; }

MF_INLINE Floats select(Ints mask, Floats a, Floats b) { return mask ? a : b; }
MF_INLINE Ints select(Ints mask, Ints a, Ints b) { return mask ? a : b; }
// Both return b where a is NaN, as the processors' instructions do.
MF_INLINE Floats max(Floats a, Floats b) { return a > b ? a : b; }
MF_INLINE Floats min(Floats a, Floats b) { return a < b ? a : b; }

// Returns 0, 1, 2, ...
MF_INLINE Ints lane_numbers() {
  Ints x{};
  for (int lane = 0; lane < kLanes; ++lane) x[lane] = lane;
  return x;
}

// Returns x[lanes[0]], x[lanes[1]], ...; each entry of `lanes` is in 0..kLanes-1.
MF_INLINE Floats permute(Floats x, Ints lanes) {
#if defined(__AVX512F__)
  return _mm512_maskz_permutexvar_ps(0xffff, (__m512i)lanes, x);  // GCC warns of the intrinsic without a mask
#elif defined(__AVX2__)
  return _mm256_permutevar8x32_ps(x, (__m256i)lanes);
#else
  Floats y{};
  for (int lane = 0; lane < kLanes; ++lane) y[lane] = x[lanes[lane]];
  return y;
#endif
}

// Returns the lanes of a comparison's result, one bit each.
MF_INLINE uint64_t lane_bits(Ints mask) {
#if defined(__AVX512F__)
  return _mm512_movepi32_mask((__m512i)mask);
#elif defined(__AVX2__)
  return static_cast<unsigned>(_mm256_movemask_ps((__m256)mask));
#else
  uint64_t bits = 0;
  for (int l = 0; l < kLanes; ++l) bits |= static_cast<uint64_t>(mask[l] & 1) << l;
  return bits;
#endif
}

// Returns the largest lane.
MF_INLINE float highest(Floats x) {
#if defined(__AVX512F__)
  return _mm512_reduce_max_ps(x);
#elif defined(__AVX2__)
  __m128 y = _mm_max_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
  y = _mm_max_ps(y, _mm_movehl_ps(y, y));
  return _mm_cvtss_f32(_mm_max_ss(y, _mm_movehdup_ps(y)));
#else
  float y = x[0];
  for (int lane = 1; lane < kLanes; ++lane) y = y > x[lane] ? y : x[lane];
  return y;
#endif
}

// Adds up all lanes.
MF_INLINE float sum(Floats x) {
  for (int step = kLanes / 2; step > 0; step /= 2) x += permute(x, lane_numbers() ^ step);
  return x[0];
}
MF_INLINE int64_t sum(Ints x) {
  for (int step = kLanes / 2; step > 0; step /= 2) x += (Ints)permute((Floats)x, lane_numbers() ^ step);
  return x[0];
}

// Computes 2^f for f in [-0.5, 0.5] by a minimax polynomial.
MF_INLINE Floats exp2_fraction(Floats f) {
  Floats p = broadcast(1.535336188319500e-4f);
  p = p * f + 1.339887440266574e-3f;
  p = p * f + 9.618437357674640e-3f;
  p = p * f + 5.550332471162809e-2f;
  p = p * f + 2.402264791363012e-1f;
  p = p * f + 6.931472028550421e-1f;
  p = p * f + 1.0f;
  return p;
}

// Computes e^x within 2 units in the last place. x is clamped to [-87, 87].
MF_INLINE Floats exp(Floats x) {
  const Floats t = max(min(x, broadcast(87.0f)), broadcast(-87.0f)) * 1.44269504088896f;
  const Floats rounded = (t + 12582912.0f) - 12582912.0f;  // 1.5 * 2^23: rounds to the nearest integer
  const Floats f = t - rounded;
  return (Floats)((Ints)exp2_fraction(f) + (__builtin_convertvector(rounded, Ints) << 23));
}

// Computes log(1 + e) for e in [0, 1] by a minimax polynomial, with relative error 3e-8.
MF_INLINE Floats log1p_unit(Floats e) {
  Floats p = broadcast(5.232694303e-03f);
  p = p * e - 2.950523893e-02f;
  p = p * e + 7.822595212e-02f;
  p = p * e - 1.366324582e-01f;
  p = p * e + 1.910600677e-01f;
  p = p * e - 2.484298222e-01f;
  p = p * e + 3.331909681e-01f;
  p = p * e - 4.999949314e-01f;
  p = p * e + 9.999999699e-01f;
  return p * e;
}

MF_INLINE Floats sigmoid(Floats x) { return 1.0f / (1.0f + exp(-x)); }

}  // namespace MF_ISA
}  // namespace maskformer_fast
