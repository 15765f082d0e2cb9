#include "resized_semantic/kernels.h"

#include "common/products.h"
#include "common/simd.h"

namespace maskformer_fast {
namespace MF_ISA {
namespace {

constexpr int kClassesAtOnce = 4;

// Least and largest probabilities of one query in the cells of a row.
MF_INLINE void limit_query(const float* upper, const float* lower, int64_t columns, float* edges, int64_t edge_pitch,
                           float* least, float* largest) {
  float* high = edges + edge_pitch;
  int64_t x = 0;
  for (; x + kLanes <= columns; x += kLanes) {
    const Floats a = load(upper + x), b = load(lower + x);
    store(edges + x, min(a, b));
    store(high + x, max(a, b));
  }
  for (; x < columns; ++x) {
    edges[x] = upper[x] < lower[x] ? upper[x] : lower[x];
    high[x] = upper[x] > lower[x] ? upper[x] : lower[x];
  }
  const int64_t width = (columns + kLanes - 1) / kLanes * kLanes;
  for (; x <= width; ++x) edges[x] = edges[columns - 1], high[x] = high[columns - 1];
  for (x = 0; x < width; x += kLanes) {
    store(least + x, sigmoid(min(load(edges + x), load(edges + x + 1))));
    store(largest + x, sigmoid(max(load(high + x), load(high + x + 1))));
  }
}

// Adds up the bounds of some classes in kLanes cells.
template <int count>
MF_INLINE void add_bounds(const BoundsJob& job, const float* least, const float* largest, int64_t pitch,
                          int64_t first, Floats* low, Floats* high) {
  for (int i = 0; i < count; ++i) low[i] = high[i] = Floats{};
  for (int64_t query = 0; query < job.kept; ++query) {
    const Floats from = load(least + query * pitch), to = load(largest + query * pitch);
    const float* weights = job.weights + query * job.pitch + first;
    for (int i = 0; i < count; ++i) {
      const Floats weight = broadcast(weights[i]);
      low[i] += weight * from;
      high[i] += weight * to;
    }
  }
}

}  // namespace

void bound_cells(const BoundsJob& job, int64_t row, BoundsScratch& scratch) {
  const int64_t columns = job.columns, below = row + 1 < job.rows ? row + 1 : row;
  const int64_t pitch = (columns + 15) / 16 * 16;
  float *least = scratch.limits, *largest = scratch.limits + job.kept * pitch;
  for (int64_t query = 0; query < job.kept; ++query) {
    const float* map = job.logits + job.queries[query] * job.rows * columns;
    limit_query(map + row * columns, map + below * columns, columns, scratch.edges, pitch + 16,
                least + query * pitch, largest + query * pitch);
  }
  for (int64_t x = 0; x < columns; x += kLanes) {
    Floats best = broadcast(-3e38f);
    Ints winner{};
    for (int64_t first = 0; first < job.classes; first += kClassesAtOnce) {
      Floats low[kClassesAtOnce], high[kClassesAtOnce];  // the weights are padded with zeros
      add_bounds<kClassesAtOnce>(job, least + x, largest + x, pitch, first, low, high);
      for (int i = 0; i < kClassesAtOnce && first + i < job.classes; ++i) {
        const int32_t number = static_cast<int32_t>(first + i);
        const Ints better = low[i] > best;
        best = select(better, low[i], best);
        winner = select(better, broadcast(number), winner);
        store(scratch.upper + number * kLanes, high[i] + job.slack[number]);
      }
    }
    Ints sure = broadcast(job.others) < best;
    for (int64_t number = 0; number < job.classes; ++number) {
      sure &= (load(scratch.upper + number * kLanes) < best) | (winner == static_cast<int32_t>(number));
    }
    int32_t* decided = job.decided + row * columns + x;
    for (int64_t lane = 0; lane < kLanes && x + lane < columns; ++lane) {
      decided[lane] = sure[lane] ? job.labels[winner[lane]] : -1;
    }
  }
}

void score_points(const PointsJob& job) {
  for (int64_t first = 0; first < job.points; first += kPointsAtOnce) {
    const int64_t count = job.points - first < kPointsAtOnce ? job.points - first : kPointsAtOnce;
    for (int64_t i = 0; i < count; ++i) {
      const int32_t* corners = job.corners + 4 * (first + i);
      const float* at[4];
      for (int k = 0; k < 4; ++k) at[k] = job.logits + corners[k] * job.depth;
      const float down = job.shares[2 * (first + i)], across = job.shares[2 * (first + i) + 1];
      for (int64_t v = 0; v < job.queries; v += kLanes) {
        const Floats a = load(at[0] + v), c = load(at[2] + v);
        const Floats upper = a + across * (load(at[1] + v) - a), lower = c + across * (load(at[3] + v) - c);
        store(job.masks + i * job.depth + v, sigmoid(upper + down * (lower - upper)));
      }
    }
    multiply_matrices(count, job.pitch, job.queries, job.masks, job.depth, job.weights, job.pitch, false,
                      job.scores + first * job.pitch, job.pitch);
  }
}

}  // namespace MF_ISA
}  // namespace maskformer_fast
