// Teams of device threads for solver.h, and the solution of one problem of a batch by such a team.
//
// `Hardware` provides the primitives of a warp and a block, so that the same code runs on a device (assignment_cuda.cu)
// and on host threads, where ThreadSanitizer checks it for races (tests/csrc/run_assignment_teams.cpp):
//   lane(), lanes()   index and number of threads in the warp
//   warp(), warps()   index and number of warps in the block; warps() <= lanes()
//   sync_warp(), sync_block()
//   warp_min(x)       minimum of a uint32_t over the warp's lanes, returned to all of them
// The assignment depends on the costs alone, not on the team's size.
#pragma once

#include <cstdint>
#include <cstring>

#include "assignment/solver.h"

namespace maskformer_fast {

// Cost of a column as an integer in the order of costs, because devices find the minimum of 32-bit integers over a warp
// in one instruction. Among equal keys the lowest rank comes first.
struct ColumnKey {
  uint64_t key;
  uint32_t rank;
};

constexpr uint32_t kNoRank = 0xffffffffu;
constexpr uint32_t kAssignedRank = 0x80000000u;  // added to a column's number: unassigned columns win ties
constexpr uint64_t kInvalidKey = 0;              // below the key of any cost

MF_HD uint64_t ordered_key(double cost) {
  cost += 0.0;  // turns -0 into 0
  uint64_t bits;
  memcpy(&bits, &cost, sizeof bits);
  return (bits >> 63) != 0 ? ~bits : bits | 0x8000000000000000u;
}

MF_HD double cost_of_key(uint64_t key) {
  const uint64_t bits = (key >> 63) != 0 ? key & 0x7fffffffffffffffu : ~key;
  double cost;
  memcpy(&cost, &bits, sizeof cost);
  return cost;
}

MF_HD ColumnKey column_key(double cost, uint32_t rank) { return {ordered_key(cost), rank}; }

template <class Hardware>
MF_TEAM ColumnKey warp_least(Hardware& hardware, const ColumnKey& mine) {
  const uint32_t high = static_cast<uint32_t>(mine.key >> 32), low = static_cast<uint32_t>(mine.key);
  const uint32_t least_high = hardware.warp_min(high);
  const uint32_t least_low = hardware.warp_min(high == least_high ? low : 0xffffffffu);
  const bool least = high == least_high && low == least_low;
  return {static_cast<uint64_t>(least_high) << 32 | least_low, hardware.warp_min(least ? mine.rank : kNoRank)};
}

// The threads of a warp, which work on one problem.
template <class Hardware>
class WarpGroup {
 public:
  MF_TEAM explicit WarpGroup(const Hardware& hardware) : hardware_(hardware) {}

  MF_TEAM int lane() const { return hardware_.lane(); }
  MF_TEAM int size() const { return hardware_.lanes(); }
  MF_TEAM void sync() const { hardware_.sync_warp(); }
  MF_TEAM ColumnKey least(const ColumnKey& mine) { return warp_least(hardware_, mine); }

 private:
  Hardware hardware_;
};

// The threads of a block, which work on one problem. slots: 2 * warps() entries that all of its threads share.
template <class Hardware>
class BlockGroup {
 public:
  MF_TEAM BlockGroup(const Hardware& hardware, ColumnKey* slots) : hardware_(hardware), slots_(slots) {}

  MF_TEAM int lane() const { return hardware_.warp() * hardware_.lanes() + hardware_.lane(); }
  MF_TEAM int size() const { return hardware_.warps() * hardware_.lanes(); }
  MF_TEAM void sync() const { hardware_.sync_block(); }

  MF_TEAM ColumnKey least(const ColumnKey& mine) {
    // the halves of the slots alternate, so that the next call need not wait until all threads have read this half
    ColumnKey* slots = slots_ + turn_ * hardware_.warps();
    turn_ ^= 1;
    const ColumnKey of_warp = warp_least(hardware_, mine);
    if (hardware_.lane() == 0) slots[hardware_.warp()] = of_warp;
    hardware_.sync_block();
    const bool read = hardware_.lane() < hardware_.warps();
    return warp_least(hardware_, read ? slots[hardware_.lane()] : ColumnKey{~uint64_t{0}, kNoRank});
  }

 private:
  Hardware hardware_;
  ColumnKey* slots_;
  int turn_ = 0;
};

// Team (solver.h) of a group's lanes, strided over the columns.
template <class Group>
class StridedTeam {
 public:
  MF_TEAM explicit StridedTeam(const Group& group) : group_(group) {}

  MF_TEAM int lane() const { return group_.lane(); }
  MF_TEAM int size() const { return group_.size(); }
  MF_TEAM void sync() const { group_.sync(); }

