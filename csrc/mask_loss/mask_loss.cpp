// A task is a pair, or a band of its rows where there are few pairs. Temporaries are a few rows for each thread.
#include "mask_loss/mask_loss.h"

#include <algorithm>
#include <limits>
#include <stdexcept>
#include <string>
#include <vector>

#include "common/cpu_isa.h"
#include "common/resample.h"
#include "common/threads.h"
#include "mask_loss/kernels.h"

namespace maskformer_fast {
namespace {

constexpr int64_t kTasks = 32;  // number of tasks aimed at, enough to keep several threads evenly busy

int64_t round_to_vectors(int64_t pixels) { return (pixels + kMostLanes - 1) / kMostLanes * kMostLanes; }

void check(const MaskPairs& batch) {
  for (int64_t pair = 0; pair < batch.pairs; ++pair) {
    if (batch.rows[pair] >= batch.targets) {
      throw std::invalid_argument("rows: expected less than " + std::to_string(batch.targets) +
                                  " (targets of masks), got " + std::to_string(batch.rows[pair]) + " at pair " +
                                  std::to_string(pair));
    }
  }
  for (const int64_t side : {batch.height, batch.width, batch.input_height, batch.input_width}) {
    if (side > std::numeric_limits<int32_t>::max() - kMostLanes) {
      throw std::invalid_argument("sizes: expected sides below 2^31 - 16, got " + std::to_string(side));
    }
  }
}

// Geometry that all pairs share.
class PairBatch {
 public:
  explicit PairBatch(const MaskPairs& batch)
      : batch_(batch),
        rows_(batch.input_height, static_cast<double>(batch.height), batch.height, batch.input_height),
        columns_(batch.input_width, static_cast<double>(batch.width), batch.width,
                 round_to_vectors(batch.input_width)) {}

  // Returns the number of bands of each pair, at most `most`. It does not depend on the number of threads, because the
  // rounding of the sums depends on the bands.
  int64_t bands(int64_t most) const { return std::clamp<int64_t>(kTasks / batch_.pairs, 1, most); }

  MaskPair pair(int64_t index) const {
    const int64_t row = batch_.rows[index], bytes = (batch_.input_width + 7) / 8;
    MaskPair pair{batch_.logits + index * batch_.height * batch_.width,
                  batch_.height,
                  batch_.width,
                  rows_.taps(),
                  columns_.taps(),
                  batch_.masks + row * batch_.input_height * bytes,
                  bytes,
                  batch_.input_height,
                  batch_.input_width,
                  batch_.loss};
    if (batch_.valid_sizes) {
      pair.counted_rows = std::clamp<int64_t>(batch_.valid_sizes[2 * row], 0, batch_.input_height);
      pair.counted_columns = std::clamp<int64_t>(batch_.valid_sizes[2 * row + 1], 0, batch_.input_width);
    }
    return pair;
  }

 private:
  const MaskPairs& batch_;
  const AxisTable rows_, columns_;
};

// Scratch memory of all workers, allocated before threads start.
class Scratch {
 public:
  Scratch(const MaskPairs& batch, int threads, bool for_gradient)
      : cells_(batch.width + kMostLanes),
        pixels_(for_gradient ? round_to_vectors(batch.input_width) : 0),
        floats_(threads * (cells_ + 2 * pixels_)) {}

  MaskScratch operator[](int worker) {
    float* own = floats_.data() + worker * (cells_ + 2 * pixels_);
    return {own, own + cells_, own + cells_ + pixels_};
  }

 private:
  int64_t cells_, pixels_;
  std::vector<float> floats_;
};

int used_threads(int threads, int64_t tasks) { return static_cast<int>(std::min<int64_t>(threads, tasks)); }

}  // namespace

void mask_sums(const MaskPairs& batch, float* sums, int threads) {
  check(batch);
  if (batch.pairs == 0) return;
  const PairBatch pairs(batch);
  const int64_t bands = pairs.bands(batch.input_height), tasks = batch.pairs * bands;
  threads = used_threads(threads, tasks);
  Scratch scratch(batch, threads, false);
  std::vector<MaskSums> parts(tasks);
  parallel_for(tasks, threads, [&](int worker, int64_t task) {
    const int64_t index = task / bands, band = task % bands;
    if (batch.rows[index] < 0) return;
    const MaskPair pair = pairs.pair(index);
    MF_DISPATCH(add_mask, pair, pair.counted_rows * band / bands, pair.counted_rows * (band + 1) / bands,
                scratch[worker], parts[task]);
  });
  for (int64_t index = 0; index < batch.pairs; ++index) {
    MaskSums all{};
    for (int64_t task = index * bands; task < (index + 1) * bands; ++task) {
      all.loss += parts[task].loss;
      all.overlap += parts[task].overlap;
      all.total += parts[task].total;
      all.area += parts[task].area;
    }
    float* out = sums + 4 * index;
    out[0] = static_cast<float>(all.loss);
    out[1] = static_cast<float>(all.overlap);
    out[2] = static_cast<float>(all.total);
    out[3] = static_cast<float>(all.area);
  }
}

void mask_sums_backward(const MaskPairs& batch, const float* upstream, float* gradient, int threads) {
  check(batch);
  if (batch.pairs == 0) return;
  const PairBatch pairs(batch);
  const int64_t bands = pairs.bands(batch.height), tasks = batch.pairs * bands;
  const int64_t cells = batch.height * batch.width;
  threads = used_threads(threads, tasks);
  Scratch scratch(batch, threads, true);
  parallel_for(tasks, threads, [&](int worker, int64_t task) {
    const int64_t index = task / bands, band = task % bands;
    const int64_t first = batch.height * band / bands, last = batch.height * (band + 1) / bands;
    float* out = gradient + index * cells;
    if (batch.rows[index] < 0) {
      std::fill(out + first * batch.width, out + last * batch.width, 0.0f);
      return;
    }
    const float* own = upstream + 4 * index;
    MF_DISPATCH(differentiate_mask, pairs.pair(index), {own[0], own[1], own[2]}, first, last, scratch[worker],
                out);
  });
}

}  // namespace maskformer_fast
