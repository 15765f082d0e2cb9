#include "rle/rle.h"
#include "run_operators.h"

namespace maskformer_fast {

// Random masks, whose padding bits may be set.
void run_rle(Random& random, int threads) {
  const int64_t count = random.integer(0, 4), height = random.integer(1, 80), width = random.integer(1, 80);
  std::vector<uint8_t> masks(count * height * ((width + 7) / 8));
  const bool sparse = random.chance(0.5);
  for (uint8_t& byte : masks) byte = sparse && random.chance(0.9) ? 0 : static_cast<uint8_t>(random.integer(0, 255));
  const auto encoded = encode_packed_masks(masks.data(), count, height, width, threads);
  MF_EXPECT(static_cast<int64_t>(encoded.size()) == count);
  for (const std::string& counts : encoded) MF_EXPECT(!counts.empty());

  std::vector<int32_t> map(height * width);
  for (int32_t& value : map) value = static_cast<int32_t>(random.integer(-1, 3));
  const std::vector<int64_t> values{2, 0, 9};
  int64_t areas[3] = {}, boxes[12] = {};
  const auto runs = encode_map(MapType::int32, map.data(), height, width, values, areas, boxes);
  MF_EXPECT(runs.size() == 3 && areas[2] == 0 && areas[0] + areas[1] <= height * width);
}

}  // namespace maskformer_fast
