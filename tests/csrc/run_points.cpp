#include <type_traits>

#include "map_cost/map_cost.h"
#include "points/points.h"
#include "run_operators.h"

namespace maskformer_fast {
namespace {

constexpr uint16_t kHalf = 0x3f00;  // 0.5 in bfloat16

std::vector<float> random_points(Random& random, int64_t count) {
  return random.values<float>(2 * count, -0.1, 1.1, random.chance(0.3));
}

template <class Element>
std::vector<Element> random_maps(Random& random, int64_t count) {
  std::vector<Element> maps(count, static_cast<Element>(kHalf));
  if constexpr (std::is_same_v<Element, float>) maps = random.values<float>(count, -5, 5, random.chance(0.3));
  return maps;
}

void run_masks(Random& random, int threads) {
  MaskSamples samples{};
  samples.format = random.one_of({MaskFormat::float32, MaskFormat::bytes, MaskFormat::packed});
  samples.count = random.integer(1, 3), samples.rows = random.integer(0, 4), samples.groups = random.integer(1, 3);
  samples.height = random.integer(1, 9), samples.width = random.integer(1, 20);
  samples.extent_height = random.integer(1, 20), samples.extent_width = random.integer(1, 30);
  samples.points_count = random.one_of<int64_t>({1, 17, 1030});
  const int64_t columns = samples.format == MaskFormat::packed ? (samples.width + 7) / 8 : samples.width;
  const int64_t size = samples.count * samples.height * columns;
  std::vector<float> values(samples.format == MaskFormat::float32 ? size : 0, 1.0f);
  std::vector<uint8_t> bytes(samples.format == MaskFormat::float32 ? 0 : size, 1);
  samples.masks = values.empty() ? static_cast<const void*>(bytes.data()) : values.data();
  std::vector<int64_t> masks(samples.rows), groups(samples.rows);
  for (int64_t& mask : masks) mask = random.integer(-1, samples.count - 1);
  for (int64_t& group : groups) group = random.integer(0, samples.groups - 1);
  const std::vector<float> points = random_points(random, samples.groups * samples.points_count);
  std::vector<float> result(samples.rows * samples.points_count, -7);
  samples.mask_of_row = masks.data(), samples.group_of_row = groups.data(), samples.points = points.data();
  sample_masks(samples, result.data(), threads);
  for (const float value : result) MF_EXPECT(value >= 0 && value <= 1.0001f);
}

template <class Element>
void run_losses(Random& random, int threads) {
  PointChoice choice{};
  choice.count = random.integer(0, 4), choice.height = random.integer(1, 9), choice.width = random.integer(1, 20);
  choice.group_count = random.integer(1, 3), choice.candidate_count = random.one_of<int64_t>({0, 5, 1500});
  choice.random_count = random.integer(0, 3), choice.uncertain = random.integer(0, choice.candidate_count);
  const std::vector<Element> maps = random_maps<Element>(random, choice.count * choice.height * choice.width);
  std::vector<int64_t> groups(choice.count);
  for (int64_t& group : groups) group = random.integer(-1, choice.group_count - 1);
  const std::vector<float> candidates = random_points(random, choice.group_count * choice.candidate_count);
  const std::vector<float> others = random_points(random, choice.group_count * choice.random_count);
  const int64_t points = choice.uncertain + choice.random_count;
  std::vector<float> chosen(2 * choice.count * points);
  choice.groups = groups.data(), choice.candidates = candidates.data(), choice.random = others.data();
  choose_points(choice, maps.data(), chosen.data(), threads);

  const std::vector<float> truth(choice.count * points, 0.25f), upstream(4 * choice.count, 1.0f);
  const FocalLoss loss{0.25f, 0.75f, random.one_of({0.0f, 1.5f, 2.0f})};
  const PointPairs pairs{choice.count,  choice.height, choice.width, points,
                         groups.data(), chosen.data(), truth.data(), loss};
  std::vector<float> sums(4 * choice.count, -7);
  std::vector<Element> gradient(maps.size(), static_cast<Element>(kHalf));
  point_sums(pairs, maps.data(), sums.data(), threads);
  point_sums_backward(pairs, upstream.data(), maps.data(), gradient.data(), threads);
  for (int64_t pair = 0; pair < choice.count; ++pair) MF_EXPECT(groups[pair] >= 0 || sums[4 * pair] == 0);
}

template <class Element>
void run_costs(Random& random, int threads) {
  PointCosts costs{};
  costs.layers = random.integer(1, 3), costs.images = random.integer(1, 2), costs.queries = random.integer(1, 9);
  costs.classes = random.integer(1, 20), costs.slots = random.integer(1, 5);
  costs.points_count = random.one_of<int64_t>({1, 17, 1030});
  costs.point_layers = random.chance(0.5) ? 1 : costs.layers;
  const bool sampled = random.chance(0.5);
  costs.height = sampled ? random.integer(1, 9) : 1, costs.width = sampled ? random.integer(1, 20) : costs.points_count;
  const int64_t outputs = costs.layers * costs.images * costs.queries;
  const int64_t shared = costs.point_layers * costs.images;
  const std::vector<Element> maps = random_maps<Element>(random, outputs * costs.height * costs.width);
  const std::vector<float> class_logits = random.values<float>(outputs * costs.classes, -5, 5);
  const std::vector<float> points = random_points(random, shared * costs.points_count);
  const std::vector<float> truth = random.values<float>(shared * costs.slots * costs.points_count, 0, 1);
  std::vector<int64_t> labels(costs.images * costs.slots), counts(costs.images);
  for (int64_t& label : labels) label = random.integer(0, costs.classes - 1);
  for (int64_t& count : counts) count = random.integer(0, costs.slots);
  std::vector<float> result(outputs * costs.slots, -7);
  costs.class_logits = class_logits.data(), costs.points = sampled ? points.data() : nullptr;
  costs.truth = truth.data(), costs.labels = labels.data(), costs.counts = counts.data();
  costs.class_weight = 2, costs.mask_weight = 5, costs.dice_weight = 5;
  costs.loss = random.one_of<FocalLoss>({{1, 1, 0}, {0.25f, 0.75f, 2}, {0.5f, 0.5f, 1.5f}});
  const auto cost_of = sampled ? map_cost<Element> : point_cost<Element>;
  cost_of(costs, maps.data(), result.data(), threads);
  for (int64_t k = 0; k < outputs * costs.slots; ++k) {
    const int64_t image = k / (costs.queries * costs.slots) % costs.images;
    MF_EXPECT(k % costs.slots < counts[image] || result[k] == 0);
  }
}

}  // namespace

void run_points(Random& random, int threads) {
  run_masks(random, threads);
  run_losses<float>(random, threads);
  run_losses<uint16_t>(random, threads);
  run_costs<float>(random, threads);
  run_costs<uint16_t>(random, threads);
}

}  // namespace maskformer_fast
