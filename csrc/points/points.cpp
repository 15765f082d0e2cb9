// A task is a row of samples, a map, a pair, or a block of queries of one layer and image.
#include "points/points.h"

#include <algorithm>
#include <cstring>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#include "common/cpu_isa.h"
#include "common/threads.h"
#include "matching_cost/kernels.h"
#include "points/kernels.h"

namespace maskformer_fast {
namespace {

void check_range(const char* name, int64_t value, int64_t low, int64_t limit) {
  if (value < low || value >= limit) {
    throw std::invalid_argument(std::string(name) + ": expected " + std::to_string(low) + ".." +
                                std::to_string(limit - 1) + ", got " + std::to_string(value));
  }
}

// Scratch memory of one worker.
struct Scratch {
  explicit Scratch(int64_t padded = 0) : padded(padded) {}

  std::vector<float> padded;  // zero at the border
  Places places{};
  float logits[kChunk]{}, gradient[kChunk]{};
};

std::vector<Scratch> scratch_of(int threads, int64_t tasks, int64_t padded) {
  return std::vector<Scratch>(std::max<int64_t>(1, std::min<int64_t>(threads, tasks)), Scratch(padded));
}

// Calls work(first point, number of points) for each chunk.
template <class Work>
void for_chunks(int64_t count, const Work& work) {
  for (int64_t first = 0; first < count; first += kChunk) work(first, std::min(kChunk, count - first));
}

// Masks are larger than the cache, and points in no order: what is read is asked for that many points before.
constexpr int64_t kAhead = 24;

template <class Mask>
void sample_mask(const Mask& mask, int64_t height, int64_t width, const Places& places, int64_t count, float* result) {
  for (int64_t i = 0; i < count; ++i) {
    const int64_t x = places.column[i], y = places.row[i], later = std::min(i + kAhead, count - 1);
    for (int64_t row = places.row[later]; row <= places.row[later] + 1; ++row) {
      __builtin_prefetch(mask.address(std::clamp<int64_t>(row, 0, height - 1), std::max(places.column[later], 0)));
    }
    const float right = places.right[i], low = places.low[i];
    float corners[4];  // upper left, upper right, lower left, lower right
    if (x >= 0 && y >= 0 && x + 1 < width && y + 1 < height) {
      corners[0] = mask(y, x), corners[1] = mask(y, x + 1);
      corners[2] = mask(y + 1, x), corners[3] = mask(y + 1, x + 1);
    } else {
      const auto inner = [&](int64_t row, int64_t column) {
        return row >= 0 && row < height && column >= 0 && column < width ? mask(row, column) : 0.0f;
      };
      corners[0] = inner(y, x), corners[1] = inner(y, x + 1);
      corners[2] = inner(y + 1, x), corners[3] = inner(y + 1, x + 1);
    }
    const float upper = (1.0f - right) * corners[0] + right * corners[1];
    const float lower = (1.0f - right) * corners[2] + right * corners[3];
    result[i] = (1.0f - low) * upper + low * lower;
  }
}

// Masks of bytes in memory.
struct ByteMask {
  const uint8_t* values;
  int64_t width;

  const void* address(int64_t y, int64_t x) const { return values + y * width + std::min(x, width - 1); }
  float operator()(int64_t y, int64_t x) const { return static_cast<float>(values[y * width + x]); }
};

struct PackedMask {
  const uint8_t* values;
  int64_t row_bytes;

  const void* address(int64_t y, int64_t) const { return values + y * row_bytes; }
  float operator()(int64_t y, int64_t x) const {
    return static_cast<float>(values[y * row_bytes + x / 8] >> (x % 8) & 1);
  }
};

void sample_chunk(const MaskSamples& samples, int64_t mask, const Places& places, int64_t count, float* result) {
  const int64_t height = samples.height, width = samples.width, row_bytes = (width + 7) / 8;
  const auto sample = [&](const auto& values) { sample_mask(values, height, width, places, count, result); };
  const auto bytes = static_cast<const uint8_t*>(samples.masks);
  if (samples.format == MaskFormat::float32) {
    MF_DISPATCH(sample_dense, static_cast<const float*>(samples.masks) + mask * height * width, height, width, places,
                count, result);
  } else if (samples.format == MaskFormat::bytes) {
    sample(ByteMask{bytes + mask * height * width, width});
  } else {
    sample(PackedMask{bytes + mask * height * row_bytes, row_bytes});
  }
}

// Finds the smallest of some numbers by their absolute value, in passes that count leading bits.
class Selection {
 public:
  explicit Selection(int64_t count) : keys_(count), similar_(count + 1), numbers_(count + 1) {}

