// Points of an image are sorted once for all layers and queries. A task is a block of queries of one layer and image.
#include "map_cost/map_cost.h"

#include <algorithm>
#include <utility>
#include <vector>

#include "common/cpu_isa.h"
#include "common/threads.h"
#include "map_cost/kernels.h"
#include "matching_cost/kernels.h"
#include "points/kernels.h"

namespace maskformer_fast {
namespace {

constexpr int64_t kSortedBytes = 64 << 20;  // of sorted points and their truth at a time

constexpr int64_t kSparse = 3;  // times as long as a product by rows takes one by numbers of points

// Truth of kMapPoints points: of the targets that are not 0 there, or of all.
struct ChunkTruth {
  std::vector<TargetPoints> targets;
  int64_t first_dense;  // in ImagePoints::dense, -1 where it is sparse
};

// Points of one image, sorted by their rows, with the truth of its targets.
struct ImagePoints {
  std::vector<int32_t> row, column;
  std::vector<float> low, right;
  std::vector<ChunkTruth> chunks;
  std::vector<int32_t> numbers;  // within a chunk, of the sparse truth
  std::vector<float> sparse;
  std::vector<float> dense;   // [points, targets] of each chunk
  std::vector<double> areas;  // [targets]

  SortedPoints view() const { return {row.data(), column.data(), low.data(), right.data()}; }
};

// Splits the truth [targets, count] of points in a given order into chunks.
void split_truth(const float* truth, int64_t targets, const std::vector<int32_t>& order, ImagePoints& points) {
  const int64_t count = static_cast<int64_t>(order.size());
  std::vector<int32_t> numbers(kMapPoints * targets), ends(targets);
  std::vector<float> values(kMapPoints * targets);
  for (int64_t first = 0; first < count; first += kMapPoints) {
    const int64_t length = std::min(kMapPoints, count - first);
    const int32_t* of_chunk = order.data() + first;
    int64_t used = 0;
    for (int64_t t = 0; t < targets; ++t) {
      for (int64_t i = 0; i < length; ++i) {  // without branches, which would be mispredicted
        const float value = truth[t * count + of_chunk[i]];
        numbers[used] = static_cast<int32_t>(i), values[used] = value;
        used += value != 0.0f;
      }
      ends[t] = static_cast<int32_t>(used);
    }
    ChunkTruth chunk{{}, -1};
    if (kSparse * used < length * targets) {
      int32_t start = 0;
      for (int64_t t = 0; t < targets; start = ends[t++]) {
        if (ends[t] > start) chunk.targets.push_back({static_cast<int32_t>(t), ends[t] - start, nullptr, nullptr});
      }
      points.numbers.insert(points.numbers.end(), numbers.begin(), numbers.begin() + used);
      points.sparse.insert(points.sparse.end(), values.begin(), values.begin() + used);
    } else {
      chunk.first_dense = static_cast<int64_t>(points.dense.size());
      for (int64_t i = 0; i < length; ++i) {
        for (int64_t t = 0; t < targets; ++t) points.dense.push_back(truth[t * count + of_chunk[i]]);
      }
    }
    points.chunks.push_back(std::move(chunk));
  }
  int64_t place = 0;  // the vectors have their final addresses now
  for (ChunkTruth& chunk : points.chunks) {
    for (TargetPoints& target : chunk.targets) {
      target.numbers = points.numbers.data() + place, target.truth = points.sparse.data() + place;
      place += target.count;
    }
  }
}

ImagePoints sort_points(const PointCosts& costs, int64_t shared) {
  const int64_t count = costs.points_count, targets = costs.counts[shared % costs.images];
  const float* points = costs.points + 2 * shared * count;
  const float* truth = costs.truth + shared * costs.slots * count;
  std::vector<int32_t> row(count), column(count), order(count);
  std::vector<float> low(count), right(count);
  std::vector<int64_t> ends(costs.height + 3);
  Places places;
  for (int64_t first = 0; first < count; first += kChunk) {
    const int64_t length = std::min(kChunk, count - first);
    MF_DISPATCH(place_points, points + 2 * first, length, costs.height, costs.width, costs.height, costs.width, places);
    for (int64_t i = 0; i < length; ++i) {
      row[first + i] = places.row[i], column[first + i] = places.column[i];
      low[first + i] = places.low[i], right[first + i] = places.right[i];
      ++ends[places.row[i] + 2];
    }
  }
  for (size_t i = 1; i < ends.size(); ++i) ends[i] += ends[i - 1];
  ImagePoints sorted;
  sorted.row.resize(count), sorted.column.resize(count), sorted.low.resize(count), sorted.right.resize(count);
  for (int64_t i = 0; i < count; ++i) {
    const int64_t place = ends[row[i] + 1]++;
    sorted.row[place] = row[i], sorted.column[place] = column[i];
    sorted.low[place] = low[i], sorted.right[place] = right[i];
    order[place] = static_cast<int32_t>(i);
  }
  split_truth(truth, targets, order, sorted);
  for (int64_t t = 0; t < targets; ++t) sorted.areas.push_back(MF_DISPATCH(total, truth + t * count, count));
  return sorted;
}

// Scratch memory of one worker.
struct Scratch {
  Scratch(int64_t width, int64_t slots) : pairs(slots), chosen(slots) {
    for (auto& row : rows) row.resize((width + 3) * kMapQueries);
  }

