// Runs the teams of the CUDA assignment on host threads, one for each lane, with barriers and shared arrays in place of
// the hardware. ThreadSanitizer reports memory that lanes share without a sync() in between.
#include <algorithm>
#include <atomic>
#include <cmath>
#include <condition_variable>
#include <memory>
#include <mutex>
#include <thread>

#include "assignment/assignment.h"
#include "assignment/team.h"
#include "run_operators.h"

namespace maskformer_fast {
namespace {

class Barrier {
 public:
  explicit Barrier(int threads) : threads_(threads) {}

  void wait() {
    std::unique_lock<std::mutex> lock(mutex_);
    if (++arrived_ == threads_) {
      arrived_ = 0;
      ++round_;
      all_arrived_.notify_all();
      return;
    }
    all_arrived_.wait(lock, [this, round = round_] { return round_ != round; });
  }

 private:
  const int threads_;
  int arrived_ = 0;
  int64_t round_ = 0;
  std::mutex mutex_;
  std::condition_variable all_arrived_;
};

struct Block {
  Block(int warps, int lanes) : warps(warps), lanes(lanes), block_barrier(warps * lanes), slots(2 * warps) {
    for (int k = 0; k < warps; ++k) {
      warp_barriers.emplace_back(new Barrier(lanes));
      exchanged.emplace_back(2 * lanes);
    }
  }

  const int warps, lanes;
  Barrier block_barrier;
  std::vector<std::unique_ptr<Barrier>> warp_barriers;
  std::vector<std::vector<std::atomic<uint64_t>>> exchanged;  // [warps][2 * lanes], halves used in turn
  std::vector<ColumnKey> slots;
};

class EmulatedHardware {
 public:
  EmulatedHardware(Block& block, int thread) : block_(&block), thread_(thread) {}

  int lane() const { return thread_ % block_->lanes; }
  int lanes() const { return block_->lanes; }
  int warp() const { return thread_ / block_->lanes; }
  int warps() const { return block_->warps; }
  void sync_warp() const { block_->warp_barriers[warp()]->wait(); }
  void sync_block() const { block_->block_barrier.wait(); }
  // As on a device, lanes wait for one another, but this does not order memory: a table that is read afterwards without
  // a sync() is a race. The upper 32 bits of each value hold the number of the call.
  uint32_t warp_min(uint32_t x) {
    ++call_;
    std::atomic<uint64_t>* values = block_->exchanged[warp()].data() + call_ % 2 * lanes();
    values[lane()].store(uint64_t{call_} << 32 | x, std::memory_order_relaxed);
    for (int k = 0; k < lanes(); ++k) {
      uint64_t value;
      while ((value = values[k].load(std::memory_order_relaxed)) >> 32 != call_) std::this_thread::yield();
      x = std::min(x, static_cast<uint32_t>(value));
    }
    return x;
  }

