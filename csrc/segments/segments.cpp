#include "segments/segments.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <stdexcept>

#include "common/cpu_isa.h"
#include "common/resample.h"
#include "segments/kernels.h"
#include "common/threads.h"

namespace maskformer_fast {
namespace {

constexpr int32_t kVoid = -1;

// The tables of an Axis.
class AxisTables {
 public:
  AxisTables(int64_t size, double extent, int64_t source, int tile) : size_(size), tile_(tile) {
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
        if (count >= 2 && taps[count - 2] == position.low) {  // the pair of the position before
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

  Axis view() const {
    return {size_,          static_cast<int64_t>(counts_.size()), tile_, left_.data(), weight_.data(), taps_.data(),
            counts_.data(), runs_.data()};
  }

 private:
  int64_t size_;
  int tile_;
  std::vector<int32_t> left_, taps_, counts_, runs_;
  std::vector<float> weight_;
};

// A window's geometry, and the views of it that kernels take.
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

  AxisTables vertical_, horizontal_;
  MaskLogits logits_;
};

int useful_threads(const MaskLogits& logits, int64_t tasks, int threads) {
  constexpr double kWorkPerThread = 300000;  // pixels x queries: some 50 us, which a new thread is worth
  const double pixels = static_cast<double>(logits.vertical.size) * static_cast<double>(logits.horizontal.size);
  const double work = static_cast<double>(logits.batch * logits.queries) * pixels;
  const auto useful = static_cast<int64_t>(std::min(1.0 + work / kWorkPerThread, 1e9));
  return static_cast<int>(std::clamp<int64_t>(threads, 1, std::max<int64_t>(1, std::min(tasks, useful))));
}

// The queries of a batch that take part, image by image.
struct Candidates {
  int64_t slots = 0;                  // of any image at most
  std::vector<int64_t> slot_counts;   // [batch]
  std::vector<Candidate> candidates;  // [batch, slots]
};

float own_logit(float score, const std::string& rule) {
  if (rule != "huggingface") return 0;
  // score * sigmoid(x) >= 0.5
  return score > 0.5f ? static_cast<float>(std::log(0.5 / (static_cast<double>(score) - 0.5)))
                      : std::numeric_limits<float>::infinity();
}

Candidates find_candidates(int64_t batch, int64_t queries, const PanopticQuery& query) {
  Candidates found;
  for (int64_t image = 0; image < batch; ++image) {
    int64_t count = 0;
    for (int64_t q = 0; q < queries; ++q) {
      const int64_t category = query.categories[image * queries + q];
      if (category >= query.classes) {
        throw std::invalid_argument("categories: expected below " + std::to_string(query.classes) +
                                    " (the length of is_thing), got " + std::to_string(category));
      }
      count += category >= 0;
    }
    found.slot_counts.push_back(count);
    found.slots = std::max(found.slots, count);
  }
  found.candidates.resize(batch * found.slots);
  for (int64_t image = 0; image < batch; ++image) {
    Candidate* next = found.candidates.data() + image * found.slots;
    for (int64_t q = 0; q < queries; ++q) {
      if (query.categories[image * queries + q] < 0) continue;
      const float given = query.scores[image * queries + q], score = given > 0 ? given : 0;  // NaN is 0 too
      *next++ = {q, 1 / score, own_logit(score, query.rule)};
    }
  }
  return found;
}

// Memory of the workers, allocated before they start.
class PanopticWorkers {
 public:
  PanopticWorkers(int workers, const MaskLogits& logits, int64_t slots)
      : scratch_(workers), floats_(workers), alive_(workers), counts_(workers) {
    const int64_t padded = (slots + 15) / 16 * 16, tiles = logits.horizontal.tiles;
    for (int w = 0; w < workers; ++w) {
      floats_[w].resize((2 * tiles + 2) * padded + 2 * logits.columns);
      alive_[w].resize(padded);
      counts_[w].resize(logits.batch * slots);
      float* f = floats_[w].data();
      scratch_[w].padded_slots = padded;
      scratch_[w].low = f;
      scratch_[w].high = f + tiles * padded;
      scratch_[w].best = f + 2 * tiles * padded;
      scratch_[w].worst = scratch_[w].best + padded;
      scratch_[w].column_low = scratch_[w].worst + padded;
      scratch_[w].column_high = scratch_[w].column_low + logits.columns;
      scratch_[w].alive = alive_[w].data();
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
  std::vector<std::vector<int32_t>> alive_;
  std::vector<std::vector<SlotCounts>> counts_;
};

bool is_kept(const SlotCounts& counts, int64_t area, const PanopticQuery& query) {
  if (area == 0 || counts.owned == 0) return false;
  const double ratio = static_cast<double>(counts.won) / static_cast<double>(counts.owned);
  return query.rule == "huggingface" ? ratio > query.overlap_threshold : ratio >= query.overlap_threshold;
}

// Numbers one image's segments from 1, in the order of queries, stuff of a class alike.
// ids: [slots + 1], void already; areas and query_ids: [queries], 0 and void already.
void decide(const Candidate* candidates, int64_t count, const PanopticWorkers& workers, int64_t first_slot,
            const PanopticQuery& query, const int64_t* categories, int32_t* ids, int32_t* query_ids, int64_t* areas) {
  std::vector<int32_t> stuff(query.classes, kVoid);
  int32_t segments = 0;
  for (int64_t s = 0; s < count; ++s) {
    const int64_t q = candidates[s].query, category = categories[q];
    const SlotCounts counts = workers.total(first_slot + s);
    areas[q] = query.rule == "mask2former" ? counts.both : counts.won;
    if (!is_kept(counts, areas[q], query)) continue;
    const bool joins = !query.is_thing[category] && stuff[category] != kVoid;
    ids[s] = query_ids[q] = joins ? stuff[category] : ++segments;
    stuff[category] = ids[s];
  }
}

}  // namespace

void infer_panoptic(const MaskWindow& window, const PanopticQuery& query, const PanopticOutput& output, int threads) {
  if (query.rule != "maskformer" && query.rule != "mask2former" && query.rule != "huggingface") {
    throw std::invalid_argument("rule: expected maskformer, mask2former or huggingface, got " + query.rule);
  }
  const Geometry geometry(window);
  const MaskLogits& logits = geometry.logits();
  const int64_t batch = logits.batch, queries = logits.queries, tile_rows = logits.vertical.tiles;
  const Candidates found = find_candidates(batch, queries, query);
  const int64_t slots = found.slots, tasks = batch * tile_rows;
  std::vector<int32_t> tile_slots(tasks * logits.horizontal.tiles, static_cast<int32_t>(slots));
  std::vector<int32_t> ids(batch * (slots + 1), kVoid);
  threads = useful_threads(logits, tasks, threads);
  PanopticWorkers workers(threads, logits, slots);
  const PanopticJob job{logits,        found.candidates.data(), found.slot_counts.data(), slots,
                        query.rule == "mask2former", output.id_map, tile_slots.data(), ids.data()};

  parallel_for(tasks, threads, [&](int worker, int64_t task) {
    const int64_t image = task / tile_rows;
    if (found.slot_counts[image] > 0) MF_DISPATCH(claim_pixels, job, image, task % tile_rows, workers[worker]);
  });
  std::fill(output.ids, output.ids + batch * queries, kVoid);
  std::fill(output.areas, output.areas + batch * queries, int64_t{0});
  for (int64_t image = 0; image < batch; ++image) {
    decide(found.candidates.data() + image * slots, found.slot_counts[image], workers, image * slots, query,
           query.categories + image * queries, ids.data() + image * (slots + 1), output.ids + image * queries,
           output.areas + image * queries);
  }
  parallel_for(tasks, threads,
               [&](int, int64_t task) { MF_DISPATCH(number_segments, job, task / tile_rows, task % tile_rows); });
}

void infer_instances(const MaskWindow& window, const InstanceOutput& output, int threads) {
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
