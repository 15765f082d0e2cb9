#include "segments/segments.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <stdexcept>
#include <vector>

#include "common/cpu_isa.h"
#include "common/resample.h"
#include "common/threads.h"
#include "segments/kernels.h"

namespace maskformer_fast {
namespace {

constexpr int32_t kVoid = -1;  // segment of pixels and queries that have none

// Memory of a TiledAxis.
class TiledAxisTable {
 public:
  TiledAxisTable(int64_t size, double extent, int64_t source, int tile) : size_(size), tile_(tile) {
    const int64_t tiles = (size + tile - 1) / tile;
    left_.resize(tiles * tile);
    weight_.resize(tiles * tile);
    taps_.resize(tiles * 2 * tile);
    counts_.resize(tiles);
    runs_.resize(tiles);
    for (int64_t t = 0; t < tiles; ++t) {
      int32_t* taps = taps_.data() + t * 2 * tile;
      int32_t count = 0;
      for (int64_t i = t * tile; i < (t + 1) * tile; ++i) {
        const AxisPosition position = read_position(std::min(i, size - 1), size, extent, source);
        if (count >= 2 && taps[count - 2] == position.low) {  // the same taps as the position before
          left_[i] = count - 2;
        } else {
          if (count == 0 || taps[count - 1] != position.low) taps[count++] = position.low;
          left_[i] = count - 1;
          taps[count++] = position.high;
        }
        weight_[i] = position.share;
      }
      counts_[t] = count;
      int32_t run = 1;
      while (run < count && taps[run] == taps[0] + run) ++run;
      runs_[t] = run;
    }
  }

  TiledAxis view() const {
    return {size_,          static_cast<int64_t>(counts_.size()), tile_, left_.data(), weight_.data(), taps_.data(),
            counts_.data(), runs_.data()};
  }

 private:
  int64_t size_;
  int tile_;
  std::vector<int32_t> left_, taps_, counts_, runs_;
  std::vector<float> weight_;
};

// Owns the tables of a window's geometry and provides them to kernels.
class Geometry {
 public:
  explicit Geometry(const MaskWindow& window)
      : vertical_(window.output[0], window.extent[0], checked(window.sizes[2]), kTileRows),
        horizontal_(window.output[1], window.extent[1], checked(window.sizes[3]), kTileColumns),
        logits_{window.logits,      window.sizes[0],   window.sizes[1],  window.sizes[3],   window.strides[0],
                window.strides[1],  window.strides[2], vertical_.view(), horizontal_.view()} {}

  const MaskLogits& logits() const { return logits_; }

 private:
  static int64_t checked(int64_t side) {
    if (side < 1 || side >= std::numeric_limits<int32_t>::max()) {
      throw std::invalid_argument("mask_logits: expected maps of 1 to 2^31 - 2 rows and columns, got " +
                                  std::to_string(side));
    }
    return side;
  }

  TiledAxisTable vertical_, horizontal_;
  MaskLogits logits_;
};

int useful_threads(const MaskLogits& logits, int64_t tasks, int threads) {
  constexpr double kWorkPerThread = 300000;  // pixels x queries: some 50 us, which outweigh the start of a thread
  const double pixels = static_cast<double>(logits.vertical.size) * static_cast<double>(logits.horizontal.size);
  const double work = static_cast<double>(logits.batch * logits.queries) * pixels;
  const auto useful = static_cast<int64_t>(std::min(1.0 + work / kWorkPerThread, 1e9));
  return static_cast<int>(std::clamp<int64_t>(threads, 1, std::max<int64_t>(1, std::min(tasks, useful))));
}

// Queries of a batch that take part, image by image.
struct Candidates {
  int64_t slots = 0;                 // most candidates of an image
  std::vector<int64_t> slot_counts;  // [batch], candidates of an image
  std::vector<Candidate> list;       // [batch, slots]
};

// Returns the least logit x of the pixels that a query owns: 0, or by Hugging Face's rule score * sigmoid(x) >= 0.5.
float own_logit(float score, const std::string& rule) {
  if (rule != "huggingface") return 0;
  return score > 0.5f ? static_cast<float>(std::log(0.5 / (static_cast<double>(score) - 0.5)))
                      : std::numeric_limits<float>::infinity();
}

Candidates find_candidates(int64_t batch, int64_t queries, const PanopticInput& input) {
  Candidates result;
  for (int64_t image = 0; image < batch; ++image) {
    int64_t count = 0;
    for (int64_t q = 0; q < queries; ++q) {
      const int64_t category = input.categories[image * queries + q];
      if (category >= input.classes) {
        throw std::invalid_argument("categories: expected below " + std::to_string(input.classes) +
                                    " (the length of is_thing), got " + std::to_string(category));
      }
      count += category >= 0;
    }
    result.slot_counts.push_back(count);
    result.slots = std::max(result.slots, count);
  }
  result.list.resize(batch * result.slots);
  for (int64_t image = 0; image < batch; ++image) {
    Candidate* next = result.list.data() + image * result.slots;
    for (int64_t q = 0; q < queries; ++q) {
      if (input.categories[image * queries + q] < 0) continue;
      const float given = input.scores[image * queries + q], score = given > 0 ? given : 0;  // NaN is 0 too
      *next++ = {q, 1 / score, own_logit(score, input.rule)};
    }
  }
  return result;
}

// Scratch memory of all workers, allocated before threads start.
class PanopticWorkers {
 public:
  PanopticWorkers(int workers, const MaskLogits& logits, int64_t slots)
      : scratch_(workers), floats_(workers), possible_(workers), counts_(workers) {
    const int64_t padded = (slots + 15) / 16 * 16, tiles = logits.horizontal.tiles;
    for (int w = 0; w < workers; ++w) {
      floats_[w].resize((2 * tiles + 2) * padded + 2 * logits.columns);
      possible_[w].resize(padded);
      counts_[w].resize(logits.batch * slots);
      float* f = floats_[w].data();
      scratch_[w].padded_slots = padded;
      scratch_[w].low = f;
      scratch_[w].high = f + tiles * padded;
      scratch_[w].least_cost = f + 2 * tiles * padded;
      scratch_[w].most_cost = scratch_[w].least_cost + padded;
      scratch_[w].column_low = scratch_[w].most_cost + padded;
      scratch_[w].column_high = scratch_[w].column_low + logits.columns;
      scratch_[w].possible = possible_[w].data();
      scratch_[w].counts = counts_[w].data();
    }
  }

