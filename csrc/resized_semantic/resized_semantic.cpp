// A task is the cells of some rows of the grid.
#include "resized_semantic/resized_semantic.h"

#include <algorithm>
#include <stdexcept>
#include <vector>

#include "common/cpu_isa.h"
#include "common/threads.h"
#include "resized_argmax/axes.h"
#include "resized_semantic/kernels.h"

namespace maskformer_fast {
namespace {

constexpr int64_t kWidestVector = 16;
constexpr int64_t kTaskPoints = 1 << 13;  // at least one row, and the next one, of which scores are computed again

int64_t padded(int64_t count) { return (count + kWidestVector - 1) / kWidestVector * kWidestVector; }

void check(const GridScores& s, const std::array<int64_t, 2>& size) {
  const bool positive = s.queries > 0 && s.rows > 0 && s.columns > 0 && s.classes > 0 && size[0] > 0 && size[1] > 0;
  const bool bounded = s.kept == 0 || (s.live > 0 && s.live <= s.classes && s.kept <= s.queries);
  if (!positive || !bounded || s.kept < 0) throw std::invalid_argument("sizes: expected queries, classes and points");
  if (s.pitch != padded(s.classes) || (s.kept > 0 && s.live_pitch != padded(s.live))) {
    throw std::invalid_argument("pitch: expected the classes' number, rounded up to a multiple of 16");
  }
  for (int axis = 0; axis < 2; ++axis) {
    if (s.window[axis] < 1 || s.window[axis] > s.grid[axis]) {
      throw std::invalid_argument("window: expected a part of the grid");
    }
  }
}

// Labels that bounds give to the cells of the logits' own grid.
std::vector<int32_t> bounded_cells(const GridScores& s, int threads) {
  std::vector<int32_t> decided(s.rows * s.columns);
  const BoundsJob job{s.logits, s.rows, s.columns, s.order,        s.kept,        s.live_weights,
                      s.live,   s.live_pitch, s.slack, s.others, s.live_classes, decided.data()};
  const int workers = static_cast<int>(std::max<int64_t>(1, std::min<int64_t>(threads, s.rows)));
  const int64_t width = padded(s.columns), edges = 2 * (width + kWidestVector), limits = 2 * s.kept * width;
  const int64_t needed = edges + limits + s.live * kWidestVector;
  std::vector<float> memory(workers * needed);
  parallel_for(s.rows, workers, [&](int worker, int64_t row) {
    float* start = memory.data() + worker * needed;
    BoundsScratch scratch{start, start + edges, start + edges + limits};
    MF_DISPATCH(bound_cells, job, row, scratch);
  });
  return decided;
}

// Labels the cells of some rows of the grid.
class Block {
 public:
  Block(const GridScores& scores, const ArgmaxJob& job, const Taps& down, const Taps& across)
      : s_(scores), job_(job), down_(down), across_(across) {}

  void label(int64_t first, int64_t cells, const int32_t* coarse) {
    first_ = first, cells_ = cells;
    rows_ = std::min(cells + 1, s_.window[0] - first);
    decided_.assign(rows_ * columns(), -1);
    if (coarse != nullptr) {
      for (int64_t row = 0; row < cells; ++row) take_labels(coarse, row);
      if (score_open_cells(s_.kept, s_.live_weights, s_.live_pitch)) {
        const DecideJob decide{grid(s_.live, s_.live_pitch), s_.slack, s_.others, s_.live_classes, decided_.data()};
        for (int64_t row = 0; row < cells; ++row) MF_DISPATCH(decide_cells, decide, row);
      }
    }
    score_open_cells(s_.queries, s_.weights, s_.pitch);
    ArgmaxJob job = job_;
    job.grid = grid(s_.classes, s_.pitch);
    job.decided = decided_.data();
    candidates_.resize(s_.pitch);
    corner_values_.resize(8 * s_.pitch);
    ArgmaxScratch scratch{candidates_.data(), nullptr, corner_values_.data(), nullptr, nullptr, nullptr, nullptr};
    for (int64_t row = 0; row < cells; ++row) MF_DISPATCH(label_cells, job, row, scratch);
  }

 private:
  int64_t columns() const { return s_.window[1]; }

  ScoreGrid grid(int64_t classes, int64_t pitch) const {
    return {scores_.data(), place_.data(), first_, rows_, s_.window[0], columns(), classes, pitch};
  }

  // Labels the cells of a row whose corners are in cells of the coarse grid with the same label.
  void take_labels(const int32_t* coarse, int64_t row) {
    const int64_t below = std::min(first_ + row + 1, s_.window[0] - 1);
    const int32_t* upper = coarse + down_.low[first_ + row] * s_.columns;
    const int32_t* lower = coarse + down_.low[below] * s_.columns;
    int32_t* decided = decided_.data() + row * columns();
    int32_t from = -1, label = -1;
    for (int64_t column = 0; column < columns(); ++column) {
      const int32_t place = across_.low[column];
      if (place != from) {
        const int32_t next = upper[place] == lower[place] ? upper[place] : -1;
        if (column > 0 && next != label) decided[column - 1] = -1;
        from = place, label = next;
      }
      decided[column] = label;
    }
  }

