// Mask logits are computed and summed a tile at a time (kernels.h). A task is a stretch of the pixels of one image. It
// computes sums for every query and pair, and a second pass turns the sums of all stretches into costs.
//
// The sums over a target's pixels are cheap because neighbouring pixels mostly lie in the same targets: a tile's pixels
// are cut into runs, and each run is summed once, whatever the number of targets.
#include "matching_cost/matching_cost.h"

#include <algorithm>
#include <stdexcept>
#include <string>
#include <vector>

#include "common/cpu_isa.h"
#include "common/threads.h"
#include "matching_cost/kernels.h"

namespace maskformer_fast {
namespace {

// Returns the pixel (of `size`) that each of `out` samples of torch's nearest interpolation reads. The arithmetic is
// float32, as in torch.
std::vector<int64_t> nearest(int64_t out, int64_t size) {
  std::vector<int64_t> index(out);
  const float scale = static_cast<float>(static_cast<double>(size) / static_cast<double>(out));
  for (int64_t i = 0; i < out; ++i) {
    index[i] = std::min(static_cast<int64_t>(static_cast<float>(i) * scale), size - 1);
  }
  return index;
}

// Returns bits of a packed row, that of column `first` in bit 0; at most 64.
uint64_t read_bits(const uint8_t* row, int64_t first, int64_t count) {
  uint64_t bits = 0;
  for (int64_t i = 0, taken; i < count; i += taken) {
    const int64_t column = first + i;
    taken = std::min(8 - column % 8, count - i);
    bits |= static_cast<uint64_t>(row[column / 8] >> column % 8 & ((1 << taken) - 1)) << i;
  }
  return bits;
}

// Counted pixels of an image: the first `rows` x `columns`, numbered along the rows.
struct Region {
  int64_t rows, columns;
  int64_t pixels() const { return rows * columns; }
};

// Adjacent pixels of one row in a tile.
struct Segment {
  int64_t row, column;
  int first, pixels;  // first pixel within the tile, number of pixels
};

struct Scratch;

// Sums of a batch and the costs that follow from them.
class CostSums {
 public:
  explicit CostSums(const MatchingBatch& batch);

  int64_t tasks() const { return batch_.images * stretches_; }
  int64_t groups() const { return groups_; }
  const MatchingBatch& batch() const { return batch_; }

  // Sums over stretch task % stretches_ of image task / stretches_.
  void add_pixels(int64_t task, Scratch& scratch);
  // Writes the costs of the queries of one layer and image.
  void write_costs(int64_t layer, int64_t image);

 private:
  void cut_segments(int64_t image, int64_t first, int pixels, Scratch& scratch) const;
  void find_runs(int64_t image, Scratch& scratch, int64_t* areas) const;
  void pack_embeddings(int64_t image, Scratch& scratch) const;
  void pack_pixels(int64_t image, Scratch& scratch) const;
  void pack_logits(int64_t image, int64_t group, Scratch& scratch) const;

  const MatchingBatch& batch_;
  std::vector<int64_t> source_rows_, source_columns_;
  std::vector<Region> regions_;
  int64_t groups_;      // groups of kTileQueries queries, over all layers
  int64_t stretches_;   // tasks of an image; the rounding of the sums depends on it, so the number of threads must not
                        // change it
  std::vector<int64_t> first_pair_;  // [images + 1], number of targets of the images before
  std::vector<QuerySums> query_sums_;  // [tasks, groups]
  std::vector<PairSums> pair_sums_;    // [image][stretches, groups, counts[image]]
  std::vector<int64_t> areas_;         // [image][stretches, counts[image]], pixels of each target
};

// Scratch memory of one worker, allocated before threads start.
struct Scratch {
  explicit Scratch(const CostSums& sums);