 private:
  Block* block_;
  int thread_;
  uint32_t call_ = 0;
};

// Solves every problem of the batch by one block of one or several warps, with memory of exactly the required size.
template <class T>
void assign_with_block(const TeamBatch<T>& batch, int warps, int lanes, bool always_copy) {
  const int64_t short_side = std::min(batch.rows, batch.columns), long_side = std::max(batch.rows, batch.columns);
  std::vector<char> tables(table_bytes(short_side, long_side));
  std::vector<T> matrix(always_copy || !is_contiguous(batch) ? short_side * copy_stride(long_side) : 0);
  Block block(warps, lanes);
  const auto solve_all = [&](auto team) {
    for (int64_t problem = 0; problem < batch.problems; ++problem) {
      assign_problem(team, batch, problem, tables.data(), matrix.empty() ? nullptr : matrix.data(), always_copy);
      team.sync();
    }
  };
  std::vector<std::thread> threads;
  for (int thread = 0; thread < warps * lanes; ++thread) {
    threads.emplace_back([&, thread] {
      const EmulatedHardware hardware(block, thread);
      if (warps == 1) {
        solve_all(StridedTeam<WarpGroup<EmulatedHardware>>{WarpGroup<EmulatedHardware>(hardware)});
      } else {
        BlockGroup<EmulatedHardware> group(hardware, block.slots.data());
        solve_all(StridedTeam<BlockGroup<EmulatedHardware>>{group});
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
}

// Checks that each assigned row is in range and used once. Returns the total cost, or NaN where nothing is assigned.
template <class T>
double total_cost(const TeamBatch<T>& batch, int64_t problem, int64_t valid, const std::vector<int64_t>& row_of) {
  std::vector<bool> used(batch.rows);
  double sum = 0;
  int64_t assigned = 0;
  for (int64_t j = 0; j < batch.columns; ++j) {
    const int64_t row = row_of[problem * batch.columns + j];
    MF_EXPECT(row >= -1 && row < batch.rows && (j < valid || row == -1));
    if (row < 0) continue;
    MF_EXPECT(!used[row]);
    used[row] = true;
    ++assigned;
    sum += batch.cost[problem * batch.problem_stride + row * batch.row_stride + j * batch.column_stride];
  }
  MF_EXPECT(assigned == 0 || assigned == std::min<int64_t>(batch.rows, valid));
  return assigned == 0 ? std::nan("") : sum;
}

template <class T>
void run(Random& random, int lanes) {
  const int64_t batch = random.integer(1, 2), rows = random.integer(0, 12), columns = random.integer(0, 12);
  const bool transposed = random.chance(0.3), ragged = random.chance(0.5);
  std::vector<T> cost = random.values<T>(batch * rows * columns, -3, 3);
  const int kind = static_cast<int>(random.integer(0, 3));
  const double forbidden = random.one_of({0.3, 0.7});  // share of forbidden pairs; many leave rows one column
  for (T& value : cost) {
    if (kind == 1) value = std::floor(value);  // ties
    if (kind == 2 && random.chance(forbidden)) value = static_cast<T>(kInfinity);
    if (kind == 3 && random.chance(0.02)) value = random.one_of<T>({static_cast<T>(-kInfinity), T(std::nan(""))});
  }
  std::vector<int64_t> counts(batch);
  for (int64_t& count : counts) count = random.integer(0, columns);
  const std::array<int64_t, 3> strides{rows * columns, transposed ? 1 : columns, transposed ? rows : 1};
  std::vector<int64_t> expected(batch * columns), of_warp(batch * columns, -7), of_block(batch * columns, -7);
  const int64_t* valid = ragged ? counts.data() : nullptr;
  linear_sum_assignment<T>({cost.data(), {batch, rows, columns}, strides, valid, expected.data()}, 1);

  TeamBatch<T> problems{cost.data(), batch, static_cast<int>(rows), static_cast<int>(columns), strides[0],
                        strides[1], strides[2], valid, of_warp.data()};
  assign_with_block(problems, 1, lanes, random.chance(0.5));
  problems.row_of = of_block.data();
  assign_with_block(problems, 3, std::max(lanes, 3), random.chance(0.5));
  MF_EXPECT(of_warp == of_block);
  for (int64_t b = 0; b < batch; ++b) {
    const int64_t count = ragged ? counts[b] : columns;
    const double got = total_cost(problems, b, count, of_warp);
    const double wanted = total_cost(problems, b, count, expected);
    MF_EXPECT(std::isnan(got) == std::isnan(wanted));
    MF_EXPECT(std::isnan(got) || std::fabs(got - wanted) < 1e-9);
  }
}

void run_invalid_counts() {
  const float cost = 0;
  for (const int64_t count : {int64_t{-1}, int64_t{2}, std::numeric_limits<int64_t>::max()}) {
    int64_t row_of = -7;
    assign_with_block<float>({&cost, 1, 1, 1, 1, 1, 1, &count, &row_of}, 1, 2, false);
    MF_EXPECT(row_of == -1);
  }
}

}  // namespace

void run_assignment_teams(Random& random, int threads) {
  // one type at a time, as barriers of threads are slow
  random.chance(0.5) ? run<float>(random, threads) : run<double>(random, threads);
  run_invalid_counts();
}

}  // namespace maskformer_fast
