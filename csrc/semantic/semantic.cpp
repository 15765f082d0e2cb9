#include "semantic/semantic.h"

#include <algorithm>
#include <cmath>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#include "common/cpu_isa.h"
#include "common/resample.h"
#include "common/threads.h"
#include "semantic/kernels.h"

namespace maskformer_fast {
namespace {

// Most floats of an image's table of probabilities, 4 MiB. Above it, workers compute the probabilities that they need.
constexpr int64_t kProbabilityFloats = 1 << 20;
// Most floats of scratch memory for all workers, 11 MiB. The rest of 16 MiB is for threads and the allocator.
constexpr int64_t kScratchFloats = 11 << 18;

int64_t label_bytes(int64_t classes) { return classes <= 255 ? 1 : 2; }
int64_t bytes_of(FloatType type) { return type == FloatType::float32 ? 4 : 2; }

void check(bool correct, const char* name, const char* expected, double got) {
  if (correct) return;
  throw std::invalid_argument(std::string(name) + ": expected " + expected + ", got " + std::to_string(got));
}

constexpr double kLargest = 1 << 30;

void check_sizes(const std::array<int64_t, 4>& masks, int64_t classes, const std::array<int64_t, 2>& output) {
  const auto& [images, queries, map_height, map_width] = masks;
  check(images >= 0, "batch size", ">= 0", images);
  check(queries >= 0 && images * queries < kLargest, "number of queries", "0..2^30", queries);
  check(classes >= 1 && classes <= 32767, "number of classes", "1..32767", classes);
  for (const int64_t size : {map_height, map_width}) check(size >= 1 && size < kLargest, "map size", "1..2^30", size);
  for (const int64_t size : output) check(size >= 1 && size < kLargest, "output size", "1..2^30", size);
}

// Labels an image by strips of tiles, on at most `threads` threads whose memory `scratch` keeps.
class Labeller {
 public:
  explicit Labeller(int threads) : threads_(threads) {}

  float* scratch(const SemanticImage& image, int groups) {
    floats_ = round_up(semantic_scratch_floats(image.queries, groups, image.classes), 32);
    const int64_t workers = std::max<int64_t>(1, std::min<int64_t>(threads_, kScratchFloats / floats_));
    workers_ = static_cast<int>(workers);
    if (workers * floats_ > size_) {
      size_ = workers * floats_;
      scratch_.reset(new float[size_]);
    }
    return scratch_.get();
  }

  void label(const SemanticImage& image, int groups) {
    float* memory = scratch(image, groups);
    const int64_t tile_rows = (image.height + kTile - 1) / kTile, tile_columns = (image.width + kTile - 1) / kTile;
    const int64_t strips_per_row = (tile_columns + kStripTiles - 1) / kStripTiles;
    parallel_for(tile_rows * strips_per_row, workers_, [&](int worker, int64_t strip) {
      const int64_t first = strip % strips_per_row * kStripTiles;
      const int64_t tiles = std::min<int64_t>(kStripTiles, tile_columns - first);
      MF_DISPATCH(semantic_strip, image, static_cast<int>(strip / strips_per_row * kTile),
                  static_cast<int>(first * kTile), static_cast<int>(tiles), memory + worker * floats_);
    });
  }

 private:
  int threads_, workers_ = 1;
  int64_t floats_ = 0, size_ = 0;
  std::unique_ptr<float[]> scratch_;
};

// Rows and columns at which windows begin and end, ascending, from 0 to `size`.
std::vector<int64_t> find_edges(const int64_t* origins, int64_t count, int64_t window, int64_t size) {
  std::vector<int64_t> edges{0, size};
  for (int64_t i = 0; i < count; ++i) {
    edges.push_back(origins[2 * i]);
    edges.push_back(std::min(origins[2 * i] + window, size));
  }
  std::sort(edges.begin(), edges.end());
  edges.erase(std::unique(edges.begin(), edges.end()), edges.end());
  return edges;
}

// The probabilities of the queries of some windows, as kernels read them.
struct ProbabilityTable {
  std::vector<float> values, largest;
  bool valid = true;

