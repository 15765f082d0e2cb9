// Assignment on the host: threads over the problems of a batch, vector instructions within a problem.
#include "assignment/assignment.h"

#include <algorithm>
#include <cstring>
#include <limits>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#include "assignment/solver.h"
#include "common/threads.h"

namespace maskformer_fast {
namespace {

// Vector types of GCC's and Clang's extensions, as wide as the target's registers. Wider ones are split and slow. Each
// width is spelled out, because GCC ignores the attribute where its size depends on a template argument.
template <int Lanes>
struct VectorTypes;
#define MF_VECTOR_TYPES(LANES)                                         \
  template <>                                                          \
  struct VectorTypes<LANES> {                                          \
    typedef double Doubles __attribute__((vector_size(8 * LANES)));    \
    typedef int64_t Integers __attribute__((vector_size(8 * LANES)));  \
    typedef float Floats __attribute__((vector_size(4 * LANES)));      \
    typedef float WideFloats __attribute__((vector_size(8 * LANES)));  \
    typedef int32_t WideInts __attribute__((vector_size(8 * LANES)));  \
  };
MF_VECTOR_TYPES(2)
MF_VECTOR_TYPES(4)
#undef MF_VECTOR_TYPES

// A register of costs, and a register of as many integers of the same size.
template <class T, int Lanes>
struct Register;
template <int Lanes>
struct Register<double, Lanes> {
  using Costs = typename VectorTypes<Lanes>::Doubles;
  using Numbers = typename VectorTypes<Lanes>::Integers;
};
template <int Lanes>
struct Register<float, Lanes> {
  using Costs = typename VectorTypes<Lanes>::WideFloats;
  using Numbers = typename VectorTypes<Lanes>::WideInts;
};

template <int Lanes>
struct Vectors {
  using Doubles = typename VectorTypes<Lanes>::Doubles;
  using Integers = typename VectorTypes<Lanes>::Integers;
  using Floats = typename VectorTypes<Lanes>::Floats;

  template <class Vector, class Scalar>
  static MF_HD Vector read(const Scalar* p) {
    Vector x;
    std::memcpy(&x, p, sizeof x);
    return x;
  }
  static MF_HD Doubles load(const double* p) { return read<Doubles>(p); }
  static MF_HD Doubles load(const float* p) { return __builtin_convertvector(read<Floats>(p), Doubles); }
  static MF_HD Integers load(const int64_t* p) { return read<Integers>(p); }
  template <class Scalar, class Vector>
  static MF_HD void store(Scalar* p, const Vector& x) {
    std::memcpy(p, &x, sizeof x);
  }
  static MF_HD Integers select(Integers mask, Integers a, Integers b) { return (mask & a) | (~mask & b); }
  static MF_HD Doubles select(Integers mask, Doubles a, Doubles b) {
    return (Doubles)select(mask, (Integers)a, (Integers)b);
  }
  static MF_HD Integers column_numbers() {
    Integers x{};
    for (int l = 0; l < Lanes; ++l) x[l] = l;
    return x;
  }
};

// Rows of the cost and the tables are padded to a multiple of this number of elements.
constexpr int kMaxLanes = 4;

// A team of one thread (solver.h).
template <int Lanes>
struct VectorTeam : Vectors<Lanes> {
  using typename Vectors<Lanes>::Doubles;
  using typename Vectors<Lanes>::Integers;
  using Vectors<Lanes>::load;
  using Vectors<Lanes>::store;
  using Vectors<Lanes>::select;

  MF_HD int lane() const { return 0; }
  MF_HD int size() const { return 1; }
  MF_HD void sync() const {}

