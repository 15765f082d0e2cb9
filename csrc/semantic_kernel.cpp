// One tile of semantic inference: which classes and queries can matter in it, then masks times probabilities and the
// running argmax of the classes. semantic.h has the definitions.
//
// Pruning is exact. Over a tile, the probability of mask q lies in [lo, hi], from the range of the logits that the tile
// reads, so each class's score lies between two sums over the queries; a class whose upper bound is below another's
// lower bound cannot win, and where one class is left the tile is decided. Otherwise queries that hardly matter are
// replaced by the middle of their range, and the label of a pixel is taken if its lead over the runner-up exceeds what
// that may have changed between two classes. Panels where some pixel's lead does not are done again with more queries,
// at last with all of them: the same sums, in the same order, as the dense path's.
#include "semantic_masks.h"

namespace maskformer_fast {
namespace MF_ISA {
namespace {

constexpr int kClassRows = 6;  // classes and vectors of pixels of one register block
#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int kPixelVectors = 4;
#else
constexpr int kPixelVectors = 2;
#endif
static_assert(kClassBlock % kClassRows == 0 && kPanelPixels % (kLanes * kPixelVectors) == 0, "whole register blocks");
static_assert(kBlockStride >= kClassBlock + 16 && kTile % kLanes == 0, "room for whole vectors");

constexpr int kTilePixels = kPanels * kPanelPixels;
constexpr unsigned kAllPanels = (1u << kPanels) - 1;

// What dropped queries may change between two classes, at the first and second attempt. Small enough that most labels
// are proven, large enough that most queries drop.
constexpr float kSlack[] = {0.02f, 0.001f};
// The same where scores are asked for: they may be off by half of it.
constexpr float kScoreSlack[] = {2e-6f};

// The parts of a worker's scratch memory; sizes as semantic_scratch_floats counts them.
struct Scratch {
  float* masks;    // [kPanels, kQueryBlock or fewer, kPanelPixels]
  float* block;    // [kQueryBlock or fewer, kBlockStride], probabilities of some queries and classes
  float* partial;  // [kPanels, kClassBlock, kPanelPixels], sums so far, if there are several blocks of queries
  float* upper;    // [classes], upper bounds of the scores
  int32_t* classes;  // [classes], those that can win, ascending
  float *least, *largest;  // [queries], range of the logits, then middle and half width of the masks' ranges
  float* bound;            // [queries], the most that a query adds to any score
  float* weight;           // [queries], the most that a query taken by its middle changes
  int32_t *live, *dropped;  // [queries]
  float *best, *second;     // [kTilePixels]
  int32_t* label;           // [kTilePixels]
  float *row, *bias;        // [kBlockStride]
};

MF_INLINE Scratch carve(const SemanticImage& image, float* memory) {
  const int64_t block = image.queries < kQueryBlock ? image.queries : kQueryBlock;
  const int64_t queries = round_up(image.queries + 1, 16);
  const int64_t classes = semantic_probability_stride(image.classes);
  memory += (64 - reinterpret_cast<uintptr_t>(memory) % 64) % 64 / sizeof(float);
  const auto take = [&](int64_t count) {
    float* part = memory;
    memory += count;
    return part;
  };
  Scratch scratch;
  scratch.masks = take(block * kTilePixels);
  scratch.best = take(kTilePixels);
  scratch.second = take(kTilePixels);
  scratch.label = reinterpret_cast<int32_t*>(take(kTilePixels));
  scratch.partial = take(image.queries > kQueryBlock ? kClassBlock * kTilePixels : 0);
  scratch.block = take(block * kBlockStride);
  scratch.row = take(kBlockStride);
  scratch.bias = take(kBlockStride);
  scratch.upper = take(classes);
  scratch.classes = reinterpret_cast<int32_t*>(take(classes));
  scratch.least = take(queries);
  scratch.largest = take(queries);
  scratch.bound = take(queries);
  scratch.weight = take(queries);
  scratch.live = reinterpret_cast<int32_t*>(take(queries));
  scratch.dropped = reinterpret_cast<int32_t*>(take(queries));
  return scratch;
}

// e^x for x <= 0, 0 below -87; NaN stays NaN
MF_INLINE Floats softmax_exp(Floats x) {
  return select(x >= -87.0f, exp(x), select(x == x, broadcast(0.0f), x));
}

MF_INLINE float logit(const SemanticImage& image, int query, int c) {
  const int64_t at = query * image.logit_strides[0] + c * image.logit_strides[1];
  switch (image.logit_type) {
    case FloatType::bfloat16: return load_float(static_cast<const BFloat16*>(image.logits) + at);
    case FloatType::float16: return load_float(static_cast<const Float16*>(image.logits) + at);
    default: return static_cast<const float*>(image.logits)[at];
  }
}

// P[query, classes[0..count)] and zeros up to a whole vector -> out
MF_INLINE void fetch(const SemanticImage& image, int query, const int32_t* classes, int count, float* out) {
  const int whole = static_cast<int>(round_up(count, kLanes));
  if (image.probabilities) {
    const float* row = image.probabilities + query * image.probability_stride;
    if (classes[count - 1] - classes[0] == count - 1) {
      int c = 0;
      for (; c + kLanes <= count; c += kLanes) store(out + c, load(row + classes[0] + c));
      for (; c < whole; ++c) out[c] = c < count ? row[classes[0] + c] : 0.0f;
    } else {
      for (int c = 0; c < count; ++c) out[c] = row[classes[c]];
      for (int c = count; c < whole; ++c) out[c] = 0.0f;
    }
    return;
  }
  for (int c = 0; c < count; ++c) out[c] = logit(image, query, classes[c]);
  for (int c = count; c < whole; ++c) out[c] = -kInfinity;
  for (int c = 0; c < whole; c += kLanes) {
    store(out + c, softmax_exp(load(out + c) - image.peak[query]) * image.scale[query]);
  }
}

// Scores of classes[0..count) at the pixels of one panel, and the argmax over them that is going on in best, second and
// label. `masks` [queries, kPanelPixels], `block` [queries, kBlockStride]. Sums start from `bias` [classes] with the
// first block of queries, else from `partial` [classes, kPanelPixels]; before the last block they go there again.
template <bool kSecond>
void score_panel(const float* masks, const float* block, int queries, const int32_t* classes, int count,
                 const float* bias, float* partial, bool first, bool last, float* best, float* second,
                 int32_t* label) {
  for (int group = 0; group < kPanelPixels; group += kLanes * kPixelVectors) {
    Floats best_here[kPixelVectors], second_here[kPixelVectors];
    Ints label_here[kPixelVectors];
    for (int j = 0; j < kPixelVectors; ++j) {
      best_here[j] = load(best + group + j * kLanes);
      label_here[j] = load_ints(label + group + j * kLanes);
      if (kSecond) second_here[j] = load(second + group + j * kLanes);
    }
    for (int c = 0; c < count; c += kClassRows) {
      float* sums = partial + c * kPanelPixels + group;
      Floats sum[kClassRows][kPixelVectors];
#pragma GCC unroll 8
      for (int i = 0; i < kClassRows; ++i) {
        for (int j = 0; j < kPixelVectors; ++j) {
          sum[i][j] = first ? broadcast(bias[c + i]) : load(sums + i * kPanelPixels + j * kLanes);
        }
      }
      const float* mask = masks + group;
      const float* probability = block + c;
      for (int q = 0; q < queries; ++q, mask += kPanelPixels, probability += kBlockStride) {
        Floats x[kPixelVectors];
        for (int j = 0; j < kPixelVectors; ++j) x[j] = load(mask + j * kLanes);
#pragma GCC unroll 8
        for (int i = 0; i < kClassRows; ++i) {
          const Floats p = broadcast(probability[i]);
          for (int j = 0; j < kPixelVectors; ++j) sum[i][j] += p * x[j];
        }
      }
      if (!last) {
#pragma GCC unroll 8
        for (int i = 0; i < kClassRows; ++i) {
          for (int j = 0; j < kPixelVectors; ++j) store(sums + i * kPanelPixels + j * kLanes, sum[i][j]);
        }
        continue;
      }
#pragma GCC unroll 8
      for (int i = 0; i < kClassRows; ++i) {
        if (c + i >= count) break;
        const Ints this_class = broadcast(classes[c + i]);
        for (int j = 0; j < kPixelVectors; ++j) {
          const Ints better = sum[i][j] > best_here[j];  // strictly: of equal scores the lower class stays
          if (kSecond) second_here[j] = max(second_here[j], min(sum[i][j], best_here[j]));
          best_here[j] = select(better, sum[i][j], best_here[j]);
          label_here[j] = select(better, this_class, label_here[j]);
        }
      }
    }
    for (int j = 0; j < kPixelVectors; ++j) {
      store(best + group + j * kLanes, best_here[j]);
      store(label + group + j * kLanes, label_here[j]);
      if (kSecond) store(second + group + j * kLanes, second_here[j]);
    }
  }
}

// Winner and runner-up among `count` classes in some panels, by the masks of the live queries and the middle of the
// range of the dropped ones.
void score_tile(const SemanticImage& image, const Window& window, const Scratch& s, int count, int live, int dropped,
                unsigned panels, bool second) {
  for (int i = 0; i < kTilePixels; ++i) {
    if (!(panels >> i / kPanelPixels & 1)) continue;
    s.best[i] = s.second[i] = -1.0f;
    s.label[i] = 0;
  }
  const int block_queries = image.queries < kQueryBlock ? image.queries : kQueryBlock;
  const int64_t panel_stride = int64_t(block_queries) * kPanelPixels;
  for (int c = 0; c < count; c += kClassBlock) {
    const int classes = count - c < kClassBlock ? count - c : kClassBlock;
    for (int i = 0; i < kBlockStride; ++i) s.bias[i] = 0.0f;
    for (int i = 0; i < dropped; ++i) {
      fetch(image, s.dropped[i], s.classes + c, classes, s.row);
      for (int k = 0; k < classes; k += kLanes) {
        store(s.bias + k, load(s.bias + k) + load(s.row + k) * s.least[s.dropped[i]]);
      }
    }
    int q = 0;
    do {
      const int queries = live - q < kQueryBlock ? live - q : kQueryBlock;
      const bool first = q == 0, last = q + queries == live;
      for (int i = 0; i < queries; ++i) fetch(image, s.live[q + i], s.classes + c, classes, s.block + i * kBlockStride);
      if (c == 0 || live > kQueryBlock) {
        fill_masks(image, window, s.live + q, queries, panels, s.masks, panel_stride);
      }
      for (int panel = 0; panel < kPanels; ++panel) {
        if (!(panels >> panel & 1)) continue;
        const auto score = second ? score_panel<true> : score_panel<false>;
        const int at = panel * kPanelPixels;
        score(s.masks + panel * panel_stride, s.block, queries, s.classes + c, classes, s.bias,
              s.partial + kClassBlock * at, first, last, s.best + at, s.second + at, s.label + at);
      }
      q += queries;
    } while (q < live);
  }
}

// What sums of `queries` terms may be off by, relative to the sum of their magnitudes, twice over: each term's product
// and each addition rounds by at most 2^-24.
MF_INLINE float rounding(const SemanticImage& image) { return (image.queries + 16) * 0x1p-23f; }

// Middle, half width and bound of every query's part in the tile, from the range of its logits; false if one is NaN.
//
// The interpolation is monotone in the taps as computed, and of equal taps x it is within 6 * 2^-24 |x| of x: two axes
// with two products and the rounding of 1 - t. The probability is within 4 units in the last place. So what a pixel's
// mask is computed as lies in [lo, hi], widened by 2^-20 on both counts.
MF_INLINE bool bound_queries(const SemanticImage& image, const Window& window, const Scratch& s) {
  if (!find_ranges(image, window, s.least, s.largest)) return false;
  for (int q = image.queries; q < round_up(image.queries, kLanes); ++q) s.least[q] = s.largest[q] = -kInfinity;
  for (int q = 0; q < image.queries; q += kLanes) {
    const Floats least = limit_logits(load(s.least + q)), largest = limit_logits(load(s.largest + q));
    const Floats lo = mask_probability(least - max(least, -least) * 0x1p-20f) * (1.0f - 0x1p-20f);
    const Floats hi = mask_probability(largest + max(largest, -largest) * 0x1p-20f) * (1.0f + 0x1p-20f);
    store(s.least + q, 0.5f * (lo + hi));
    store(s.largest + q, 0.5f * (hi - lo) + hi * 0x1p-22f);
    store(s.bound + q, hi * load(image.largest + q));
  }
  return true;
}

// The largest of a falling row of thresholds below or at which the weights (zeros after the last, up to a whole vector)
// sum to at most `budget`; the sum.
MF_INLINE float find_threshold(const SemanticImage& image, const float* weights, float budget, float* sum) {
  float threshold = budget;
  for (int attempt = 0; attempt < 24; ++attempt, threshold *= 0.6f) {
    Floats sums{};
    for (int q = 0; q < image.queries; q += kLanes) {
      const Floats x = load(weights + q);
      sums += select(x <= threshold, x, broadcast(0.0f));
    }
    float total = 0.0f;
    for (int lane = 0; lane < kLanes; ++lane) total += sums[lane];
    *sum = total * (1.0f + rounding(image));
    if (*sum <= budget) return threshold;
  }
  *sum = 0.0f;
  return 0.0f;
}

// Classes that can win somewhere in the tile (with `runner_up`: or come second) -> scratch.classes. `live` are queries
// to count, `slack` bounds what the others add to a score. Also the largest upper bound.
MF_INLINE int bound_classes(const SemanticImage& image, const Scratch& s, int live, float slack, bool runner_up,
                            float* largest) {
  const float error = rounding(image);
  Floats first = broadcast(0.0f), second = broadcast(0.0f), top = broadcast(0.0f);  // of the lower bounds; of the upper
  constexpr int kVectors = 4;
  for (int c = 0; c < image.classes; c += kVectors * kLanes) {
    const int count = image.classes - c < kVectors * kLanes ? image.classes - c : kVectors * kLanes;
    Floats middle[kVectors]{}, half[kVectors]{};
    int32_t classes[kVectors * kLanes];
    if (!image.probabilities) {
      for (int i = 0; i < count; ++i) classes[i] = c + i;
    }
    for (int i = 0; i < live; ++i) {
      const int q = s.live[i];
      const float* row = image.probabilities + q * image.probability_stride + c;
      if (!image.probabilities) {
        for (int v = 0; v < kVectors; ++v) store(s.row + v * kLanes, broadcast(0.0f));
        fetch(image, q, classes, count, s.row);
        row = s.row;
      }
      for (int v = 0; v < kVectors && v * kLanes < count; ++v) {
        const Floats p = load(row + v * kLanes);
        middle[v] += p * s.least[q];
        half[v] += p * s.largest[q];
      }
    }
    for (int v = 0; v < kVectors && v * kLanes < count; ++v) {
      const Floats upper = (middle[v] + half[v]) * (1.0f + error) + slack;
      const Floats lower = middle[v] * (1.0f - error) - half[v] * (1.0f + error);
      store(s.upper + c + v * kLanes, upper);
      top = max(top, upper);
      second = max(second, min(first, lower));
      first = max(first, lower);
    }
  }
  *largest = highest(top);
  float bar = highest(first);
  if (runner_up) {  // the second largest over all lanes
    float one = 0.0f, two = 0.0f;
    for (int lane = 0; lane < kLanes; ++lane) {
      const float a = first[lane], b = second[lane];
      two = two > (a < one ? a : one) ? two : (a < one ? a : one);
      two = two > b ? two : b;
      one = one > a ? one : a;
    }
    bar = two;
  }
  int found = 0;
  for (int c = 0; c < image.classes; ++c) {
    s.classes[found] = c;
    found += s.upper[c] >= bar;
  }
  return found;
}

// Sorts queries whose bound is above `threshold` into live ones and those that may be taken by their middle, which
// change the difference of two scores (with `values`: a score) by at most budget; the change.
MF_INLINE float choose_queries(const SemanticImage& image, const Scratch& s, float threshold, float budget, int classes,
                               bool values, int* live, int* dropped) {
  *live = *dropped = 0;
  for (int q = 0; q < image.queries; ++q) {
    s.weight[q] = 0.0f;
    if (!(s.bound[q] > threshold)) continue;
    float low = 0.0f, high = image.largest[q];
    if (classes <= kClassBlock) {
      fetch(image, q, s.classes, classes, s.row);
      low = high = s.row[0];
      for (int c = 1; c < classes; ++c) {
        low = low < s.row[c] ? low : s.row[c];
        high = high > s.row[c] ? high : s.row[c];
      }
    }
    s.weight[q] = (values ? 2.0f * high : high - low) * s.largest[q] * (1.0f + 0x1p-20f);
  }
  for (int q = image.queries; q < round_up(image.queries, kLanes); ++q) s.weight[q] = 0.0f;
  float change;
  const float cut = find_threshold(image, s.weight, budget, &change);
  for (int q = 0; q < image.queries; ++q) {
    if (!(s.bound[q] > threshold)) continue;
    if (s.weight[q] > cut) {
      s.live[(*live)++] = q;
    } else {
      s.dropped[(*dropped)++] = q;
    }
  }
  return change;
}

template <class Label>
MF_INLINE void write_labels(const SemanticImage& image, const Window& window, const int32_t* label) {
  for (int y = 0; y < window.height; ++y) {
    Label* out = static_cast<Label*>(image.labels) + int64_t(window.top + y) * image.width + window.left;
    for (int x = 0; x < window.width; ++x) out[x] = static_cast<Label>(label[y * kTile + x]);
  }
}

MF_INLINE void write(const SemanticImage& image, const Window& window, const Scratch& s) {
  if (image.classes <= 255) {
    write_labels<uint8_t>(image, window, s.label);
  } else {
    write_labels<int16_t>(image, window, s.label);
  }
  if (!image.scores && !image.margins) return;
  for (int y = 0; y < window.height; ++y) {
    const int64_t out = int64_t(window.top + y) * image.width + window.left;
    for (int x = 0; x < window.width; ++x) {
      const float best = s.best[y * kTile + x], second = s.second[y * kTile + x];
      const bool any = best >= 0.0f;  // else a NaN reached the pixel
      if (image.scores) image.scores[out + x] = any ? best : __builtin_nanf("");
      if (image.margins) {
        image.margins[out + x] = !any ? __builtin_nanf("") : image.classes == 1 ? kInfinity : best - second;
      }
    }
  }
}

void all_queries_and_classes(const SemanticImage& image, const Scratch& s) {
  for (int q = 0; q < image.queries; ++q) s.live[q] = q;
  for (int c = 0; c < image.classes; ++c) s.classes[c] = c;
}

void solve(const SemanticImage& image, const Window& window, const Scratch& s, unsigned panels) {
  const bool second = image.margins != nullptr;
  if (image.path == SemanticPath::dense || !bound_queries(image, window, s)) {
    all_queries_and_classes(image, s);
    return score_tile(image, window, s, image.classes, image.queries, 0, panels, second);
  }
  const bool values = image.scores || image.margins;
  const float* slacks = values ? kScoreSlack : kSlack;
  const int attempts = values ? sizeof kScoreSlack / sizeof(float) : sizeof kSlack / sizeof(float);
  int classes = 0;
  float largest = 0.0f;
  for (int attempt = 0; attempt < attempts && panels; ++attempt) {
    float ignored;
    const float threshold = find_threshold(image, s.bound, 0.5f * slacks[attempt], &ignored);
    int live = 0, dropped = 0;
    if (attempt == 0) {
      for (int q = 0; q < image.queries; ++q) {
        s.live[live] = q;
        live += s.bound[q] > threshold;
      }
      classes = bound_classes(image, s, live, ignored, second, &largest);
      if (classes == 1 && !values) {
        for (int i = 0; i < kTilePixels; ++i) s.label[i] = s.classes[0];
        return;
      }
    }
    const float change =
        choose_queries(image, s, threshold, 0.5f * slacks[attempt], classes, values, &live, &dropped);
    // about as many operations for a mask as for 30 classes: an attempt must spare half of them
    if (image.path == SemanticPath::automatic && 2 * live > image.queries) break;
    score_tile(image, window, s, classes, live, dropped, panels, true);
    // Both sums, this one and that over all queries, may be off by the rounding of a score, and so may both classes'.
    const float bar = (ignored + change) * (1.0f + 0x1p-20f) + 4.0f * rounding(image) * largest;
    for (int panel = 0; panel < kPanels; ++panel) {
      if (!(panels >> panel & 1)) continue;
      Floats lead = broadcast(kInfinity);
      for (int i = panel * kPanelPixels; i < (panel + 1) * kPanelPixels; i += kLanes) {
        lead = min(lead, load(s.best + i) - load(s.second + i));
      }
      if (-highest(-lead) > bar || classes == 1) panels &= ~(1u << panel);
    }
  }
  if (!panels) return;
  for (int q = 0; q < image.queries; ++q) s.live[q] = q;
  score_tile(image, window, s, classes, image.queries, 0, panels, second);
}

}  // namespace

bool semantic_prepare(const SemanticImage& image, float* memory) {
  const Scratch s = carve(image, memory);
  bool valid = true;
  const int columns = image.classes + 1, whole = static_cast<int>(round_up(columns, kLanes));
  for (int q = 0; q < image.queries; ++q) {
    float* row = image.probabilities ? image.probabilities + q * image.probability_stride : s.upper;
    for (int c = 0; c < whole; ++c) row[c] = c < columns ? logit(image, q, c) : -kInfinity;
    Floats peaks = broadcast(-kInfinity), sums{}, tops{};
    for (int c = 0; c < whole; c += kLanes) peaks = max(peaks, load(row + c));
    const float peak = highest(peaks);
    for (int c = 0; c < whole; c += kLanes) {
      const Floats x = softmax_exp(load(row + c) - peak);
      store(row + c, x);
      sums += x;
    }
    float sum = 0.0f;
    for (int lane = 0; lane < kLanes; ++lane) sum += sums[lane];
    const float scale = 1.0f / sum;
    for (int64_t c = image.classes; c < (image.probabilities ? image.probability_stride : whole); ++c) row[c] = 0.0f;
    for (int c = 0; c < whole; c += kLanes) {
      const Floats p = load(row + c) * scale;
      store(row + c, p);
      tops = max(tops, p);
    }
    image.peak[q] = peak;
    image.scale[q] = scale;
    image.largest[q] = highest(tops);
    valid = valid && sum == sum && sum > 0.0f;
  }
  for (int q = image.queries; q < round_up(image.queries, kLanes); ++q) image.largest[q] = 0.0f;
  return valid;
}

void semantic_tile(const SemanticImage& image, int top, int left, float* memory) {
  const Scratch s = carve(image, memory);
  const Window window = find_window(image, top, left);
  const int used = (window.height + kPanelRows - 1) / kPanelRows;
  solve(image, window, s, kAllPanels >> (kPanels - used));
  write(image, window, s);
}

}  // namespace MF_ISA
}  // namespace maskformer_fast