  PanopticScratch& operator[](int worker) { return scratch_[worker]; }

  SlotCounts total(int64_t index) const {
    SlotCounts sum{0, 0, 0};
    for (const std::vector<SlotCounts>& counts : counts_) {
      sum.won += counts[index].won;
      sum.owned += counts[index].owned;
      sum.both += counts[index].both;
    }
    return sum;
  }

 private:
  std::vector<PanopticScratch> scratch_;
  std::vector<std::vector<float>> floats_;
  std::vector<std::vector<int32_t>> possible_;
  std::vector<std::vector<SlotCounts>> counts_;
};

bool is_kept(const SlotCounts& counts, int64_t area, const PanopticInput& input) {
  if (area == 0 || counts.owned == 0) return false;
  const double ratio = static_cast<double>(counts.won) / static_cast<double>(counts.owned);
  return input.rule == "huggingface" ? ratio > input.overlap_threshold : ratio >= input.overlap_threshold;
}

// Numbers the segments of one image from 1, in the order of queries. Queries of one stuff class share a segment.
// ids: [batch, slots + 1], filled with kVoid. output.ids and output.areas are filled with kVoid and 0.
void number_segments(const PanopticInput& input, const Candidates& candidates, const PanopticWorkers& workers,
                     int64_t image, int64_t queries, int32_t* ids, const PanopticOutput& output) {
  std::vector<int32_t> stuff(input.classes, kVoid);  // segment of each stuff class
  int32_t segments = 0;
  for (int64_t s = 0; s < candidates.slot_counts[image]; ++s) {
    const int64_t slot = image * candidates.slots + s, query = image * queries + candidates.list[slot].query;
    const int64_t category = input.categories[query];
    const SlotCounts counts = workers.total(slot);
    output.areas[query] = input.rule == "mask2former" ? counts.both : counts.won;
    if (!is_kept(counts, output.areas[query], input)) continue;
    const bool joins = !input.is_thing[category] && stuff[category] != kVoid;
    const int32_t segment = joins ? stuff[category] : ++segments;
    output.ids[query] = stuff[category] = ids[image * (candidates.slots + 1) + s] = segment;
  }
}

}  // namespace

void panoptic_inference(const MaskWindow& window, const PanopticInput& input, const PanopticOutput& output,
                        int threads) {
  if (input.rule != "maskformer" && input.rule != "mask2former" && input.rule != "huggingface") {
    throw std::invalid_argument("rule: expected maskformer, mask2former or huggingface, got " + input.rule);
  }
  const Geometry geometry(window);
  const MaskLogits& logits = geometry.logits();
  const int64_t batch = logits.batch, queries = logits.queries, tile_rows = logits.vertical.tiles;
  const Candidates candidates = find_candidates(batch, queries, input);
  const int64_t slots = candidates.slots, tasks = batch * tile_rows;
  std::vector<int32_t> tile_slots(tasks * logits.horizontal.tiles, static_cast<int32_t>(slots));
  std::vector<int32_t> ids(batch * (slots + 1), kVoid);
  threads = useful_threads(logits, tasks, threads);
  PanopticWorkers workers(threads, logits, slots);
  const PanopticJob job{logits,
                        candidates.list.data(),
                        candidates.slot_counts.data(),
                        slots,
                        input.rule == "mask2former",
                        output.id_map,
                        tile_slots.data(),
                        ids.data()};

  parallel_for(tasks, threads, [&](int worker, int64_t task) {
    const int64_t image = task / tile_rows;
    if (candidates.slot_counts[image] > 0) MF_DISPATCH(find_winners, job, image, task % tile_rows, workers[worker]);
  });
  std::fill(output.ids, output.ids + batch * queries, kVoid);
  std::fill(output.areas, output.areas + batch * queries, int64_t{0});
  for (int64_t image = 0; image < batch; ++image) {
    number_segments(input, candidates, workers, image, queries, ids.data(), output);
  }
  parallel_for(tasks, threads,
               [&](int, int64_t task) { MF_DISPATCH(write_segments, job, task / tile_rows, task % tile_rows); });
}

void instance_inference(const MaskWindow& window, const InstanceOutput& output, int threads) {
  const Geometry geometry(window);
  const MaskLogits& logits = geometry.logits();
  const int64_t tasks = logits.batch * logits.queries;
  threads = useful_threads(logits, tasks, threads);
  std::vector<InstanceScratch> scratch(threads);
  std::vector<float> columns(2 * logits.columns * threads);
  for (int t = 0; t < threads; ++t) {
    scratch[t].column_low = columns.data() + 2 * logits.columns * t;
    scratch[t].column_high = scratch[t].column_low + logits.columns;
  }
  const InstanceJob job{logits, output.masks, output.areas, output.boxes, output.scores};
  parallel_for(tasks, threads, [&](int worker, int64_t task) {
    MF_DISPATCH(extract_mask, job, task / logits.queries, task % logits.queries, scratch[worker]);
  });
}

}  // namespace maskformer_fast