  std::vector<float> embeddings;  // [groups, depth, kTileQueries]
  std::vector<float> pixels;      // [depth, kTilePixels]
  std::vector<float> logits;      // [kTilePixels, kTileQueries]
  std::vector<Segment> segments;
  std::vector<uint64_t> members;  // [slots, kTileWords], bit i is set where pixel i lies in the target
  std::vector<Run> runs;
  std::vector<int> targets;  // of the runs
};

constexpr int kTileWords = (kTilePixels + 63) / 64;

Scratch::Scratch(const CostSums& sums)
    : embeddings(sums.batch().pixels ? sums.groups() * sums.batch().depth * kTileQueries : 0),
      pixels(sums.batch().pixels ? sums.batch().depth * kTilePixels : 0),
      logits(kTilePixels * kTileQueries),
      members(sums.batch().slots * kTileWords) {
  segments.reserve(kTilePixels);
  runs.reserve(kTilePixels);
  targets.reserve(kTilePixels * sums.batch().slots);
}

void check(const MatchingBatch& batch) {
  for (int64_t image = 0; image < batch.images; ++image) {
    const int64_t count = batch.counts[image];
    if (count < 0 || count > batch.slots) {
      throw std::invalid_argument("counts: expected 0.." + std::to_string(batch.slots) +
                                  " (slots of the targets), got " + std::to_string(count) + " at image " +
                                  std::to_string(image));
    }
    for (int64_t t = 0; t < count; ++t) {
      const int64_t label = batch.labels[image * batch.slots + t];
      if (label < 0 || label >= batch.classes) {
        throw std::invalid_argument("labels: expected 0.." + std::to_string(batch.classes - 1) +
                                    " (classes of class_logits), got " + std::to_string(label) + " at image " +
                                    std::to_string(image));
      }
    }
  }
}

CostSums::CostSums(const MatchingBatch& batch)
    : batch_(batch),
      source_rows_(nearest(batch.height, batch.input_height)),
      source_columns_(nearest(batch.width, batch.input_width)),
      groups_((batch.layers * batch.queries + kTileQueries - 1) / kTileQueries) {
  const int64_t tiles = (batch.height * batch.width + kTilePixels - 1) / kTilePixels;
  constexpr int64_t kTasks = 32;  // number of tasks aimed at, enough to keep several threads evenly busy
  stretches_ = std::clamp<int64_t>(kTasks / std::max<int64_t>(batch.images, 1), 1, std::max<int64_t>(tiles, 1));
  first_pair_.push_back(0);
  for (int64_t image = 0; image < batch.images; ++image) {
    Region region{batch.height, batch.width};
    if (batch.valid_sizes) {
      const auto counted = [](const std::vector<int64_t>& source, int64_t limit) {
        return std::lower_bound(source.begin(), source.end(), limit) - source.begin();
      };
      region = {counted(source_rows_, batch.valid_sizes[2 * image]),
                counted(source_columns_, batch.valid_sizes[2 * image + 1])};
    }
    regions_.push_back(region);
    first_pair_.push_back(first_pair_.back() + batch.counts[image]);
  }
  query_sums_.resize(tasks() * groups_);
  pair_sums_.resize(first_pair_.back() * stretches_ * groups_);
  areas_.resize(first_pair_.back() * stretches_);
}

void CostSums::cut_segments(int64_t image, int64_t first, int pixels, Scratch& scratch) const {
  const int64_t columns = regions_[image].columns;
  scratch.segments.clear();
  for (int done = 0; done < pixels;) {
    const int64_t column = (first + done) % columns;
    const int length = static_cast<int>(std::min<int64_t>(pixels - done, columns - column));
    scratch.segments.push_back({(first + done) / columns, column, done, length});
    done += length;
  }
}

void CostSums::find_runs(int64_t image, Scratch& scratch, int64_t* areas) const {
  const int64_t count = batch_.counts[image], row_bytes = (batch_.input_width + 7) / 8;
  const bool is_dense = batch_.width == batch_.input_width;  // each column is read
  uint64_t ends[kTileWords] = {1};  // bit i is set where a run begins at pixel i
  std::fill_n(scratch.members.begin(), count * kTileWords, 0);
  for (int64_t t = 0; t < count; ++t) {
    const uint8_t* mask = batch_.masks + (image * batch_.slots + t) * batch_.input_height * row_bytes;
    uint64_t* words = scratch.members.data() + t * kTileWords;
    for (const Segment& segment : scratch.segments) {
      const uint8_t* row = mask + source_rows_[segment.row] * row_bytes;
      for (int i = 0, length; i < segment.pixels; i += length) {
        const int place = segment.first + i;
        const int64_t* columns = source_columns_.data() + segment.column + i;
        length = std::min(segment.pixels - i, 64 - place % 64);
        uint64_t bits = 0;
        if (is_dense) {
          bits = read_bits(row, columns[0], length);
        } else {
          for (int k = 0; k < length; ++k) {
            bits |= static_cast<uint64_t>(row[columns[k] / 8] >> columns[k] % 8 & 1) << k;
          }
        }
        areas[t] += __builtin_popcountll(bits);
        words[place / 64] |= bits << place % 64;
      }
    }
    for (int w = 0; w < kTileWords; ++w) ends[w] |= words[w] ^ (words[w] << 1 | (w > 0 ? words[w - 1] >> 63 : 0));
  }
  const int pixels = scratch.segments.back().first + scratch.segments.back().pixels;
  scratch.runs.clear();
  scratch.targets.clear();
  for (int i = 0, next; i < pixels; i = next) {
    for (next = i + 1; next < pixels && !(ends[next / 64] >> next % 64 & 1);) ++next;
    const int first = static_cast<int>(scratch.targets.size());
    for (int64_t t = 0; t < count; ++t) {
      if (scratch.members[t * kTileWords + i / 64] >> i % 64 & 1) scratch.targets.push_back(static_cast<int>(t));
    }
    scratch.runs.push_back({next - i, first, static_cast<int>(scratch.targets.size())});
  }
}

void CostSums::pack_embeddings(int64_t image, Scratch& scratch) const {
  const int64_t depth = batch_.depth;
  for (int64_t row = 0; row < batch_.layers * batch_.queries; ++row) {
    const int64_t layer = row / batch_.queries, query = row % batch_.queries;
    const float* source = batch_.embeddings + ((layer * batch_.images + image) * batch_.queries + query) * depth;
    float* out = scratch.embeddings.data() + row / kTileQueries * depth * kTileQueries + row % kTileQueries;
    for (int64_t d = 0; d < depth; ++d) out[d * kTileQueries] = source[d];
  }
}

void CostSums::pack_pixels(int64_t image, Scratch& scratch) const {
  const auto [image_stride, depth_stride, row_stride, column_stride] = batch_.pixel_strides;
  for (int64_t d = 0; d < batch_.depth; ++d) {
    const float* plane = batch_.pixels + image * image_stride + d * depth_stride;
    for (const Segment& segment : scratch.segments) {
      const float* source = plane + segment.row * row_stride + segment.column * column_stride;
      float* out = scratch.pixels.data() + d * kTilePixels + segment.first;
      for (int i = 0; i < segment.pixels; ++i) out[i] = source[i * column_stride];
    }
  }
}

void CostSums::pack_logits(int64_t image, int64_t group, Scratch& scratch) const {
  const int64_t first = group * kTileQueries, size = batch_.height * batch_.width;
  const int64_t queries = std::min<int64_t>(kTileQueries, batch_.layers * batch_.queries - first);
  const float* maps[kTileQueries] = {};
  for (int64_t lane = 0; lane < queries; ++lane) {
    const int64_t layer = (first + lane) / batch_.queries, query = (first + lane) % batch_.queries;
    maps[lane] = batch_.embeddings + ((layer * batch_.images + image) * batch_.queries + query) * size;
  }
  for (const Segment& segment : scratch.segments) {
    MF_DISPATCH(transpose_logits, maps, queries, segment.row * batch_.width + segment.column, segment.pixels,
                scratch.logits.data() + segment.first * kTileQueries);
  }
}

void CostSums::add_pixels(int64_t task, Scratch& scratch) {
  const int64_t image = task / stretches_, stretch = task % stretches_, count = batch_.counts[image];
  if (count == 0) return;
  const int64_t pixels = regions_[image].pixels(), tiles = (pixels + kTilePixels - 1) / kTilePixels;
  QuerySums* queries = query_sums_.data() + task * groups_;
  PairSums* pairs = pair_sums_.data() + (first_pair_[image] * stretches_ + stretch * count) * groups_;
  int64_t* areas = areas_.data() + first_pair_[image] * stretches_ + stretch * count;
  if (batch_.pixels) pack_embeddings(image, scratch);
  for (int64_t tile = tiles * stretch / stretches_; tile < tiles * (stretch + 1) / stretches_; ++tile) {
    const int64_t first = tile * kTilePixels;
    cut_segments(image, first, static_cast<int>(std::min<int64_t>(kTilePixels, pixels - first)), scratch);
    find_runs(image, scratch, areas);
    if (batch_.pixels) pack_pixels(image, scratch);
    for (int64_t group = 0; group < groups_; ++group) {
      if (batch_.pixels) {
        MF_DISPATCH(multiply_tile, batch_.depth, scratch.pixels.data(),
                    scratch.embeddings.data() + group * batch_.depth * kTileQueries, scratch.logits.data());
      } else {
        pack_logits(image, group, scratch);
      }
      const int64_t left = batch_.layers * batch_.queries - group * kTileQueries;
      MF_DISPATCH(add_tile, scratch.logits.data(), static_cast<int>(std::min<int64_t>(kTileQueries, left)),
                  scratch.runs.data(), static_cast<int>(scratch.runs.size()), scratch.targets.data(), batch_.loss,
                  queries[group], pairs + group * count);
    }
  }
}

void CostSums::write_costs(int64_t layer, int64_t image) {
  const int64_t count = batch_.counts[image];
  const double samples = static_cast<double>(std::max<int64_t>(regions_[image].pixels(), 1));
  const QuerySums* queries = query_sums_.data() + image * stretches_ * groups_;
  const PairSums* pairs = pair_sums_.data() + first_pair_[image] * stretches_ * groups_;
  const int64_t* areas = areas_.data() + first_pair_[image] * stretches_;
  for (int64_t query = 0; query < batch_.queries; ++query) {
    const int64_t row = layer * batch_.queries + query, group = row / kTileQueries, lane = row % kTileQueries;
    const int64_t place = (layer * batch_.images + image) * batch_.queries + query;
    float* cost = batch_.cost + place * batch_.slots;
    std::fill(cost, cost + batch_.slots, 0.0f);
    if (count == 0) continue;
    MF_DISPATCH(chosen_probabilities, batch_.class_logits + place * batch_.classes, batch_.classes,
                batch_.labels + image * batch_.slots, count, cost);
    double probability = 0, off_loss = 0, broken = 0;
    for (int64_t stretch = 0; stretch < stretches_; ++stretch) {
      const QuerySums& sums = queries[stretch * groups_ + group];
      probability += sums.probability[lane];
      off_loss += sums.off_loss[lane];
      broken += sums.broken[lane];
    }
    for (int64_t t = 0; t < count; ++t) {
      double overlap = 0, rise = 0, area = 0;
      for (int64_t stretch = 0; stretch < stretches_; ++stretch) {
        const PairSums& sums = pairs[(stretch * groups_ + group) * count + t];
        overlap += sums.probability[lane];
        rise += sums.rise[lane];
        area += static_cast<double>(areas[stretch * count + t]);
      }
      const double mask = (off_loss + rise) / samples;
      const double dice = 1 - (2 * overlap + 1) / (probability + area + 1);
      cost[t] = static_cast<float>(batch_.mask_weight * mask + batch_.dice_weight * dice -
                                   batch_.class_weight * cost[t] + broken);
    }
  }
}

}  // namespace

void matching_cost(const MatchingBatch& batch, int threads) {
  check(batch);
  CostSums sums(batch);
  threads = static_cast<int>(std::clamp<int64_t>(threads, 1, std::max<int64_t>(sums.tasks(), 1)));
  std::vector<Scratch> scratch;
  scratch.reserve(threads);
  for (int t = 0; t < threads; ++t) scratch.emplace_back(sums);
  parallel_for(sums.tasks(), threads, [&](int worker, int64_t task) { sums.add_pixels(task, scratch[worker]); });
  parallel_for(batch.layers * batch.images, threads,
               [&](int, int64_t task) { sums.write_costs(task / batch.images, task % batch.images); });
}

}  // namespace maskformer_fast