  template <class T>
  MF_TEAM Smallest smallest(const T* cost, int columns) {
    double first = kInfinity;
    uint32_t column = kNoRank;
    bool valid = true;
    for (int j = lane(); j < columns; j += size()) {
      const double x = static_cast<double>(cost[j]);
      valid &= !is_invalid(x);
      if (x < first) {
        first = x;
        column = j;
      }
    }
    const ColumnKey best = group_.least(valid ? column_key(first, column) : ColumnKey{kInvalidKey, 0});
    // `tied` is always true: a test for ties would need another reduction for each row, and free_tie is called for few
    return {cost_of_key(best.key), static_cast<int>(best.rank), true, best.key != kInvalidKey};
  }

  // Returns the lowest free column of this cost, or kUnassigned.
  template <class T>
  MF_TEAM int free_tie(const T* row, double cost, const Workspace& w, int columns) {
    ColumnKey mine{0, kNoRank};
    for (int j = lane(); j < columns && mine.rank == kNoRank; j += size()) {
      if (row[j] == cost && w.row_of[j] == kUnassigned) mine.rank = j;
    }
    const ColumnKey best = group_.least(mine);
    return best.rank == kNoRank ? kUnassigned : static_cast<int>(best.rank);
  }

  // Returns the two smallest of cost - potential. Ties go to the lower column.
  template <class T>
  MF_TEAM TwoSmallest two_smallest(const T* cost, const double* potential, int columns) {
    double first = kInfinity, second = kInfinity;
    uint32_t first_column = kNoRank, second_column = kNoRank;
    for (int j = lane(); j < columns; j += size()) {
      const double reduced = static_cast<double>(cost[j]) - potential[j];
      if (reduced < first) {
        second = first;
        second_column = first_column;
        first = reduced;
        first_column = j;
      } else if (reduced < second) {
        second = reduced;
        second_column = j;
      }
    }
    const ColumnKey best = group_.least(column_key(first, first_column));
    const bool mine = first_column == best.rank;
    const ColumnKey next = group_.least(mine ? column_key(second, second_column) : column_key(first, first_column));
    return {cost_of_key(best.key), static_cast<int>(best.rank), cost_of_key(next.key), static_cast<int>(next.rank)};
  }

  // Shortens the paths that pass through `row`. Returns the nearest column not yet scanned.
  template <class T>
  MF_TEAM Nearest relax(const T* cost, double base, int row, const Workspace& w, int columns) {
    double nearest = kInfinity;
    uint32_t nearest_rank = kNoRank;
    for (int j = lane(); j < columns; j += size()) {
      const double path = base + static_cast<double>(cost[j]) - w.column_potential[j];
      double distance = w.distance[j];
      if (path < distance) {
        distance = path;
        w.distance[j] = path;
        w.previous[j] = row;
      }
      const uint32_t rank = w.row_of[j] == kUnassigned ? j : j | kAssignedRank;
      if (distance < nearest || (distance == nearest && rank < nearest_rank && distance < kInfinity)) {
        nearest = distance;
        nearest_rank = rank;
      }
    }
    const ColumnKey best = group_.least(column_key(nearest, nearest_rank));
    return {cost_of_key(best.key), static_cast<int>(best.rank & ~kAssignedRank)};
  }

