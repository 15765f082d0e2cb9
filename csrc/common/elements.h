// Vectors of float from and to memory that holds float, or bfloat16 as uint16_t; for kernel files (cpu_isa.h).
#pragma once

#include "common/simd.h"

namespace maskformer_fast {
namespace MF_ISA {

typedef uint16_t Halves __attribute__((vector_size(2 * kLanes)));
typedef uint32_t Words __attribute__((vector_size(4 * kLanes)));

MF_INLINE Floats load_elements(const float* p) { return load(p); }
MF_INLINE Floats load_elements(const uint16_t* p) {
  Halves x;
  __builtin_memcpy(&x, p, sizeof x);
  return (Floats)(__builtin_convertvector(x, Words) << 16);
}

MF_INLINE float load_element(const float* p) { return *p; }
MF_INLINE float load_element(const uint16_t* p) {
  const uint32_t bits = (uint32_t)*p << 16;
  float x;
  __builtin_memcpy(&x, &bits, sizeof x);
  return x;
}

// Loads the first `count` lanes, zeros into the others. Reads nothing beyond.
template <class Element>
MF_INLINE Floats load_elements(const Element* p, int64_t count) {
  if (count >= kLanes) return load_elements(p);
  Floats x{};
  for (int64_t lane = 0; lane < count; ++lane) x[lane] = load_element(p + lane);
  return x;
}
#if defined(__AVX512F__)
MF_INLINE Floats load_elements(const float* p, int64_t count) {
  return _mm512_maskz_loadu_ps(count >= kLanes ? 0xffff : count > 0 ? (1 << count) - 1 : 0, p);
}
#endif

// Rounds to the nearest bfloat16, ties to even. NaN stays NaN.
MF_INLINE Halves narrow(Floats x) {
  const Words bits = (Words)x;
  const Words rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const Words quiet = (bits >> 16) | 0x40u;
  return __builtin_convertvector((Words)select((Ints)(x == x), (Ints)rounded, (Ints)quiet), Halves);
}

// Stores the first `count` lanes.
MF_INLINE void store_elements(float* p, Floats x, int64_t count) {
  if (count >= kLanes) return store(p, x);
  for (int64_t lane = 0; lane < count; ++lane) p[lane] = x[lane];
}
MF_INLINE void store_elements(uint16_t* p, Floats x, int64_t count) {
  const Halves y = narrow(x);
  if (count >= kLanes) {
    __builtin_memcpy(p, &y, sizeof y);
    return;
  }
  for (int64_t lane = 0; lane < count; ++lane) p[lane] = y[lane];
}

}  // namespace MF_ISA
}  // namespace maskformer_fast
