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

int64_t bytes_of(FloatType type) { return type == FloatType::float32 ? 4 : 2; }

void check(bool correct, const char* name, const char* expected, double got) {
  if (correct) return;
  throw std::invalid_argument(std::string(name) + ": expected " + expected + ", got " + std::to_string(got));
}

void check(const SemanticBatch& batch) {
  constexpr double kLargest = 1 << 30;
  const auto& [images, queries, map_height, map_width] = batch.mask_sizes;
  check(images >= 0, "batch size", ">= 0", images);
  check(queries >= 0 && queries < kLargest, "number of queries", "0..2^30", queries);
  check(batch.classes >= 1 && batch.classes <= 32767, "number of classes", "1..32767", batch.classes);
  for (const int64_t size : {map_height, map_width}) check(size >= 1 && size < kLargest, "map size", "1..2^30", size);
  for (const int64_t size : batch.output_size) check(size >= 1 && size < kLargest, "output size", "1..2^30", size);
  for (const double extent : batch.extent) check(extent > 0 && std::isfinite(extent), "extent", "> 0", extent);
}

}  // namespace

void semantic_inference(const SemanticBatch& batch, int threads) {
  check(batch);
  const int queries = static_cast<int>(batch.mask_sizes[1]), classes = static_cast<int>(batch.classes);
  const int height = static_cast<int>(batch.output_size[0]), width = static_cast<int>(batch.output_size[1]);
  const AxisTable rows(height, batch.extent[0], batch.mask_sizes[2], height);
  const AxisTable columns(width, batch.extent[1], batch.mask_sizes[3], width);

  const int64_t tile_rows = (height + kTile - 1) / kTile, tile_columns = (width + kTile - 1) / kTile;
  const int64_t strips_per_row = (tile_columns + kStripTiles - 1) / kStripTiles;
  const int64_t strips = tile_rows * strips_per_row;
  const int64_t worker_floats = round_up(semantic_scratch_floats(queries, classes), 32);
  const int workers = static_cast<int>(
      std::max<int64_t>(1, std::min({int64_t(threads), strips, kScratchFloats / worker_floats})));
  const std::unique_ptr<float[]> scratch(new float[workers * worker_floats]);
  const int64_t padded_queries = round_up(queries + 1, 16);
  std::vector<float> softmax(3 * padded_queries);
  const int64_t stride = semantic_probability_stride(classes);
  const bool store = queries * stride <= kProbabilityFloats;
  const std::unique_ptr<float[]> probabilities(new float[store ? queries * stride : 0]);

  for (int64_t i = 0; i < batch.mask_sizes[0]; ++i) {
    const int64_t pixels = i * height * width;
    SemanticImage image{};
    image.masks = static_cast<const char*>(batch.masks) + i * batch.mask_strides[0] * bytes_of(batch.mask_type);
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
    image.rows = rows.taps();
    image.columns = columns.taps();
    image.peak = softmax.data();
    image.scale = softmax.data() + padded_queries;
    image.largest = softmax.data() + 2 * padded_queries;
    image.probabilities = store ? probabilities.get() : nullptr;
    image.probability_stride = stride;
    image.path = batch.path;
    image.labels = static_cast<char*>(batch.labels) + pixels * (classes <= 255 ? 1 : 2);
    image.scores = batch.scores ? batch.scores + pixels : nullptr;
    image.margins = batch.margins ? batch.margins + pixels : nullptr;
    // a probability that is NaN has no bounds
    if (!MF_DISPATCH(semantic_softmax, image, scratch.get())) image.path = SemanticPath::dense;
    parallel_for(strips, workers, [&](int worker, int64_t strip) {
      const int64_t first = strip % strips_per_row * kStripTiles;
      const int64_t tiles = std::min<int64_t>(kStripTiles, tile_columns - first);
      MF_DISPATCH(semantic_strip, image, static_cast<int>(strip / strips_per_row * kTile),
                  static_cast<int>(first * kTile), static_cast<int>(tiles), scratch.get() + worker * worker_floats);
    });
  }
}

}  // namespace maskformer_fast