  // Computes scores at the corners of all cells without a label; returns false where there is none.
  bool score_open_cells(int64_t queries, const float* weights, int64_t pitch) {
    list_points();
    if (points_.empty()) return false;
    const int64_t depth = padded(queries), count = static_cast<int64_t>(points_.size());
    list_corners();
    logits_.assign(sources_.size() * depth, 0.0f);
    for (int64_t query = 0; query < queries; ++query) {
      const float* map = s_.logits + s_.order[query] * s_.rows * s_.columns;
      float* to = logits_.data() + query;
      for (size_t i = 0; i < sources_.size(); ++i) to[i * depth] = map[sources_[i]];
    }
    masks_.resize(kPointsAtOnce * depth);
    if (static_cast<int64_t>(scores_.size()) < count * pitch) scores_.resize(count * pitch);
    const PointsJob job{logits_.data(), corners_.data(), shares_.data(), count, queries, depth,
                        weights,        pitch,           masks_.data(),  scores_.data()};
    MF_DISPATCH(score_points, job);
    return true;
  }

  // Numbers the corners of cells without a label.
  void list_points() {
    points_.clear();
    place_.assign(rows_ * columns(), -1);
    const auto add = [&](int64_t point) {
      if (place_[point] >= 0) return;
      place_[point] = static_cast<int32_t>(points_.size());
      points_.push_back(static_cast<int32_t>(point));
    };
    for (int64_t row = 0; row < cells_; ++row) {
      const int64_t below = row + 1 < rows_ ? row + 1 : row;
      for (int64_t column = 0; column < columns(); ++column) {
        if (decided_[row * columns() + column] >= 0) continue;
        const int64_t right = column + 1 < columns() ? column + 1 : column;
        for (const int64_t y : {row, below}) {
          for (const int64_t x : {column, right}) add(y * columns() + x);
        }
      }
    }
  }

  // Numbers the logits around these points.
  void list_corners() {
    const int64_t first = down_.low[first_], last = std::min<int64_t>(down_.low[first_ + rows_ - 1] + 1, s_.rows - 1);
    source_place_.assign((last - first + 1) * s_.columns, -1);
    sources_.clear();
    corners_.clear();
    shares_.clear();
    for (const int32_t point : points_) {
      const int64_t row = first_ + point / columns(), column = point % columns();
      const int64_t top = down_.low[row], left = across_.low[column];
      const int64_t bottom = std::min(top + 1, s_.rows - 1), right = std::min(left + 1, s_.columns - 1);
      for (const int64_t y : {top, bottom}) {
        for (const int64_t x : {left, right}) {
          int32_t& place = source_place_[(y - first) * s_.columns + x];
          if (place < 0) {
            place = static_cast<int32_t>(sources_.size());
            sources_.push_back(y * s_.columns + x);
          }
          corners_.push_back(place);
        }
      }
      shares_.push_back(down_.share[row]);
      shares_.push_back(across_.share[column]);
    }
  }

  const GridScores& s_;
  const ArgmaxJob& job_;
  const Taps &down_, &across_;
  int64_t first_ = 0, cells_ = 0, rows_ = 0;  // of the block: first row, rows of cells, rows of points
  std::vector<int32_t> decided_, place_, points_, source_place_, corners_, candidates_;
  std::vector<int64_t> sources_;
  std::vector<float> shares_, logits_, masks_, scores_, corner_values_;
};

}  // namespace

void grid_semantic(const GridScores& s, int64_t* labels, std::array<int64_t, 2> size, int threads) {
  check(s, size);
  const int64_t rows = s.window[0], columns = s.window[1];
  const CellTable vertical(size[0], rows), horizontal(size[1], columns);
  const Taps down(rows, s.grid[0], s.rows), across(columns, s.grid[1], s.columns);
  std::vector<int32_t> coarse;
  if (s.kept > 0) coarse = bounded_cells(s, threads);
  const ArgmaxJob job{{},      nullptr, vertical.axis(), horizontal.axis(), ArgmaxKind::scores, nullptr,
                      nullptr, labels,  size[1],         nullptr};
  const int64_t cells = std::max<int64_t>(1, kTaskPoints / columns), tasks = (rows + cells - 1) / cells;
  const int workers = static_cast<int>(std::max<int64_t>(1, std::min<int64_t>(threads, tasks)));
  std::vector<Block> blocks(workers, Block(s, job, down, across));
  parallel_for(tasks, workers, [&](int worker, int64_t task) {
    const int64_t first = task * cells;
    blocks[worker].label(first, std::min(cells, rows - first), s.kept > 0 ? coarse.data() : nullptr);
  });
}

}  // namespace maskformer_fast
