#include <memory>

#include "run_operators.h"
#include "segments/segments.h"

namespace maskformer_fast {
namespace {

void run_panoptic(Random& random, const MaskWindow& window, int threads) {
  const int64_t images = window.sizes[0], queries = window.sizes[1], pixels = window.output[0] * window.output[1];
  const int64_t classes = random.integer(1, 5);
  const std::vector<float> scores = random.values<float>(images * queries, 0.05, 1);
  std::vector<int64_t> categories(images * queries);
  for (int64_t& category : categories) category = random.integer(random.chance(0.5) ? -2 : 0, classes - 1);
  const std::unique_ptr<bool[]> is_thing(new bool[classes]);
  for (int64_t c = 0; c < classes; ++c) is_thing[c] = random.chance(0.5);
  std::vector<int32_t> id_map(images * pixels, -9), ids(images * queries, -9);
  std::vector<int64_t> areas(images * queries, -9);
  panoptic_inference(window,
                 {scores.data(), categories.data(), is_thing.get(), classes, random.one_of({0.0, 0.5, 0.8}),
                  random.one_of({"maskformer", "mask2former", "huggingface"})},
                 {id_map.data(), ids.data(), areas.data()}, threads);
  for (const int32_t id : id_map) MF_EXPECT(id >= -1 && id <= queries);
}

void run_instances(const MaskWindow& window, int threads) {
  const int64_t images = window.sizes[0], queries = window.sizes[1];
  const int64_t count = images * queries, pixels = window.output[0] * window.output[1];
  std::vector<uint8_t> masks(count * window.output[0] * ((window.output[1] + 7) / 8), 0xee);
  std::vector<int64_t> areas(count, -9);
  std::vector<float> boxes(4 * count), scores(count);
  instance_inference(window, {masks.data(), areas.data(), boxes.data(), scores.data()}, threads);
  for (const int64_t area : areas) MF_EXPECT(area >= 0 && area <= pixels);
}

}  // namespace

void run_segments(Random& random, int threads) {
  MaskWindow window{};
  const int64_t queries = random.one_of<int64_t>({0, 1, 5, 17, 40});
  window.sizes = {random.integer(0, 2), queries, random.integer(1, 14), random.integer(1, 20)};
  const int64_t row = window.sizes[3] + random.integer(0, 1), map = window.sizes[2] * row;
  window.strides = {queries * map, map, row};
  const double spread = random.one_of({1.0, 20.0});
  const std::vector<float> logits =
      random.values<float>(window.sizes[0] * queries * map, -spread, spread, random.chance(0.3));
  window.logits = logits.data();
  window.extent = {random.uniform(0.2, 1.0) * window.sizes[2], random.uniform(0.2, 1.0) * window.sizes[3]};
  window.output = {random.integer(1, 70), random.integer(1, 150)};
  run_panoptic(random, window, threads);
  run_instances(window, threads);
}

}  // namespace maskformer_fast