  // Bits of |x|, which order as the numbers do, NaN last.
  void set(int64_t first, const float* values, int64_t count) {
    for (int64_t i = 0; i < count; ++i) {
      uint32_t bits;
      std::memcpy(&bits, values + i, sizeof bits);
      keys_[first + i] = bits & 0x7fffffffu;
    }
  }

  // Returns the numbers of the `wanted` smallest in ascending order; among equal ones the first.
  const int32_t* smallest(int64_t wanted) {
    const int64_t count = static_cast<int64_t>(keys_.size());
    uint32_t prefix = 0;
    int64_t equal = wanted;  // of keys that begin with the prefix, that many are chosen
    const uint32_t* keys = keys_.data();
    int64_t left = count;
    for (const int shift : {20, 9, 0}) {
      const uint32_t mask = shift == 20 ? 0x7ff : shift == 9 ? 0x7ff : 0x1ff;
      std::memset(counts_, 0, sizeof counts_);
      // in several tables: neighbours often have the same bits, and a sum would wait for the one before
      for (int64_t i = 0; i < left; ++i) ++counts_[i % kTables][keys[i] >> shift & mask];
      const auto size = [&](uint32_t bucket) {
        int64_t sum = 0;
        for (const auto& table : counts_) sum += table[bucket];
        return sum;
      };
      uint32_t bucket = 0;
      for (int64_t within; bucket < mask && (within = size(bucket)) < equal; ++bucket) equal -= within;
      prefix |= bucket << shift;
      int64_t kept = 0;
      for (int64_t i = 0; i < left; ++i) {  // without branches, which would be mispredicted
        similar_[kept] = keys[i];
        kept += (keys[i] >> shift & mask) == bucket;
      }
      keys = similar_.data();
      left = kept;
    }
    int64_t chosen = 0;
    for (int64_t i = 0; i < count; ++i) {
      const bool is_equal = keys_[i] == prefix;
      numbers_[chosen] = static_cast<int32_t>(i);
      chosen += (keys_[i] < prefix) | (is_equal & (equal > 0));
      equal -= is_equal;
    }
    return numbers_.data();
  }