  std::vector<float> rows[2];  // of the maps, transposed, with a border of zeros
  int64_t row_in[2];           // which rows these are
  std::vector<MapPairSums> pairs;
  std::vector<float> chosen;  // probability of each target's class
  MapValues values;
};

// Returns a row of the maps of a block, zeros outside.
template <class Element>
const float* row_of(const PointCosts& costs, const Element* maps, int64_t queries, int64_t row, Scratch& own) {
  const int64_t slot = row & 1;
  std::vector<float>& to = own.rows[slot];
  if (own.row_in[slot] != row) {
    own.row_in[slot] = row;
    if (row < 0 || row >= costs.height) {
      std::fill(to.begin(), to.end(), 0.0f);
    } else {
      MF_DISPATCH(transpose_row, maps + row * costs.width, costs.height * costs.width, queries, costs.width,
                  to.data() + kMapQueries);
    }
  }
  return to.data();
}

// Writes the costs of a block of queries, the first of which is number `first` of a layer and image.
template <class Element>
void write_block(const PointCosts& costs, const Element* maps, int64_t layer, int64_t image, int64_t first,
                 const ImagePoints& points, Scratch& own, float* result) {
  const int64_t targets = costs.counts[image];
  const int64_t outputs = (layer * costs.images + image) * costs.queries + first;
  const int64_t queries = std::min<int64_t>(kMapQueries, costs.queries - first);
  float* out = result + outputs * costs.slots;
  std::fill(out, out + queries * costs.slots, 0.0f);
  if (targets == 0) return;
  maps += outputs * costs.height * costs.width;
  own.row_in[0] = own.row_in[1] = -2;  // none
  std::fill(own.pairs.begin(), own.pairs.end(), MapPairSums{});
  MapSums sums{};
  const SortedPoints sorted = points.view();
  for (int64_t start = 0; start < costs.points_count; start += kMapPoints) {
    const int64_t length = std::min(kMapPoints, costs.points_count - start);
    for (int64_t i = 0, next; i < length; i = next) {
      const int64_t row = sorted.row[start + i];
      for (next = i + 1; next < length && sorted.row[start + next] == row;) ++next;
      const float* upper = row_of(costs, maps, queries, row, own);
      const float* lower = row_of(costs, maps, queries, row + 1, own);
      MF_DISPATCH(sample_rows, upper, lower, sorted, start + i, next - i, own.values.rise[i]);
    }
    MF_DISPATCH(add_map_losses, own.values, length, costs.loss, sums);
    const ChunkTruth& truth = points.chunks[start / kMapPoints];
    if (truth.first_dense < 0) {
      MF_DISPATCH(add_sparse_products, own.values, truth.targets.data(), static_cast<int64_t>(truth.targets.size()),
                  own.pairs.data());
    } else {
      MF_DISPATCH(add_map_products, own.values, points.dense.data() + truth.first_dense, length, targets,
                  own.pairs.data());
    }
  }
  const double samples = static_cast<double>(std::max<int64_t>(costs.points_count, 1));
  for (int64_t query = 0; query < queries; ++query, out += costs.slots) {
    MF_DISPATCH(chosen_probabilities, costs.class_logits + (outputs + query) * costs.classes, costs.classes,
                costs.labels + image * costs.slots, targets, own.chosen.data());
    for (int64_t t = 0; t < targets; ++t) {
      const MapPairSums& pair = own.pairs[t];
      const double mask = (sums.off_loss[query] + pair.rise[query]) / samples;
      const double dice = 1 - (2 * pair.probability[query] + 1) / (sums.probability[query] + points.areas[t] + 1);
      out[t] = static_cast<float>(costs.mask_weight * mask + costs.dice_weight * dice -
                                  costs.class_weight * static_cast<double>(own.chosen[t]) + sums.broken[query]);
    }
  }
}

}  // namespace

template <class Element>
void map_cost(const PointCosts& costs, const Element* maps, float* result, int threads) {
  check_point_costs(costs);
  const int64_t groups = costs.point_layers * costs.images, blocks = (costs.queries + kMapQueries - 1) / kMapQueries;
  const int64_t layers = costs.point_layers == 1 ? costs.layers : 1;  // of a group
  const int64_t group_bytes = costs.points_count * (costs.slots + 4) * static_cast<int64_t>(sizeof(float));
  const int64_t step = std::clamp<int64_t>(kSortedBytes / std::max<int64_t>(group_bytes, 1), 1, groups);
  const int workers = static_cast<int>(std::max<int64_t>(1, std::min<int64_t>(threads, step * layers * blocks)));
  std::vector<Scratch> scratch(workers, Scratch(costs.width, costs.slots));
  std::vector<ImagePoints> points(step);
  for (int64_t start = 0; start < groups; start += step) {
    const int64_t count = std::min(step, groups - start);
    parallel_for(count, threads, [&](int, int64_t i) { points[i] = sort_points(costs, start + i); });
    parallel_for(count * layers * blocks, workers, [&](int worker, int64_t task) {
      const int64_t group = task / (layers * blocks), inner = task / blocks % layers;
      const int64_t layer = costs.point_layers == 1 ? inner : (start + group) / costs.images;
      write_block(costs, maps, layer, (start + group) % costs.images, task % blocks * kMapQueries, points[group],
                  scratch[worker], result);
    });
  }
}

template void map_cost(const PointCosts&, const float*, float*, int);
template void map_cost(const PointCosts&, const uint16_t*, float*, int);

}  // namespace maskformer_fast
