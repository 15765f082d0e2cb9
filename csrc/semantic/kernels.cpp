// A tile of semantic inference: finds the classes and queries that can matter in it, multiplies masks by probabilities
// and keeps a running argmax over the classes. semantic.h has the definitions.
//
// Pruning is exact. The range of the logits that a tile reads bounds the probability of each mask in the tile, and so
// bounds each class's score by two sums over the queries. A class whose upper bound is below another class's lower
// bound cannot win. Where one class is left, the tile is decided. Otherwise queries that hardly matter are replaced by
// the middle of their range, and a pixel's label is proven if its lead over the runner-up exceeds what the replacement
// may have changed between two classes. Rows with unproven pixels are scored again with more queries, in the end with
// all of them. These last sums have the same terms, in the same order, as those of the dense path.
#include "semantic/bounds.h"

namespace maskformer_fast {
namespace MF_ISA {
namespace {

// Classes and vectors of pixels of one register block.
constexpr int kClassRows = 6;
#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int kPixelVectors = 4;
#else
constexpr int kPixelVectors = 2;
#endif
static_assert(kClassBlock % kClassRows == 0 && kPanelPixels % (kLanes * kPixelVectors) == 0, "full register blocks");
static_assert(kBlockStride >= kClassBlock + 16 && kTile % kLanes == 0, "room for full vectors");

constexpr unsigned kPanelMask = (1u << kPanelRows) - 1, kAllRows = (1u << kTile) - 1;  // one bit a row of pixels

// Allowed change between two classes by left-out queries at each attempt, relative to the largest bound of a query.
// They are small enough that most labels are proven and large enough that most queries are left out. The values are
// from experiments; speed depends little on them.
constexpr float kSlacks[] = {0.02f, 0.001f, 5e-5f};
// Allowed absolute change where scores or margins are asked for. Scores may be off by half of it.
constexpr float kScoreSlacks[] = {2e-6f};

// Scores classes[0..count) at the pixels of one panel and continues the argmax in best, second and label. The sums
// start from `bias` with the first block of queries, later from `partial`. They enter the argmax with the last block,
// earlier they are stored in `partial`.
// masks: [queries, kPanelPixels]; block: [queries, kBlockStride], probabilities; bias: [classes]; partial: [classes,
// kPanelPixels].
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
          const Ints better = sum[i][j] > best_here[j];  // strict: of equal scores the lower class stays
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

// Finds winner and runner-up among the first `count` of s.classes in some rows of pixels, from the masks of the first
// `live` of s.live and the middles of the first `dropped` of s.dropped. The results of other rows must not be used.
void score_tile(const SemanticImage& image, const Window* windows, const Scratch& s, int count, int live, int dropped,
                unsigned rows, bool second) {
  for (int i = 0; i < kTilePixels; i += kLanes) {
    store(s.best + i, broadcast(-1.0f));
    store(s.second + i, broadcast(-1.0f));
    store(s.label + i, Ints{});
  }
  const int block_queries = image.queries < kQueryBlock ? image.queries : kQueryBlock;
  const int64_t panel_stride = int64_t(block_queries) * kPanelPixels;
  for (int c = 0; c < count; c += kClassBlock) {
    const int classes = count - c < kClassBlock ? count - c : kClassBlock;
    for (int i = 0; i < kBlockStride; ++i) s.bias[i] = 0.0f;
    for (int i = 0; i < dropped; ++i) {
      load_probabilities(image, s.dropped[i], s.classes + c, classes, s.row);
      for (int k = 0; k < classes; k += kLanes) {
        store(s.bias + k, load(s.bias + k) + load(s.row + k) * s.middle[s.dropped[i]]);
      }
    }
    int q = 0;
    do {
      const int queries = live - q < kQueryBlock ? live - q : kQueryBlock;
      const bool first = q == 0, last = q + queries == live;
      for (int i = 0; i < queries; ++i) {
        load_probabilities(image, s.live[q + i], s.classes + c, classes, s.block + i * kBlockStride);
      }
      if (c == 0 || live > kQueryBlock) {
        fill_masks(image, windows, s.live + q, queries, rows, s.masks, panel_stride);
      }
      for (int panel = 0; panel < kPanels; ++panel) {
        if (!(rows >> panel * kPanelRows & kPanelMask)) continue;
        const auto score = second ? score_panel<true> : score_panel<false>;
        const int at = panel * kPanelPixels;
        score(s.masks + panel * panel_stride, s.block, queries, s.classes + c, classes, s.bias,
              s.partial + kClassBlock * at, first, last, s.best + at, s.second + at, s.label + at);
      }
      q += queries;
    } while (q < live);
  }
}

template <class Label>
MF_INLINE void write_labels(const SemanticImage& image, const Window& window, const int32_t* label, unsigned rows) {
  for (int y = 0; y < window.height; ++y) {
    if (!(rows >> y & 1)) continue;
    Label* out = static_cast<Label*>(image.labels) + (window.top + y) * image.row_pitch + window.left;
    for (int x = 0; x < window.width; ++x) out[x] = static_cast<Label>(label[y * kTile + x]);
  }
}

void write(const SemanticImage& image, const Window& window, const Scratch& s, unsigned rows) {
  if (image.classes <= 255) {
    write_labels<uint8_t>(image, window, s.label, rows);
  } else {
    write_labels<int16_t>(image, window, s.label, rows);
  }
  if (!image.scores && !image.margins) return;
  for (int y = 0; y < window.height; ++y) {
    if (!(rows >> y & 1)) continue;
    const int64_t out = (window.top + y) * image.row_pitch + window.left;
    for (int x = 0; x < window.width; ++x) {
      const float best = s.best[y * kTile + x], second = s.second[y * kTile + x];
      const bool valid = best >= 0.0f;  // else the pixel's sums are NaN
      if (image.scores) image.scores[out + x] = valid ? best : __builtin_nanf("");
      if (image.margins) {
        image.margins[out + x] = !valid ? __builtin_nanf("") : image.classes == 1 ? kInfinity : best - second;
      }
    }
  }
}

void select_all(const SemanticImage& image, const Scratch& s) {
  for (int q = 0; q < image.queries; ++q) s.live[q] = q;
  for (int c = 0; c < image.classes; ++c) s.classes[c] = c;
}

// Returns the rows of pixels whose labels are those that all queries would give. Queries that are neither live nor
// dropped add at most `ignored` to a score. The dropped ones change the difference of two scores by at most `change`,
// and a score by at most their largest probability times the half width of their mask. Four sums round: those of two
// classes, here and over all queries.
MF_INLINE unsigned find_proven(const SemanticImage& image, const Scratch& s, int dropped, float ignored, float change,
                               bool one_class) {
  if (one_class || (ignored == 0.0f && dropped == 0)) return kAllRows;
  float drift = ignored;
  for (int i = 0; i < dropped; ++i) drift += image.largest[s.dropped[i]] * s.half[s.dropped[i]];
  const float error = 4.0f * rounding(image);
  const float bar = (ignored + change) * (1.0f + 0x1p-20f) + 1.01f * error * drift + kTiny;
  unsigned proven = 0;
  for (int y = 0; y < kTile; ++y) {
    Ints doubt{};
    for (int i = y * kTile; i < (y + 1) * kTile; i += kLanes) {
      const Floats best = load(s.best + i);
      doubt |= ~(best - load(s.second + i) > bar + 1.01f * error * best);
    }
    proven |= unsigned(!any(doubt)) << y;
  }
  return proven;
}

// Labels one tile, whose positions in each group are in `windows`, kStripTiles apart. Without `ranges`, the ranges of
// the masks are not known and nothing is pruned.
void label_tile(const SemanticImage& image, const Window* windows, const Scratch& s, unsigned rows, int tile,
                bool ranges) {
  const bool second = image.margins != nullptr;
  if (!ranges) {
    select_all(image, s);
    score_tile(image, windows, s, image.classes, image.queries, 0, rows, second);
    return write(image, *windows, s, rows);
  }
  const float unit = bound_queries(image, tile, s);
  const bool values = image.scores || image.margins;
  const float* slacks = values ? kScoreSlacks : kSlacks;
  const int attempts = values ? sizeof kScoreSlacks / sizeof(float) : sizeof kSlacks / sizeof(float);
  int classes = 0;
  for (int attempt = 0; attempt < attempts; ++attempt) {
    const float budget = 0.5f * slacks[attempt] * (values ? 1.0f : unit);
    float ignored, change;
    const float threshold = find_threshold(image, s.bound, image.queries, budget, &ignored);
    int live = 0, dropped;
    for (int q = 0; q < image.queries; ++q) {
      s.live[live] = q;
      live += s.bound[q] > threshold;
    }
    classes = bound_classes(image, s, live, ignored, second);
    if (classes == 1 && !values) {
      for (int i = 0; i < kTilePixels; i += kLanes) store(s.label + i, broadcast(s.classes[0]));
      return write(image, *windows, s, rows);
    }
    choose_queries(image, s, budget, classes, values, &live, &dropped, &change);
    // a mask takes about as many operations as 30 classes, so an attempt must save half of the masks
    if (image.path == SemanticPath::automatic && 2 * live > image.queries) break;
    score_tile(image, windows, s, classes, live, dropped, rows, true);
    const unsigned proven = find_proven(image, s, dropped, ignored, change, classes == 1) & rows;
    write(image, *windows, s, proven);
    rows &= ~proven;
    if (!rows) return;
  }
  for (int q = 0; q < image.queries; ++q) s.live[q] = q;
  score_tile(image, windows, s, classes, image.queries, 0, rows, second);
  write(image, *windows, s, rows);
}

}  // namespace

bool semantic_softmax(const SemanticImage& image, float* memory) {
  const Scratch s = split_scratch(image, memory);
  bool valid = true;
  const int columns = image.classes + 1, padded = static_cast<int>(round_up(columns, kLanes));
  for (int q = 0; q < image.queries; ++q) {
    float* row = image.probabilities ? image.probabilities + q * image.probability_stride : s.upper;
    for (int c = 0; c < padded; ++c) row[c] = c < columns ? logit(image, q, c) : -kInfinity;
    Floats peaks = broadcast(-kInfinity), sums{}, tops{};
    for (int c = 0; c < padded; c += kLanes) peaks = max(peaks, load(row + c));
    const float peak = highest(peaks);
    for (int c = 0; c < padded; c += kLanes) {
      const Floats x = softmax_exp(load(row + c) - peak);
      store(row + c, x);
      sums += x;
    }
    const float total = sum(sums);
    const float scale = 1.0f / total;
    for (int64_t c = image.classes; c < (image.probabilities ? image.probability_stride : padded); ++c) row[c] = 0.0f;
    for (int c = 0; c < padded; c += kLanes) {
      const Floats p = load(row + c) * scale;
      store(row + c, p);
      tops = max(tops, p);
    }
    image.peak[q] = peak;
    image.scale[q] = scale;
    image.largest[q] = highest(tops);
    valid = valid && total == total && total > 0.0f;
  }
  for (int q = image.queries; q < round_up(image.queries, kLanes); ++q) image.largest[q] = 0.0f;
  return valid;
}

void semantic_strip(const SemanticImage& image, int top, int left, int tiles, float* memory) {
  const Scratch s = split_scratch(image, memory);
  const int groups = image.queries > 0 ? image.queries / image.group_queries : 1;
  for (int group = 0; group < groups; ++group) {
    for (int tile = 0; tile < tiles; ++tile) {
      s.windows[group * kStripTiles + tile] = find_window(image, image.groups[group], top, left + tile * kTile);
    }
  }
  const bool ranges = image.path != SemanticPath::dense && find_ranges(image, s.windows, tiles, s);
  const unsigned rows = kAllRows >> (kTile - s.windows->height);
  for (int tile = 0; tile < tiles; ++tile) label_tile(image, s.windows + tile, s, rows, tile, ranges);
}

}  // namespace MF_ISA
}  // namespace maskformer_fast