 private:
  std::vector<uint32_t> keys_, similar_;  // all, and those that begin with the prefix so far
  std::vector<int32_t> numbers_;
  static constexpr int kTables = 4;
  int32_t counts_[kTables][1 << 11];
};

}  // namespace

void sample_masks(const MaskSamples& samples, float* result, int threads) {
  if ((samples.height + 1) * (samples.width + 1) >= INT32_MAX) throw std::invalid_argument("masks: expected less than 2^31 pixels");
  for (int64_t row = 0; row < samples.rows; ++row) {
    check_range("rows", samples.mask_of_row[row], -1, samples.count);
    check_range("groups", samples.group_of_row[row], samples.mask_of_row[row] < 0 ? -1 : 0, samples.groups);
  }
  std::vector<Scratch> scratch = scratch_of(threads, samples.rows, 0);
  parallel_for(samples.rows, static_cast<int>(scratch.size()), [&](int worker, int64_t row) {
    Places& places = scratch[worker].places;
    const int64_t mask = samples.mask_of_row[row], group = samples.group_of_row[row], count = samples.points_count;
    float* out = result + row * count;
    if (mask < 0) return std::fill(out, out + count, 0.0f);
    for_chunks(count, [&](int64_t first, int64_t length) {
      MF_DISPATCH(place_points, samples.points + 2 * (group * count + first), length, samples.extent_height,
                  samples.extent_width, samples.height, samples.width, places);
      sample_chunk(samples, mask, places, length, out + first);
    });
  });
}

template <class Element>
void choose_points(const PointChoice& choice, const Element* maps, float* result, int threads) {
  for (int64_t map = 0; map < choice.count; ++map) check_range("groups", choice.groups[map], -1, choice.group_count);
  const int64_t height = choice.height, width = choice.width, points = choice.uncertain + choice.random_count;
  std::vector<Scratch> scratch = scratch_of(threads, choice.count, padded_size(height, width));
  std::vector<Selection> selections(scratch.size(), Selection(choice.candidate_count));
  parallel_for(choice.count, static_cast<int>(scratch.size()), [&](int worker, int64_t map) {
    Scratch& own = scratch[worker];
    Selection& selection = selections[worker];
    float* out = result + 2 * map * points;
    const int64_t group = choice.groups[map];
    if (group < 0) return std::fill(out, out + 2 * points, 0.0f);
    const float* candidates = choice.candidates + 2 * group * choice.candidate_count;
    if (choice.uncertain > 0) {
      MF_DISPATCH(pad_map, maps + map * height * width, height, width, own.padded.data());
      for_chunks(choice.candidate_count, [&](int64_t first, int64_t length) {
        MF_DISPATCH(place_points, candidates + 2 * first, length, height, width, height, width, own.places);
        MF_DISPATCH(sample_map, own.padded.data(), width, own.places, length, own.logits);
        selection.set(first, own.logits, length);
      });
      const int32_t* numbers = selection.smallest(choice.uncertain);
      for (int64_t k = 0; k < choice.uncertain; ++k, out += 2) std::memcpy(out, candidates + 2 * numbers[k], 8);
    }
    const float* random = choice.random + 2 * group * choice.random_count;
    std::copy(random, random + 2 * choice.random_count, out);
  });
}

template <class Element>
void point_sums(const PointPairs& pairs, const Element* maps, float* sums, int threads) {
  const int64_t height = pairs.height, width = pairs.width, count = pairs.points_count;
  std::vector<Scratch> scratch = scratch_of(threads, pairs.count, padded_size(height, width));
  parallel_for(pairs.count, static_cast<int>(scratch.size()), [&](int worker, int64_t pair) {
    Scratch& own = scratch[worker];
    double all[4] = {};
    if (pairs.rows[pair] >= 0) {
      MF_DISPATCH(pad_map, maps + pair * height * width, height, width, own.padded.data());
      for_chunks(count, [&](int64_t first, int64_t length) {
        const int64_t place = pair * count + first;
        MF_DISPATCH(place_points, pairs.points + 2 * place, length, height, width, height, width, own.places);
        MF_DISPATCH(sample_map, own.padded.data(), width, own.places, length, own.logits);
        MF_DISPATCH(add_sums, own.logits, pairs.truth + place, length, pairs.loss, all);
      });
    }
    for (int k = 0; k < 4; ++k) sums[4 * pair + k] = static_cast<float>(all[k]);
  });
}

template <class Element>
void point_sums_backward(const PointPairs& pairs, const float* upstream, const Element* maps, Element* gradient,
                         int threads) {
  const int64_t height = pairs.height, width = pairs.width, count = pairs.points_count;
  const int64_t size = padded_size(height, width);
  std::vector<Scratch> scratch = scratch_of(threads, pairs.count, 2 * size);
  parallel_for(pairs.count, static_cast<int>(scratch.size()), [&](int worker, int64_t pair) {
    Scratch& own = scratch[worker];
    float *map = own.padded.data(), *by_map = map + size;
    std::fill(by_map, by_map + size, 0.0f);
    if (pairs.rows[pair] >= 0) {
      MF_DISPATCH(pad_map, maps + pair * height * width, height, width, map);
      for_chunks(count, [&](int64_t first, int64_t length) {
        const int64_t place = pair * count + first;
        MF_DISPATCH(place_points, pairs.points + 2 * place, length, height, width, height, width, own.places);
        MF_DISPATCH(sample_map, map, width, own.places, length, own.logits);
        MF_DISPATCH(differentiate_sums, own.logits, pairs.truth + place, length, pairs.loss, upstream + 4 * pair,
                    own.gradient);
        MF_DISPATCH(scatter, own.gradient, own.places, length, width, by_map);
      });
    }
    MF_DISPATCH(unpad_map, by_map, height, width, gradient + pair * height * width);
  });
}

namespace {

// Scratch memory of one worker for costs.
struct CostScratch {
  explicit CostScratch(int64_t slots) : pairs(slots), chosen(slots) {}