  template <class T>
  MF_HD Smallest smallest(const T* cost, int columns) const {
    using Costs = typename Register<T, Lanes>::Costs;
    using Numbers = typename Register<T, Lanes>::Numbers;
    constexpr int lanes = sizeof(Costs) / sizeof(T);
    Costs first = Costs{} + static_cast<T>(kInfinity);
    Numbers column{}, number, tied{}, invalid{};
    for (int l = 0; l < lanes; ++l) number[l] = l;
    int j = 0;
    for (; j + lanes <= columns; j += lanes, number += lanes) {
      const Costs x = Vectors<Lanes>::template read<Costs>(cost + j);
      const Numbers less = x < first;
      tied |= x == first;
      invalid |= x != x;
      first = less ? x : first;
      column = less ? number : column;
    }
    Smallest best{kInfinity, 0, false, true};
    const auto take = [&](double x, int at) {
      best.tied |= x == best.cost;
      if (x < best.cost || (x == best.cost && at < best.column)) {
        best.cost = x;
        best.column = at;
      }
    };
    for (int l = 0; l < lanes; ++l) {
      best.tied |= tied[l] != 0;
      best.valid &= invalid[l] == 0;
      take(first[l], static_cast<int>(column[l]));
    }
    for (; j < columns; ++j) {
      best.valid &= cost[j] == cost[j];
      take(cost[j], j);
    }
    best.valid &= best.cost > -kInfinity;
    return best;
  }

  // Returns the lowest free column of this cost, or kUnassigned.
  template <class T>
  MF_HD int free_tie(const T* row, double cost, const Workspace& w, int columns) const {
    for (int j = 0; j < columns; ++j) {
      if (row[j] == cost && w.row_of[j] == kUnassigned) return j;
    }
    return kUnassigned;
  }

  // Returns the two smallest of cost - potential. Ties go to the lower column.
  template <class T>
  MF_HD TwoSmallest two_smallest(const T* cost, const double* potential, int columns) const {
    Doubles first = Doubles{} + kInfinity, second = first;
    Integers first_column = Integers{} - 1, second_column = first_column, column = Vectors<Lanes>::column_numbers();
    for (int j = 0; j < columns; j += Lanes, column += Lanes) {
      const Doubles reduced = load(cost + j) - load(potential + j);
      const Integers is_first = reduced < first, is_second = reduced < second;
      second = select(is_first, first, select(is_second, reduced, second));
      second_column = select(is_first, first_column, select(is_second, column, second_column));
      first = select(is_first, reduced, first);
      first_column = select(is_first, column, first_column);
    }
    TwoSmallest best{kInfinity, 0, kInfinity, 0};
    for (int l = 0; l < Lanes; ++l) {
      const bool wins = first[l] < best.first || (first[l] == best.first && first_column[l] < best.first_column);
      if (wins) {
        best = {first[l], static_cast<int>(first_column[l]), best.first, best.first_column};
      } else if (first[l] < best.second) {
        best.second = first[l];
        best.second_column = static_cast<int>(first_column[l]);
      }
      if (second[l] < best.second) {
        best.second = second[l];
        best.second_column = static_cast<int>(second_column[l]);
      }
    }
    return best;
  }

