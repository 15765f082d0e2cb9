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
}

}  // namespace maskformer_fast
