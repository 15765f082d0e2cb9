// Vectors of float for the files that are compiled once for each instruction set (cpu_isa.h): GCC's and Clang's vector
// extensions, as wide as the registers of that instruction set. Every function is inlined into its caller.
#pragma once

#include <cstdint>

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
MF_INLINE void store(float* p, Floats x) { __builtin_memcpy(p, &x, sizeof x); }
MF_INLINE void store(int32_t* p, Ints x) { __builtin_memcpy(p, &x, sizeof x); }
MF_INLINE Floats broadcast(float x) { return Floats{} + x; }
MF_INLINE Ints broadcast(int32_t x) { return Ints{} + x; }

MF_INLINE Floats select(Ints mask, Floats a, Floats b) { return mask ? a : b; }
MF_INLINE Ints select(Ints mask, Ints a, Ints b) { return mask ? a : b; }
// b where a is NaN, as the processors' instructions have it
MF_INLINE Floats max(Floats a, Floats b) { return a > b ? a : b; }
MF_INLINE Floats min(Floats a, Floats b) { return a < b ? a : b; }

// e^x within 2 units in the last place for |x| <= 87; clamped to that range.
MF_INLINE Floats exp(Floats x) {
  const Floats t = max(min(x, broadcast(87.0f)), broadcast(-87.0f)) * 1.44269504088896f;
  const Floats whole = (t + 12582912.0f) - 12582912.0f;  // 1.5 * 2^23: rounds to the nearest integer
  const Floats f = t - whole;
  // minimax polynomial of 2^f on [-0.5, 0.5]
  Floats p = broadcast(1.535336188319500e-4f);
  p = p * f + 1.339887440266574e-3f;
  p = p * f + 9.618437357674640e-3f;
  p = p * f + 5.550332471162809e-2f;
  p = p * f + 2.402264791363012e-1f;
  p = p * f + 6.931472028550421e-1f;
  p = p * f + 1.0f;
  return (Floats)((Ints)p + (__builtin_convertvector(whole, Ints) << 23));
}

MF_INLINE Floats sigmoid(Floats x) { return 1.0f / (1.0f + exp(-x)); }

}  // namespace MF_ISA
}  // namespace maskformer_fast