  void fill(const SemanticWindows& windows, const std::vector<int64_t>& chosen, int64_t stride) {
    const int64_t queries = windows.mask_sizes[1], classes = windows.classes;
    values.assign(chosen.size() * queries * stride, 0.0f);
    largest.assign(round_up(chosen.size() * queries + 1, 16), 0.0f);
    valid = true;
    float* row = values.data();
    float* most = largest.data();
    for (const int64_t window : chosen) {
      const float* from = windows.probabilities + window * queries * classes;
      for (int64_t q = 0; q < queries; ++q, from += classes, row += stride, ++most) {
        std::copy(from, from + classes, row);
        *most = *std::max_element(from, from + classes);
        for (int64_t c = 0; c < classes; ++c) valid = valid && from[c] >= 0.0f;
      }
    }
  }
};

}  // namespace

void semantic_inference(const SemanticBatch& batch, int threads) {
  check_sizes(batch.mask_sizes, batch.classes, batch.output_size);
  for (const double extent : batch.extent) check(extent > 0 && std::isfinite(extent), "extent", "> 0", extent);
  const int queries = static_cast<int>(batch.mask_sizes[1]), classes = static_cast<int>(batch.classes);
  const int height = static_cast<int>(batch.output_size[0]), width = static_cast<int>(batch.output_size[1]);
  const AxisTable rows(height, batch.extent[0], batch.mask_sizes[2], height);
  const AxisTable columns(width, batch.extent[1], batch.mask_sizes[3], width);
  const int64_t padded_queries = round_up(queries + 1, 16);
  std::vector<float> softmax(3 * padded_queries);
  const int64_t stride = semantic_probability_stride(classes);
  const bool store = queries * stride <= kProbabilityFloats;
  const std::unique_ptr<float[]> probabilities(new float[store ? queries * stride : 0]);
  Labeller labeller(threads);

  for (int64_t i = 0; i < batch.mask_sizes[0]; ++i) {
    const int64_t pixels = i * height * width;
    const MaskGroup group{static_cast<const char*>(batch.masks) + i * batch.mask_strides[0] * bytes_of(batch.mask_type),
                          rows.taps(), columns.taps()};
    SemanticImage image{};
    image.groups = &group;
    image.group_queries = queries;
    image.mask_type = batch.mask_type;
    image.mask_query_stride = batch.mask_strides[1];
    image.mask_row_stride = batch.mask_strides[2];
    image.mask_column_stride = batch.mask_strides[3];
    image.logits = static_cast<const char*>(batch.logits) + i * batch.logit_strides[0] * bytes_of(batch.logit_type);
    image.logit_type = batch.logit_type;
    image.logit_query_stride = batch.logit_strides[1];
    image.logit_class_stride = batch.logit_strides[2];
    image.queries = queries;
    image.classes = classes;
    image.map_height = static_cast<int>(batch.mask_sizes[2]);
    image.map_width = static_cast<int>(batch.mask_sizes[3]);
    image.height = height;
    image.width = width;
    image.peak = softmax.data();
    image.scale = softmax.data() + padded_queries;
    image.largest = softmax.data() + 2 * padded_queries;
    image.probabilities = store ? probabilities.get() : nullptr;
    image.probability_stride = stride;
    image.path = batch.path;
    image.row_pitch = width;
    image.labels = static_cast<char*>(batch.labels) + pixels * label_bytes(classes);
    image.scores = batch.scores ? batch.scores + pixels : nullptr;
    image.margins = batch.margins ? batch.margins + pixels : nullptr;
    // a probability that is NaN has no bounds
    if (!MF_DISPATCH(semantic_softmax, image, labeller.scratch(image, 1))) image.path = SemanticPath::dense;
    labeller.label(image, 1);
  }
}

void windowed_semantic(const SemanticWindows& windows, int threads) {
  check_sizes(windows.mask_sizes, windows.classes, windows.picture_size);
  const auto& [count, queries, map_height, map_width] = windows.mask_sizes;
  const auto& [window_height, window_width] = windows.window_size;
  const auto& [height, width] = windows.picture_size;
  for (const int64_t size : windows.window_size) check(size >= 1 && size < kLargest, "window size", "1..2^30", size);
  for (int64_t i = 0; i < 2 * count; ++i) {
    const int64_t origin = windows.origins[i];
    check(origin >= 0 && origin < windows.picture_size[i % 2], "origin", "inside the picture", origin);
  }
  const std::vector<int64_t> row_edges = find_edges(windows.origins, count, window_height, height);
  const std::vector<int64_t> column_edges = find_edges(windows.origins + 1, count, window_width, width);
  const int64_t stride = semantic_probability_stride(static_cast<int>(windows.classes));
  const int64_t bytes = label_bytes(windows.classes);
  Labeller labeller(threads);
  ProbabilityTable table;
  std::vector<int64_t> chosen, last;
  for (size_t i = 0; i + 1 < row_edges.size(); ++i) {
    for (size_t j = 0; j + 1 < column_edges.size(); ++j) {
      const int64_t top = row_edges[i], left = column_edges[j];
      const int64_t rows = row_edges[i + 1] - top, columns = column_edges[j + 1] - left;
      char* labels = static_cast<char*>(windows.labels) + (top * width + left) * bytes;
      chosen.clear();
      for (int64_t w = 0; w < count; ++w) {
        const int64_t down = top - windows.origins[2 * w], across = left - windows.origins[2 * w + 1];
        if (down >= 0 && down < window_height && across >= 0 && across < window_width) chosen.push_back(w);
      }
      if (chosen.empty() || queries == 0) {
        for (int64_t y = 0; y < rows; ++y) std::fill_n(labels + y * width * bytes, columns * bytes, char{0});
        continue;
      }
      if (chosen != last) table.fill(windows, chosen, stride);
      last = chosen;
      std::vector<AxisTable> tables;
      std::vector<MaskGroup> groups;
      tables.reserve(2 * chosen.size());
      for (const int64_t w : chosen) {
        const int64_t down = top - windows.origins[2 * w], across = left - windows.origins[2 * w + 1];
        const AxisTable& y = tables.emplace_back(window_height, double(map_height), map_height, rows, down);
        const AxisTable& x = tables.emplace_back(window_width, double(map_width), map_width, columns, across);
        const int64_t offset = w * windows.mask_strides[0] * bytes_of(windows.mask_type);
        groups.push_back({static_cast<const char*>(windows.masks) + offset, y.taps(), x.taps()});
      }
      SemanticImage image{};
      image.groups = groups.data();
      image.group_queries = static_cast<int>(queries);
      image.mask_type = windows.mask_type;
      image.mask_query_stride = windows.mask_strides[1];
      image.mask_row_stride = windows.mask_strides[2];
      image.mask_column_stride = windows.mask_strides[3];
      image.queries = static_cast<int>(queries * chosen.size());
      image.classes = static_cast<int>(windows.classes);
      image.map_height = static_cast<int>(map_height);
      image.map_width = static_cast<int>(map_width);
      image.height = static_cast<int>(rows);
      image.width = static_cast<int>(columns);
      image.largest = table.largest.data();
      image.probabilities = table.values.data();
      image.probability_stride = stride;
      image.path = table.valid ? SemanticPath::automatic : SemanticPath::dense;
      image.row_pitch = width;
      image.labels = labels;
      labeller.label(image, static_cast<int>(chosen.size()));
    }
  }
}

}  // namespace maskformer_fast
