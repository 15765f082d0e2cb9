// Products of small matrices for kernel files (cpu_isa.h), whose sums are in registers.
//
// Matrices are rows of floats; `halves` is for factors in bfloat16, of which two numbers that follow one another along
// the sum share the place of a float (only where the instruction set multiplies them: __AVX512BF16__).
#pragma once

#include "common/simd.h"

namespace maskformer_fast {
namespace MF_ISA {

// Rows of the result, and vectors of a row, whose sums are in registers at a time.
#if defined(__AVX512F__)
constexpr int kRows = 7, kVectors = 4;
#else
constexpr int kRows = 6, kVectors = 2;
#endif

enum class Factors { floats, halves };

// Adds the products of a, the same in all lanes, and b.
template <Factors factors>
MF_INLINE Floats add_products(Floats sums, const float* a, Floats b) {
#if defined(__AVX512BF16__)
  if constexpr (factors == Factors::halves) {
    return _mm512_dpbf16_ps(sums, (__m512bh)_mm512_set1_ps(*a), (__m512bh)b);
  }
#endif
  return sums + broadcast(*a) * b;
}

// Computes c = a b, or adds it to c: a [rows, depth], b [depth, vectors * kLanes]. With `transposed`, a is in memory as
// [depth, rows].
template <int rows, int vectors, Factors factors, bool transposed>
void multiply(const float* a, int64_t a_stride, const float* b, int64_t b_stride, int64_t depth, bool add, float* c,
              int64_t c_stride) {
  Floats sums[rows][vectors];
  for (int row = 0; row < rows; ++row) {
    for (int v = 0; v < vectors; ++v) sums[row][v] = add ? load(c + row * c_stride + v * kLanes) : Floats{};
  }
  for (int64_t k = 0; k < depth; ++k) {
    Floats column[vectors];
    for (int v = 0; v < vectors; ++v) column[v] = load(b + k * b_stride + v * kLanes);
    for (int row = 0; row < rows; ++row) {
      const float* factor = transposed ? a + k * a_stride + row : a + row * a_stride + k;
      for (int v = 0; v < vectors; ++v) sums[row][v] = add_products<factors>(sums[row][v], factor, column[v]);
    }
  }
  for (int row = 0; row < rows; ++row) {
    for (int v = 0; v < vectors; ++v) store(c + row * c_stride + v * kLanes, sums[row][v]);
  }
}

template <int rows, Factors factors, bool transposed>
void multiply_row_group(const float* a, int64_t a_stride, const float* b, int64_t b_stride, int64_t columns,
                        int64_t depth, bool add, float* c, int64_t c_stride) {
  int64_t column = 0;
  for (; column + kVectors * kLanes <= columns; column += kVectors * kLanes) {
    multiply<rows, kVectors, factors, transposed>(a, a_stride, b + column, b_stride, depth, add, c + column, c_stride);
  }
  for (; column + 2 * kLanes <= columns; column += 2 * kLanes) {
    multiply<rows, 2, factors, transposed>(a, a_stride, b + column, b_stride, depth, add, c + column, c_stride);
  }
  for (; column < columns; column += kLanes) {
    multiply<rows, 1, factors, transposed>(a, a_stride, b + column, b_stride, depth, add, c + column, c_stride);
  }
}

// Computes c = a b, or adds it to c: a [rows, depth], b [depth, columns], where `columns` is a multiple of kLanes and
// the strides are those of the matrices in memory. With `transposed`, a is in memory as [depth, rows].
template <Factors factors = Factors::floats, bool transposed = false>
void multiply_matrices(int64_t rows, int64_t columns, int64_t depth, const float* a, int64_t a_stride, const float* b,
                       int64_t b_stride, bool add, float* c, int64_t c_stride) {
  for (int64_t row = 0; row < rows; row += kRows) {
    const float* left = transposed ? a + row : a + row * a_stride;
    float* sums = c + row * c_stride;
#define MF_ROWS(COUNT) \
  case COUNT: \
    multiply_row_group<COUNT, factors, transposed>(left, a_stride, b, b_stride, columns, depth, add, sums, c_stride); \
    break;
    switch (rows - row) {
      MF_ROWS(1)
      MF_ROWS(2)
      MF_ROWS(3)
      MF_ROWS(4)
      MF_ROWS(5)
      MF_ROWS(6)
      default:
        multiply_row_group<kRows, factors, transposed>(left, a_stride, b, b_stride, columns, depth, add, sums,
                                                       c_stride);
    }
#undef MF_ROWS
  }
}

#if defined(__AMX_BF16__)
constexpr int kTileRows = 16;    // rows of a tile: of a, of c, and pairs of numbers along the sum in b
constexpr int kTileFloats = 16;  // places of floats in a row of a tile

// Shapes of a thread's tiles, as the processor reads them: all of the full size.
struct TileShapes {
  uint8_t palette = 1, start = 0, reserved[14] = {};
  uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};
constexpr TileShapes kTileShapes;

// Call begin_tiles before the first product of a thread, and end_tiles after the last.
MF_INLINE void begin_tiles() { _tile_loadconfig(&kTileShapes); }
MF_INLINE void end_tiles() { _tile_release(); }

// As multiply_tiles, for one or two tiles of rows, and of columns.
template <bool two_rows, bool two_columns>
void multiply_tile_group(const float* a, int64_t a_stride, const float* b, int64_t b_stride, int64_t depth, bool add,
                         float* c, int64_t c_stride) {
  const int64_t a_bytes = 4 * a_stride, b_bytes = 4 * b_stride, c_bytes = 4 * c_stride;
  float* lower = c + kTileRows * c_stride;
  if (add) {
    _tile_loadd(0, c, c_bytes);
    if constexpr (two_columns) _tile_loadd(1, c + kTileFloats, c_bytes);
    if constexpr (two_rows) _tile_loadd(2, lower, c_bytes);
    if constexpr (two_rows && two_columns) _tile_loadd(3, lower + kTileFloats, c_bytes);
  } else {
    _tile_zero(0);
    if constexpr (two_columns) _tile_zero(1);
    if constexpr (two_rows) _tile_zero(2);
    if constexpr (two_rows && two_columns) _tile_zero(3);
  }
  for (int64_t k = 0; k < depth; k += kTileFloats) {
    _tile_loadd(4, a + k, a_bytes);
    _tile_loadd(6, b + k * b_stride, b_bytes);
    _tile_dpbf16ps(0, 4, 6);
    if constexpr (two_columns) {
      _tile_loadd(7, b + k * b_stride + kTileFloats, b_bytes);
      _tile_dpbf16ps(1, 4, 7);
    }
    if constexpr (two_rows) {
      _tile_loadd(5, a + kTileRows * a_stride + k, a_bytes);
      _tile_dpbf16ps(2, 5, 6);
      if constexpr (two_columns) _tile_dpbf16ps(3, 5, 7);
    }
  }
  _tile_stored(0, c, c_bytes);
  if constexpr (two_columns) _tile_stored(1, c + kTileFloats, c_bytes);
  if constexpr (two_rows) _tile_stored(2, lower, c_bytes);
  if constexpr (two_rows && two_columns) _tile_stored(3, lower + kTileFloats, c_bytes);
}

// Computes what multiply_matrices does for factors in bfloat16, by the processor's tiles. Columns and depth are
// multiples of kTileFloats. Rows are computed up to a multiple of kTileRows, for which a and c have room.
MF_INLINE void multiply_tiles(int64_t rows, int64_t columns, int64_t depth, const float* a, int64_t a_stride,
                              const float* b, int64_t b_stride, bool add, float* c, int64_t c_stride) {
  // The compiler's header does not say that tiles are read from memory and written to it.
  __asm__ volatile("" ::: "memory");
  for (int64_t column = 0; column < columns; column += 2 * kTileFloats) {
    const bool two_columns = columns - column > kTileFloats;
    for (int64_t row = 0; row < rows; row += 2 * kTileRows) {
      const bool two_rows = rows - row > kTileRows;
      const auto run = two_rows ? (two_columns ? multiply_tile_group<true, true> : multiply_tile_group<true, false>)
                                : (two_columns ? multiply_tile_group<false, true> : multiply_tile_group<false, false>);
      run(a + row * a_stride, a_stride, b + column, b_stride, depth, add, c + row * c_stride + column, c_stride);
    }
  }
  __asm__ volatile("" ::: "memory");
}
#endif

// Transposes a block of 4 x 4.
MF_INLINE void transpose_block(const float* from, int64_t from_stride, float* to, int64_t to_stride) {
#if defined(__AVX2__)
  __m128 a = _mm_loadu_ps(from), b = _mm_loadu_ps(from + from_stride);
  __m128 c = _mm_loadu_ps(from + 2 * from_stride), d = _mm_loadu_ps(from + 3 * from_stride);
  _MM_TRANSPOSE4_PS(a, b, c, d);
  _mm_storeu_ps(to, a), _mm_storeu_ps(to + to_stride, b);
  _mm_storeu_ps(to + 2 * to_stride, c), _mm_storeu_ps(to + 3 * to_stride, d);
#else
  for (int i = 0; i < 4; ++i) {
    for (int j = 0; j < 4; ++j) to[j * to_stride + i] = from[i * from_stride + j];
  }
#endif
}

}  // namespace MF_ISA
}  // namespace maskformer_fast
