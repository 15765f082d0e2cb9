// Rectangular linear sum assignment: every row gets a column of its own, at the least total cost; rows <= columns.
//
// Row reduction and augmenting row reduction (Jonker and Volgenant, "A shortest augmenting path algorithm for dense
// and sparse linear assignment problems", 1987), then shortest augmenting paths (Crouse, "On implementing 2D
// rectangular assignment algorithms", 2016). Potentials are double whatever the cost's type.
//
// The solver is written once for host and device. A `Team` is the thread, warp or block that works on one problem. It
// provides lane(), size(), sync(), smallest(...), free_tie(...), two_smallest(...) and relax(...). Scalars of the
// solver are uniform over the team. Tables in `Workspace` are written by one lane, or by lanes strided, and read after
// a sync().
//
// +inf forbids a pair. A problem with a cost of NaN or -inf (see `is_invalid`) has no assignment. Every loop is bounded
// by the problem's size, whatever the costs: sums that overflow end in "no assignment", never in an endless loop.
#pragma once

#include <cstddef>
#include <cstdint>

// MF_HD marks functions for host and device. MF_TEAM marks functions that a team runs; a team on a device has no host
// code.
#ifdef __CUDACC__
#define MF_HD __host__ __device__ __forceinline__
#define MF_TEAM __device__ __forceinline__
#else
#define MF_HD inline __attribute__((always_inline))
#define MF_TEAM MF_HD
#endif