  // Shortens the paths that pass through `row`. Returns the nearest column not yet scanned.
  template <class T>
  MF_HD Nearest relax(const T* cost, double base, int row, const Workspace& w, int columns) const {
    Doubles nearest = Doubles{} + kInfinity, nearest_rank = Doubles{} + kInfinity;
    const Doubles bases = Doubles{} + base;
    const Integers rows = Integers{} + static_cast<int64_t>(row);
    for (int j = 0; j < columns; j += Lanes) {
      const Doubles path = bases + load(cost + j) - load(w.column_potential + j);
      const Doubles known = load(w.distance + j);
      const Integers shorter = path < known;
      const Doubles distance = select(shorter, path, known);
      store(w.distance + j, distance);
      store(w.previous + j, select(shorter, rows, load(w.previous + j)));
      const Doubles rank = load(w.rank + j);
      const Integers nearer = (distance < nearest) | ((distance == nearest) & (rank < nearest_rank));
      nearest = select(nearer, distance, nearest);
      nearest_rank = select(nearer, rank, nearest_rank);
    }
    Nearest best{kInfinity, 0};
    double best_rank = kInfinity;
    for (int l = 0; l < Lanes; ++l) {
      if (nearest[l] < best.distance || (nearest[l] == best.distance && nearest_rank[l] < best_rank)) {
        best.distance = nearest[l];
        best_rank = nearest_rank[l];
      }
    }
    if (best.distance < kInfinity) {
      best.column = static_cast<int>(best_rank < 0 ? best_rank - kUnassignedRank : best_rank);
    }
    return best;
  }
};

// Solver of one problem for one instruction set; solve_assignment is inlined into each. AVX-512 is left out: through
// GCC's vector extensions it was measured to be two to three times slower than AVX2.
template <class T>
using Solver = bool (*)(int rows, int columns, const T* cost, int64_t stride, const Workspace& w);

template <class T>
bool solve_baseline(int rows, int columns, const T* cost, int64_t stride, const Workspace& w) {
  VectorTeam<2> team;
  return solve_assignment(team, rows, columns, cost, stride, w);
}

#if defined(__x86_64__)
template <class T>
__attribute__((target("avx2"))) bool solve_avx2(int rows, int columns, const T* cost, int64_t stride,
                                                const Workspace& w) {
  VectorTeam<4> team;
  return solve_assignment(team, rows, columns, cost, stride, w);
}
#endif

template <class T>
Solver<T> best_solver() {
#if defined(__x86_64__)
  if (__builtin_cpu_supports("avx2")) return solve_avx2<T>;
#endif
  return solve_baseline<T>;
}

constexpr int64_t padded(int64_t n) { return (n + kMaxLanes - 1) / kMaxLanes * kMaxLanes; }

// Scratch memory of one worker for any problem of up to rows x columns, allocated before threads start.
template <class T>
class Scratch {
 public:
  Scratch(int64_t rows, int64_t columns)
      : matrix_(new T[rows * padded(columns)]),  // not cleared: unused memory costs nothing
        doubles_(5 * padded(columns) + rows),
        previous_(padded(columns)),
        integers_(2 * padded(columns) + 2 * rows) {
    const int64_t n = padded(columns);
    double* d = doubles_.data();
    int* i = integers_.data();
    workspace_.column_potential = d;
    workspace_.distance = d + n;
    workspace_.rank = d + 2 * n;
    workspace_.scanned_distance = d + 3 * n;
    workspace_.scanned_potential = d + 4 * n;
    workspace_.row_potential = d + 5 * n;
    workspace_.previous = previous_.data();
    workspace_.row_of = i;
    workspace_.scanned = i + n;
    workspace_.column_of = i + 2 * n;
    workspace_.free_rows = i + 2 * n + rows;
  }

  T* matrix() { return matrix_.get(); }
  const Workspace& workspace() const { return workspace_; }

