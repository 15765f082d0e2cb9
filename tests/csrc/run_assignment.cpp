#include <algorithm>
#include <stdexcept>

#include "assignment/assignment.h"
#include "run_operators.h"

namespace maskformer_fast {
namespace {

template <class T>
void run(Random& random, int threads) {
  const int64_t largest = random.chance(0.2) ? 200 : 40;  // small batches run on one thread
  const int64_t batch = random.integer(0, 5), rows = random.integer(0, largest), columns = random.integer(0, largest);
  const bool transposed = random.chance(0.3), extreme = random.chance(0.5), ties = random.chance(0.3);
  std::vector<T> cost = random.values<T>(batch * rows * columns, -3, 3, extreme);
  if (ties) {
    for (T& value : cost) value = value > 0 ? T{1} : T{0};
  }
  std::vector<int64_t> counts(batch);
  for (int64_t& count : counts) count = random.integer(0, columns);
  std::vector<int64_t> row_of(batch * columns, -7);
  const std::array<int64_t, 3> strides{rows * columns, transposed ? 1 : columns, transposed ? rows : 1};
  const bool ragged = random.chance(0.5);
  linear_sum_assignment<T>(
      {cost.data(), {batch, rows, columns}, strides, ragged ? counts.data() : nullptr, row_of.data()}, threads);

  for (int64_t b = 0; b < batch; ++b) {
    std::vector<bool> used(rows);
    const int64_t valid = ragged ? counts[b] : columns;
    int64_t assigned = 0;
    for (int64_t j = 0; j < columns; ++j) {
      const int64_t row = row_of[b * columns + j];
      MF_EXPECT(row >= -1 && row < rows && (j < valid || row == -1));
      if (row < 0) continue;
      MF_EXPECT(!used[row]);
      used[row] = true;
      ++assigned;
    }
    MF_EXPECT(assigned == std::min(rows, valid) || (assigned == 0 && extreme && !ties));
  }
}

void run_invalid_count() {
  const double cost = 0;
  const int64_t count = 2;
  int64_t row_of = 0;
  try {
    linear_sum_assignment<double>({&cost, {1, 1, 1}, {1, 1, 1}, &count, &row_of}, 1);
  } catch (const std::invalid_argument&) {
    return;
  }
  MF_EXPECT(!"a count past the columns must be refused");
}

}  // namespace

void run_assignment(Random& random, int threads) {
  run<float>(random, threads);
  run<double>(random, threads);
  run_invalid_count();
}

}  // namespace maskformer_fast