 private:
  Group group_;
};

constexpr int64_t kTableAlignment = 16;

MF_HD int64_t aligned(int64_t bytes) { return (bytes + kTableAlignment - 1) / kTableAlignment * kTableAlignment; }

// Returns the bytes that tables_at() uses; rows <= columns.
MF_HD int64_t table_bytes(int64_t rows, int64_t columns) {
  return aligned((6 * columns + rows) * int64_t{sizeof(double)} + 2 * (columns + rows) * int64_t{sizeof(int)});
}

// Places the solver's tables one after another in memory aligned to kTableAlignment.
MF_HD Workspace tables_at(void* memory, int64_t rows, int64_t columns) {
  Workspace w;
  double* d = static_cast<double*>(memory);
  w.column_potential = d;
  w.distance = d + columns;
  w.rank = d + 2 * columns;
  w.scanned_distance = d + 3 * columns;
  w.scanned_potential = d + 4 * columns;
  w.previous = reinterpret_cast<int64_t*>(d + 5 * columns);
  w.row_potential = d + 6 * columns;
  int* i = reinterpret_cast<int*>(w.row_potential + rows);
  w.row_of = i;
  w.scanned = i + columns;
  w.column_of = i + 2 * columns;
  w.free_rows = i + 2 * columns + rows;
  return w;
}

template <class T>
struct TeamBatch {
  const T* cost;  // [batch, rows, columns] with the strides below, in elements
  int64_t problems;
  int rows;
  int columns;
  int64_t problem_stride;
  int64_t row_stride;
  int64_t column_stride;
  const int64_t* counts;  // [batch], valid columns of each problem; nullptr: all of them
  int64_t* row_of;        // result, [batch, columns]: the row of each column, or -1
};

// Returns whether the columns of a problem are the rows of the solver, which needs rows <= columns. For square problems
// they are where this makes each row of the solver contiguous.
MF_HD bool swaps(int64_t rows, int64_t columns, int64_t row_stride) {
  return rows > columns || (rows == columns && row_stride == 1);
}

// Returns whether every row of the solver is contiguous, whatever the counts, so that no problem need be copied.
template <class T>
MF_HD bool is_contiguous(const TeamBatch<T>& batch) {
  const bool swapped = swaps(batch.rows, batch.columns, batch.row_stride);
  const bool some_swapped = swapped || (batch.counts != nullptr && batch.rows > 1);
  return (!some_swapped || batch.row_stride == 1) && (swapped || batch.column_stride == 1);
}

// Returns the distance of two rows of a copied problem. It is odd, so that lanes that write a column use different
// banks of memory.
MF_HD int64_t copy_stride(int64_t long_side) { return long_side | 1; }

constexpr int kCopyLoads = 8;  // of a lane, under way at a time: memory's latency would else pass for each

// Copies [outer, inner], read along the inner axis, to a matrix with strides out_outer and out_inner.
template <class Team, class T>
MF_TEAM void copy_problem(Team& team, const T* source, int64_t outer_stride, int64_t inner_stride, int outer,
                          int inner, T* out, int64_t out_outer, int64_t out_inner) {
  const int outer_step = team.size() / inner, inner_step = team.size() % inner;
  int o = team.lane() / inner, i = team.lane() % inner;
  while (o < outer) {
    T values[kCopyLoads];
    int64_t places[kCopyLoads];
    for (int k = 0; k < kCopyLoads; ++k) {
      places[k] = -1;
      if (o < outer) {
        values[k] = source[o * outer_stride + i * inner_stride];
        places[k] = o * out_outer + i * out_inner;
        o += outer_step;
        i += inner_step;
        if (i >= inner) {
          i -= inner;
          ++o;
        }
      }
    }
    for (int k = 0; k < kCopyLoads; ++k) {
      if (places[k] >= 0) out[places[k]] = values[k];
    }
  }
}

// Solves one problem of the batch and writes its result: all -1 where it has no finite assignment, or a count outside
// 0..columns. tables: table_bytes(min(rows, columns), max(rows, columns)) bytes. matrix: min(rows, columns) rows of
// copy_stride(max(rows, columns)), or nullptr where is_contiguous(batch). always_copy: copies contiguous rows too, for
// a matrix in faster memory. No other code may access tables and matrix before the next sync() of the team.
template <class Team, class T>
MF_TEAM void assign_problem(Team& team, const TeamBatch<T>& batch, int64_t problem, void* tables, T* matrix,
                            bool always_copy) {
  const int64_t count = batch.counts != nullptr ? batch.counts[problem] : batch.columns;
  const int rows = batch.rows;
  const int columns = count < 0 || count > batch.columns ? 0 : static_cast<int>(count);
  const bool swap = swaps(rows, columns, batch.row_stride);
  const int short_side = swap ? columns : rows, long_side = swap ? rows : columns;
  const Workspace w = tables_at(tables, short_side, long_side);
  bool solved = false;
  if (short_side > 0) {
    const T* cost = batch.cost + problem * batch.problem_stride;
    const int64_t short_stride = swap ? batch.column_stride : batch.row_stride;
    const int64_t long_stride = swap ? batch.row_stride : batch.column_stride;
    int64_t stride = short_stride;
    if (always_copy || long_stride != 1) {
      stride = copy_stride(long_side);
      if (long_stride == 1) {
        copy_problem(team, cost, short_stride, long_stride, short_side, long_side, matrix, stride, int64_t{1});
      } else {
        copy_problem(team, cost, long_stride, short_stride, long_side, short_side, matrix, int64_t{1}, stride);
      }
      cost = matrix;
      team.sync();
    }
    solved = solve_assignment(team, short_side, long_side, cost, stride, w);
  }
  int64_t* row_of = batch.row_of + problem * batch.columns;
  for (int j = team.lane(); j < batch.columns; j += team.size()) {
    row_of[j] = solved && j < columns ? (swap ? w.column_of[j] : w.row_of[j]) : kUnassigned;
  }
}

}  // namespace maskformer_fast