 private:
  std::unique_ptr<T[]> matrix_;
  std::vector<double> doubles_;
  std::vector<int64_t> previous_;
  std::vector<int> integers_;
  Workspace workspace_;
};

// Copies [rows, columns] with any strides to rows at distance `stride`, padded with +inf to `width`.
template <class T>
void gather(const T* source, int64_t row_stride, int64_t column_stride, int rows, int columns, T* out, int64_t stride,
            int64_t width) {
  for (int i = 0; i < rows; ++i) {
    T* row = out + i * stride;
    for (int j = 0; j < columns; ++j) row[j] = source[i * row_stride + j * column_stride];
    std::fill(row + columns, row + width, static_cast<T>(kInfinity));
  }
}

// Copies as `gather` from a source whose rows are adjacent (a row stride of 1): 4 x 4 elements at a time, in registers.
template <class T>
void gather_transposed(const T* source, int64_t column_stride, int rows, int columns, T* out, int64_t stride) {
  typedef T Four __attribute__((vector_size(4 * sizeof(T))));
  const int block_rows = rows & ~3, block_columns = columns & ~3;
  for (int j = 0; j < block_columns; j += 4) {
    const T* from = source + j * column_stride;
    for (int i = 0; i < block_rows; i += 4) {
      Four a, b, c, d;
      std::memcpy(&a, from + i, sizeof a);
      std::memcpy(&b, from + i + column_stride, sizeof b);
      std::memcpy(&c, from + i + 2 * column_stride, sizeof c);
      std::memcpy(&d, from + i + 3 * column_stride, sizeof d);
      const Four ab_low = __builtin_shufflevector(a, b, 0, 4, 1, 5);
      const Four ab_high = __builtin_shufflevector(a, b, 2, 6, 3, 7);
      const Four cd_low = __builtin_shufflevector(c, d, 0, 4, 1, 5);
      const Four cd_high = __builtin_shufflevector(c, d, 2, 6, 3, 7);
      a = __builtin_shufflevector(ab_low, cd_low, 0, 1, 4, 5);
      b = __builtin_shufflevector(ab_low, cd_low, 2, 3, 6, 7);
      c = __builtin_shufflevector(ab_high, cd_high, 0, 1, 4, 5);
      d = __builtin_shufflevector(ab_high, cd_high, 2, 3, 6, 7);
      T* to = out + i * stride + j;
      std::memcpy(to, &a, sizeof a);
      std::memcpy(to + stride, &b, sizeof b);
      std::memcpy(to + 2 * stride, &c, sizeof c);
      std::memcpy(to + 3 * stride, &d, sizeof d);
    }
  }
  gather(source + block_columns * column_stride, 1, column_stride, block_rows, columns - block_columns,
         out + block_columns, stride, stride - block_columns);
  gather(source + block_rows, 1, column_stride, rows - block_rows, columns, out + block_rows * stride, stride, stride);
}

template <class T>
void assign_one(const AssignmentBatch<T>& batch, int64_t problem, Solver<T> solver, Scratch<T>& scratch) {
  const int64_t total = batch.sizes[2];
  const int rows = static_cast<int>(batch.sizes[1]);
  const int columns = static_cast<int>(batch.counts ? batch.counts[problem] : total);
  int64_t* row_of = batch.row_of + problem * total;
  std::fill(row_of, row_of + total, int64_t{-1});
  if (rows == 0 || columns == 0) return;

  // the solver needs rows <= columns: with more queries than targets, targets are its rows
  const T* cost = batch.cost + problem * batch.strides[0];
  const bool swap = rows > columns;
  const int short_side = swap ? columns : rows, long_side = swap ? rows : columns;
  const int64_t width = padded(long_side);
  const int64_t short_stride = batch.strides[swap ? 2 : 1], long_stride = batch.strides[swap ? 1 : 2];
  int64_t stride = width;
  if (long_stride == 1 && long_side == width) {
    stride = short_stride;  // no copy: for large problems, new memory costs more than the solution
  } else {
    if (short_stride == 1) {
      gather_transposed(cost, long_stride, short_side, long_side, scratch.matrix(), stride);
    } else {
      gather(cost, short_stride, long_stride, short_side, long_side, scratch.matrix(), stride, width);
    }
    cost = scratch.matrix();
  }
  const Workspace& w = scratch.workspace();
  if (!solver(short_side, static_cast<int>(width), cost, stride, w)) return;
  for (int i = 0; i < short_side; ++i) {
    if (swap) {
      row_of[i] = w.column_of[i];
    } else {
      row_of[w.column_of[i]] = i;
    }
  }
}

void check_sizes(const std::array<int64_t, 3>& sizes, const int64_t* counts) {
  constexpr int64_t limit = std::numeric_limits<int>::max() - kMaxLanes;
  if (sizes[1] > limit || sizes[2] > limit) {
    throw std::invalid_argument("cost: expected fewer than 2^31 rows and columns");
  }
  for (int64_t b = 0; counts && b < sizes[0]; ++b) {
    if (counts[b] < 0 || counts[b] > sizes[2]) {
      throw std::invalid_argument("counts: expected 0.." + std::to_string(sizes[2]) + " (columns of cost), got " +
                                  std::to_string(counts[b]) + " at problem " + std::to_string(b));
    }
  }
}

}  // namespace

template <class T>
void linear_sum_assignment(const AssignmentBatch<T>& batch, int threads) {
  check_sizes(batch.sizes, batch.counts);
  const auto [problems, rows, columns] = batch.sizes;
  if (problems == 0 || columns == 0) return;

  constexpr int64_t kCostsPerThread = 8192;  // some 10 us of work, which outweighs the start of a thread
  const int64_t useful = 1 + problems * rows * columns / kCostsPerThread;
  threads = static_cast<int>(std::clamp<int64_t>(threads, 1, std::min(problems, useful)));

  const Solver<T> solver = best_solver<T>();
  std::vector<Scratch<T>> scratch;
  scratch.reserve(threads);
  for (int t = 0; t < threads; ++t) scratch.emplace_back(std::min(rows, columns), std::max(rows, columns));

  parallel_for(problems, threads,
               [&](int worker, int64_t problem) { assign_one(batch, problem, solver, scratch[worker]); });
}

template void linear_sum_assignment<float>(const AssignmentBatch<float>&, int);
template void linear_sum_assignment<double>(const AssignmentBatch<double>&, int);

}  // namespace maskformer_fast
