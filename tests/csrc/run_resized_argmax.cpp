#include <array>

#include "resized_argmax/resized_argmax.h"
#include "run_operators.h"

namespace maskformer_fast {

// A complete grid in one or two bands, whose values may be extreme. Every pixel gets a label.
void run_resized_argmax(Random& random, int threads) {
  const int64_t rows = random.integer(1, 9), columns = random.integer(1, 9), channels = random.integer(1, 40);
  const int64_t height = random.integer(1, 30), width = random.integer(1, 30), pitch = (channels + 15) / 16 * 16;
  const auto scores = random.values<float>(rows * columns * pitch, -4, 4, random.chance(0.3));
  const auto own = random.values<float>(pitch, -2, 2);
  const auto scale = random.values<float>(pitch, 0, 1);
  const ArgmaxKind kind = random.one_of({ArgmaxKind::scores, ArgmaxKind::masks, ArgmaxKind::sigmoids});
  std::vector<int64_t> labels(height * width, -2), counts(3 * channels);
  std::vector<int32_t> narrow(height * width, -2);
  const bool counted = kind != ArgmaxKind::scores;
  const ArgmaxOutput output{kind == ArgmaxKind::masks ? static_cast<void*>(narrow.data()) : labels.data(),
                            {height, width},
                            counted ? counts.data() : nullptr,
                            counted ? counts.data() + channels : nullptr,
                            counted ? counts.data() + 2 * channels : nullptr};
  const int64_t cut = random.integer(0, rows - 1);
  for (const auto [first, end] : {std::pair(int64_t{0}, cut + 1), std::pair(cut, rows)}) {
    if (end - first < 2 && end < rows) continue;
    const ScoreGrid grid{scores.data() + first * columns * pitch, nullptr, first, end - first, rows, columns, channels,
                         pitch};
    std::vector<int32_t> decided(grid.rows * columns, -1), names(channels, 0);
    if (!counted && random.chance(0.5)) {
      decide_cells({grid, own.data(), -5.0f, names.data(), decided.data()}, threads);
    }
    resized_argmax(grid, decided.data(), kind, kind == ArgmaxKind::sigmoids ? scale.data() : nullptr,
                   counted ? own.data() : nullptr, output, threads);
  }
  const std::array<int64_t, 2> finer{rows * random.integer(1, 3), columns + random.integer(0, 5)};
  const std::array<int64_t, 2> window{random.integer(1, finer[0]), random.integer(1, finer[1])};
  if (counted) {
    twice_resized_winners({scores.data(), rows, columns, channels, pitch, finer, window}, kind, scale.data(),
                          own.data(), output, threads);
  }
  for (int64_t i = 0; i < height * width; ++i) {
    const int64_t label = kind == ArgmaxKind::masks ? narrow[i] : labels[i];
    MF_EXPECT(label >= -1 && label < channels);
  }
}

}  // namespace maskformer_fast