  std::vector<PairLanes> pairs;
  std::vector<float> chosen;  // probability of each target's class
  float logits[kChunk]{};
  BlockValues values{};
};

double total_of(const float (&lanes)[kMostPointLanes]) {
  double sum = 0;
  for (const float lane : lanes) sum += static_cast<double>(lane);
  return sum;
}

// Writes the costs of a block of queries, the first of which is number `first` of a layer and image.
template <class Element>
void write_block(const PointCosts& costs, const Element* logits, int64_t layer, int64_t image, int64_t first,
                 const double* areas, CostScratch& own, float* result) {
  const int64_t targets = costs.counts[image], count = costs.points_count;
  const int64_t outputs = (layer * costs.images + image) * costs.queries + first;
  const int64_t shared = (costs.point_layers == 1 ? 0 : layer) * costs.images + image;
  const int queries = static_cast<int>(std::min<int64_t>(kBlock, costs.queries - first));
  float* out = result + outputs * costs.slots;
  std::fill(out, out + queries * costs.slots, 0.0f);
  if (targets == 0) return;
  logits += outputs * count;
  QueryLanes lanes[kBlock] = {};
  std::fill(own.pairs.begin(), own.pairs.end(), PairLanes{});
  own.values = {};
  for_chunks(count, [&](int64_t start, int64_t length) {
    for (int query = 0; query < queries; ++query) {
      MF_DISPATCH(copy_logits, logits + query * count + start, length, own.logits);
      MF_DISPATCH(add_losses, own.logits, length, costs.loss, lanes[query], query, own.values);
    }
    MF_DISPATCH(add_products, own.values, costs.truth + shared * costs.slots * count + start, count, targets, length,
                own.pairs.data());
  });
  const double samples = static_cast<double>(std::max<int64_t>(count, 1));
  for (int query = 0; query < queries; ++query, out += costs.slots) {
    MF_DISPATCH(chosen_probabilities, costs.class_logits + (outputs + query) * costs.classes, costs.classes,
                costs.labels + image * costs.slots, targets, own.chosen.data());
    const double probability = total_of(lanes[query].probability), off_loss = total_of(lanes[query].off_loss);
    const double broken = total_of(lanes[query].broken);
    for (int64_t t = 0; t < targets; ++t) {
      const double mask = (off_loss + total_of(own.pairs[t].rise[query])) / samples;
      const double overlap = total_of(own.pairs[t].probability[query]);
      const double dice = 1 - (2 * overlap + 1) / (probability + areas[shared * costs.slots + t] + 1);
      out[t] = static_cast<float>(costs.mask_weight * mask + costs.dice_weight * dice -
                                  costs.class_weight * static_cast<double>(own.chosen[t]) + broken);
    }
  }
}

}  // namespace

void check_point_costs(const PointCosts& costs) {
  for (int64_t image = 0; image < costs.images; ++image) {
    check_range("counts", costs.counts[image], 0, costs.slots + 1);
    for (int64_t t = 0; t < costs.counts[image]; ++t) {
      check_range("labels", costs.labels[image * costs.slots + t], 0, costs.classes);
    }
  }
}

template <class Element>
void point_cost(const PointCosts& costs, const Element* logits, float* result, int threads) {
  check_point_costs(costs);
  std::vector<double> areas(costs.point_layers * costs.images * costs.slots);
  parallel_for(static_cast<int64_t>(areas.size()), threads, [&](int, int64_t row) {
    areas[row] = MF_DISPATCH(total, costs.truth + row * costs.points_count, costs.points_count);
  });
  const int64_t blocks = (costs.queries + kBlock - 1) / kBlock, tasks = costs.layers * costs.images * blocks;
  threads = static_cast<int>(std::max<int64_t>(1, std::min<int64_t>(threads, tasks)));
  std::vector<CostScratch> scratch(threads, CostScratch(costs.slots));
  parallel_for(tasks, threads, [&](int worker, int64_t task) {
    write_block(costs, logits, task / blocks / costs.images, task / blocks % costs.images, task % blocks * kBlock,
                areas.data(), scratch[worker], result);
  });
}

template void choose_points(const PointChoice&, const float*, float*, int);
template void choose_points(const PointChoice&, const uint16_t*, float*, int);
template void point_sums(const PointPairs&, const float*, float*, int);
template void point_sums(const PointPairs&, const uint16_t*, float*, int);
template void point_sums_backward(const PointPairs&, const float*, const float*, float*, int);
template void point_sums_backward(const PointPairs&, const float*, const uint16_t*, uint16_t*, int);
template void point_cost(const PointCosts&, const float*, float*, int);
template void point_cost(const PointCosts&, const uint16_t*, float*, int);

}  // namespace maskformer_fast