namespace maskformer_fast {

constexpr double kInfinity = __builtin_huge_val();
constexpr int kUnassigned = -1;

// Offset of the rank of unassigned columns, -2^40, below any column number. Ties in the search for the nearest column
// go to the lowest rank, and so to unassigned columns, where the search ends. Without this, integer costs take some 20
// times longer.
constexpr double kUnassignedRank = -1099511627776.0;

struct Nearest {
  double distance;
  int column;  // any value where distance is not finite
};

// Smallest cost of a row.
struct Smallest {
  double cost;
  int column;  // the lowest with this cost; any value where cost is not finite
  bool tied;   // other columns may have the same cost
  bool valid;  // no cost of the row is_invalid
};

struct TwoSmallest {
  double first;
  int first_column;
  double second;
  int second_column;
};

// Tables of one problem, owned by the caller. Those of a row have `rows` entries, the others `columns`.
struct Workspace {
  double* column_potential;  // -inf while a search has scanned the column, so that no path enters it again
  double* distance;          // length of the shortest path to each column; +inf once scanned
  double* rank;              // see kUnassignedRank
  int64_t* previous;         // row from which the shortest path enters each column
  int* row_of;               // row of each column, or kUnassigned
  int* scanned;              // columns in the order in which this search scanned them
  double* scanned_distance;  // distance and column_potential of the scanned columns before they were scanned
  double* scanned_potential;
  double* row_potential;
  int* column_of;  // result: column of each row, or kUnassigned
  int* free_rows;
};

template <class T>
MF_HD bool is_invalid(T cost) {
  return cost != cost || cost == -static_cast<T>(kInfinity);
}

// Row reduction: gives each row its cheapest column, or one of the same cost, where that is still free. All column
// potentials are 0. Returns the number of rows left free, or -1 where a row has no finite cost or an invalid one.
template <class Team, class T>
MF_TEAM int reduce_rows(Team& team, int rows, int columns, const T* cost, int64_t stride, const Workspace& w) {
  int free_count = 0;
  for (int row = 0; row < rows; ++row) {
    const Smallest m = team.smallest(cost + row * stride, columns);
    if (!m.valid || !(m.cost < kInfinity)) return -1;
    int column = m.column;
    if (w.row_of[column] != kUnassigned) {
      column = m.tied ? team.free_tie(cost + row * stride, m.cost, w, columns) : kUnassigned;
    }
    const bool taken = column == kUnassigned;
    team.sync();
    if (team.lane() == 0) {
      w.row_potential[row] = m.cost;
      w.column_of[row] = column;
      if (taken) {
        w.free_rows[free_count] = row;
      } else {
        w.row_of[column] = row;
        w.rank[column] = column;
      }
    }
    free_count += taken;
    team.sync();
  }
  return free_count;
}

// One pass of augmenting row reduction: each free row takes its best column, lowers the column's potential and evicts
// the column's row, which tries next. Returns the number of rows still free.
template <class Team, class T>
MF_TEAM int augment_rows(Team& team, int rows, int columns, const T* cost, int64_t stride, const Workspace& w,
                         int free_count) {
  int evictions_left = rows;  // more evictions for tiny gains cost more than the paths that they save
  int still_free = 0;
  for (int k = 0; k < free_count;) {
    const int row = w.free_rows[k++];
    const TwoSmallest m = team.two_smallest(cost + row * stride, w.column_potential, columns);
    if (!(m.second < kInfinity)) {  // one finite column only: left to the shortest paths
      team.sync();
      if (team.lane() == 0) w.free_rows[still_free] = row;
      ++still_free;
      team.sync();
      continue;
    }
    const bool strict = m.first < m.second;
    const bool use_second = !strict && w.row_of[m.first_column] != kUnassigned;
    const int column = use_second ? m.second_column : m.first_column;
    const int evicted = w.row_of[column];
    const bool retry = evicted != kUnassigned && strict && evictions_left-- > 0;
    team.sync();
    if (team.lane() == 0) {
      w.row_potential[row] = m.second;
      if (strict) w.column_potential[column] -= m.second - m.first;
      w.row_of[column] = row;
      w.rank[column] = column;
      w.column_of[row] = column;
      if (evicted != kUnassigned) {
        w.column_of[evicted] = kUnassigned;
        w.free_rows[retry ? k - 1 : still_free] = evicted;
      }
    }
    if (retry) {
      --k;
    } else {
      still_free += evicted != kUnassigned;
    }
    team.sync();
  }
  return still_free;
}

// Assigns one free row along the shortest augmenting path. Returns false where no finite path is left.
template <class Team, class T>
MF_TEAM bool augment_path(Team& team, int columns, const T* cost, int64_t stride, const Workspace& w, int start) {
  for (int j = team.lane(); j < columns; j += team.size()) {
    w.distance[j] = kInfinity;
  }
  team.sync();
  double shortest = 0;
  int row = start, sink = kUnassigned, scanned_count = 0;
  while (sink == kUnassigned) {  // scans a new column each time, so at most `columns` times
    const Nearest m = team.relax(cost + row * stride, shortest - w.row_potential[row], row, w, columns);
    shortest = m.distance;
    if (!(shortest < kInfinity)) return false;
    const int owner = w.row_of[m.column];
    team.sync();
    if (owner == kUnassigned) {
      sink = m.column;
    } else {
      if (team.lane() == 0) {
        w.scanned[scanned_count] = m.column;
        w.scanned_distance[scanned_count] = shortest;
        w.scanned_potential[scanned_count] = w.column_potential[m.column];
        w.distance[m.column] = kInfinity;
        w.column_potential[m.column] = -kInfinity;
      }
      ++scanned_count;
      row = owner;
    }
    team.sync();
  }
  if (team.lane() == 0) w.row_potential[start] += shortest;
  for (int k = team.lane(); k < scanned_count; k += team.size()) {
    const int column = w.scanned[k];
    const double slack = shortest - w.scanned_distance[k];
    w.row_potential[w.row_of[column]] += slack;
    w.column_potential[column] = w.scanned_potential[k] - slack;
  }
  team.sync();
  if (team.lane() == 0) {
    w.rank[sink] = sink;
    int column = sink, owner;
    do {
      owner = static_cast<int>(w.previous[column]);
      w.row_of[column] = owner;
      const int released = w.column_of[owner];
      w.column_of[owner] = column;
      column = released;
    } while (owner != start);
  }
  team.sync();
  return true;
}

// Solves one problem and writes w.column_of. Returns false where no assignment of finite cost exists.
// cost: [rows, columns] with rows at distance `stride`; rows <= columns. `columns` may include a padding of +inf.
template <class Team, class T>
MF_TEAM bool solve_assignment(Team& team, int rows, int columns, const T* cost, int64_t stride, const Workspace& w) {
  for (int j = team.lane(); j < columns; j += team.size()) {
    w.column_potential[j] = 0;
    w.row_of[j] = kUnassigned;
    w.rank[j] = kUnassignedRank + j;
  }
  team.sync();
  int free_count = reduce_rows(team, rows, columns, cost, stride, w);
  if (free_count < 0) return false;
  for (int pass = 0; pass < 2 && free_count > 0; ++pass) {
    free_count = augment_rows(team, rows, columns, cost, stride, w, free_count);
  }
  for (int k = 0; k < free_count; ++k) {
    if (!augment_path(team, columns, cost, stride, w, w.free_rows[k])) return false;
  }
  return true;
}

}  // namespace maskformer_fast
