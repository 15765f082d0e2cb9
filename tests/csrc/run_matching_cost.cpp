#include <cmath>

#include "matching_cost/matching_cost.h"
#include "run_operators.h"

namespace maskformer_fast {

void run_matching_cost(Random& random, int threads) {
  MatchingBatch batch{};
  batch.layers = random.integer(1, 3), batch.images = random.integer(1, 3);
  batch.queries = random.one_of<int64_t>({1, 5, 32, 40}), batch.classes = random.integer(1, 12);
  batch.height = random.integer(1, 20), batch.width = random.integer(1, 20);
  batch.slots = random.integer(1, 6);
  batch.input_height = random.integer(1, 4) * batch.height, batch.input_width = random.integer(1, 4) * batch.width;
  const bool extreme = random.chance(0.3), factors = random.chance(0.5);
  const int64_t outputs = batch.layers * batch.images * batch.queries, pixels = batch.height * batch.width;
  batch.depth = factors ? random.integer(1, 9) : 0;

  const std::vector<float> class_logits = random.values<float>(outputs * batch.classes, -5, 5, extreme);
  const std::vector<float> embeddings =
      random.values<float>(outputs * (factors ? batch.depth : pixels), -3, 3, extreme);
  const std::vector<float> features =
      random.values<float>(factors ? batch.images * batch.depth * pixels : 0, -3, 3, extreme);
  std::vector<int64_t> labels(batch.images * batch.slots), counts(batch.images), valid(2 * batch.images);
  for (int64_t& label : labels) label = random.integer(0, batch.classes - 1);
  for (int64_t& count : counts) count = random.integer(0, batch.slots);
  for (int64_t b = 0; b < batch.images; ++b) {
    valid[2 * b] = random.integer(1, batch.input_height);
    valid[2 * b + 1] = random.integer(1, batch.input_width);
  }
  std::vector<uint8_t> masks(batch.images * batch.slots * batch.input_height * ((batch.input_width + 7) / 8));
  for (uint8_t& byte : masks) byte = static_cast<uint8_t>(random.integer(0, 255));
  std::vector<float> cost(outputs * batch.slots, -7);

  batch.class_logits = class_logits.data();
  batch.embeddings = embeddings.data();
  batch.pixels = factors ? features.data() : nullptr;
  batch.pixel_strides = {batch.depth * pixels, pixels, batch.width, 1};
  batch.labels = labels.data();
  batch.counts = counts.data();
  batch.masks = masks.data();
  batch.valid_sizes = random.chance(0.5) ? valid.data() : nullptr;
  batch.class_weight = 1, batch.mask_weight = 20, batch.dice_weight = 1;
  batch.loss = {0.25f, 0.75f, random.one_of({0.0f, 1.5f, 2.0f})};
  batch.cost = cost.data();
  matching_cost(batch, threads);

  for (int64_t k = 0; k < outputs * batch.slots; ++k) {
    const int64_t image = k / (batch.queries * batch.slots) % batch.images, slot = k % batch.slots;
    MF_EXPECT(slot < counts[image] ? extreme || std::isfinite(cost[k]) : cost[k] == 0);
  }
}

}  // namespace maskformer_fast
