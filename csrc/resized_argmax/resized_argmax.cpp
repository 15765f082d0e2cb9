// A task is the cells of one grid row.
#include "resized_argmax/resized_argmax.h"

#include <algorithm>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#include "common/cpu_isa.h"
#include "common/threads.h"
#include "resized_argmax/axes.h"

namespace maskformer_fast {
namespace {

constexpr int64_t kWidestVector = 16;

// Checks a band and returns the number of its rows of cells.
int64_t check_band(const ScoreGrid& grid) {
  const bool positive = grid.rows > 0 && grid.columns > 0 && grid.channels > 0;
  const bool inside = grid.first_row >= 0 && grid.first_row + grid.rows <= grid.grid_rows;
  if (!positive || !inside) throw std::invalid_argument("grid: expected a band of rows of a grid with points");
  if (grid.pitch % kWidestVector != 0 || grid.pitch < grid.channels) {
    throw std::invalid_argument("pitch: expected a multiple of 16 that holds the channels, got " +
                                std::to_string(grid.pitch));
  }
  return grid.first_row + grid.rows == grid.grid_rows ? grid.rows : grid.rows - 1;
}

// Labels the cells of a checked band.
void label_band(const ArgmaxJob& job, int64_t tasks, const ArgmaxOutput& output, int threads) {
  const int64_t pitch = job.grid.pitch;
  const int workers = static_cast<int>(std::max<int64_t>(1, std::min<int64_t>(threads, tasks)));
  std::vector<int32_t> lists(workers * 2 * pitch);
  std::vector<float> corners(workers * 12 * pitch);
  std::vector<int64_t> counts(workers * 3 * pitch);
  parallel_for(tasks, workers, [&](int worker, int64_t task) {
    int64_t* sums = counts.data() + worker * 3 * pitch;
    ArgmaxScratch scratch{lists.data() + worker * 2 * pitch,
                          lists.data() + (worker * 2 + 1) * pitch,
                          corners.data() + worker * 12 * pitch,
                          corners.data() + (worker * 12 + 8) * pitch,
                          sums,
                          sums + pitch,
                          sums + 2 * pitch};
    MF_DISPATCH(label_cells, job, task, scratch);
  });
  if (output.won == nullptr) return;
  for (int worker = 0; worker < workers; ++worker) {
    const int64_t* sums = counts.data() + worker * 3 * pitch;
    for (int64_t channel = 0; channel < job.grid.channels; ++channel) {
      output.won[channel] += sums[channel];
      output.owned[channel] += sums[pitch + channel];
      output.both[channel] += sums[2 * pitch + channel];
    }
  }
}

}  // namespace

void resized_argmax(const ScoreGrid& grid, const int32_t* decided, ArgmaxKind kind, const float* scale,
                    const float* own_value, const ArgmaxOutput& output, int threads) {
  const int64_t tasks = check_band(grid);
  const CellTable vertical(output.size[0], grid.grid_rows), horizontal(output.size[1], grid.columns);
  const ArgmaxJob job{grid,      decided,       vertical.axis(),  horizontal.axis(), kind, scale,
                      own_value, output.labels, output.size[1], nullptr};
  label_band(job, tasks, output, threads);
}

void twice_resized_winners(const TwiceResized& maps, ArgmaxKind kind, const float* scale, const float* own_value,
                           const ArgmaxOutput& output, int threads) {
  const auto [rows, columns] = maps.window;
  const ScoreGrid grid{nullptr, nullptr, 0, rows, rows, columns, maps.channels, maps.pitch};
  const int64_t tasks = check_band(grid);
  if (maps.rows < 1 || maps.columns < 1 || rows > maps.grid[0] || columns > maps.grid[1]) {
    throw std::invalid_argument("sizes: expected maps with points, and a window within the grid");
  }
  const CellTable vertical(output.size[0], rows), horizontal(output.size[1], columns);
  const Taps down(rows, maps.grid[0], maps.rows), across(columns, maps.grid[1], maps.columns);
  std::vector<int32_t> decided(maps.rows * maps.columns);
  const CoarseGrid coarse{maps.values,       maps.rows,           maps.columns, down.low.data(), across.low.data(),
                          down.share.data(), across.share.data(), decided.data()};
  const ArgmaxJob job{grid,      nullptr,       vertical.axis(),  horizontal.axis(), kind, scale,
                      own_value, output.labels, output.size[1], &coarse};
  parallel_for(maps.rows, threads, [&](int, int64_t row) { MF_DISPATCH(decide_winners, job, row); });
  label_band(job, tasks, output, threads);
}

void decide_cells(const DecideJob& job, int threads) {
  parallel_for(check_band(job.grid), threads,
               [&](int, int64_t row) { MF_DISPATCH(decide_cells, job, row); });
}

}  // namespace maskformer_fast
