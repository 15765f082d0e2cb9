#include <array>

#include "resized_semantic/resized_semantic.h"
#include "run_operators.h"

namespace maskformer_fast {

// Logits of any sizes, with and without kept queries; they and the weights may be extreme. Every pixel gets a label.
void run_resized_semantic(Random& random, int threads) {
  const int64_t rows = random.integer(1, 9), columns = random.integer(1, 40), queries = random.integer(1, 40);
  const int64_t classes = random.integer(1, 40), pitch = (classes + 15) / 16 * 16;
  const int64_t kept = random.integer(0, queries), live = random.integer(1, classes);
  const int64_t live_pitch = (live + 15) / 16 * 16;
  const bool extreme = random.chance(0.3);
  const auto logits = random.values<float>(queries * rows * columns, -8, 8, extreme);
  std::vector<int32_t> order(queries), live_classes(live);
  for (int64_t i = 0; i < queries; ++i) order[i] = static_cast<int32_t>(queries - 1 - i);
  for (int64_t i = 0; i < live; ++i) live_classes[i] = static_cast<int32_t>(i);
  const auto fill = [&](int64_t count, int64_t used, int64_t stride) {
    std::vector<float> weights(count * stride, 0.0f);
    for (int64_t query = 0; query < count; ++query) {
      const auto values = random.values<float>(used, 0, 1, extreme);
      for (int64_t i = 0; i < used; ++i) weights[query * stride + i] = values[i];
    }
    return weights;
  };
  const auto weights = fill(queries, classes, pitch), live_weights = fill(kept, live, live_pitch);
  const auto slack = random.values<float>(live_pitch, 0, 0.1);
  const std::array<int64_t, 2> grid{rows * random.integer(1, 4), columns + random.integer(0, 30)};
  const std::array<int64_t, 2> window{random.integer(1, grid[0]), random.integer(1, grid[1])};
  const std::array<int64_t, 2> size{random.integer(1, 60), random.integer(1, 60)};
  std::vector<int64_t> labels(size[0] * size[1], -2);
  grid_semantic({logits.data(), order.data(), weights.data(), queries, rows, columns, classes, pitch, kept,
                 live_weights.data(), slack.data(), live_classes.data(), live, live_pitch,
                 live == classes ? -1e30f : 0.1f, grid, window},
                labels.data(), size, threads);
  for (const int64_t label : labels) MF_EXPECT(label >= 0 && label < classes);
}

}  // namespace maskformer_fast
