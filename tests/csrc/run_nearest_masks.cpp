#include <algorithm>

#include "nearest_masks/nearest_masks.h"
#include "run_operators.h"

namespace maskformer_fast {

// Random masks, whose padding bits may be set, and rows and columns that are read several times or left out.
void run_nearest_masks(Random& random, int threads) {
  NearestMasks input{};
  input.count = random.integer(0, 4), input.height = random.integer(1, 20), input.width = random.integer(1, 40);
  input.out_height = random.integer(1, 50), input.out_width = random.integer(1, 90);
  const int64_t row_bytes = (input.width + 7) / 8, out_bytes = (input.out_width + 7) / 8;
  std::vector<uint8_t> masks(input.count * input.height * row_bytes);
  for (uint8_t& byte : masks) byte = random.chance(0.7) ? 0 : static_cast<uint8_t>(random.integer(0, 255));
  std::vector<int64_t> rows(input.out_height), columns(input.out_width);
  for (int64_t& row : rows) row = random.integer(0, input.height - 1);
  for (int64_t& column : columns) column = random.integer(0, input.width - 1);
  std::sort(rows.begin(), rows.end());
  std::sort(columns.begin(), columns.end());
  input.masks = masks.data(), input.rows = rows.data(), input.columns = columns.data();
  std::vector<uint8_t> result(input.count * input.out_height * out_bytes, 0xff);
  std::vector<float> boxes(4 * input.count, -1);
  nearest_masks(input, result.data(), boxes.data(), threads);
  for (int64_t mask = 0; mask < input.count; ++mask) {
    for (int64_t y = 0; y < input.out_height; ++y) {
      for (int64_t x = 0; x < 8 * out_bytes; ++x) {
        const bool is_on = result[(mask * input.out_height + y) * out_bytes + x / 8] >> (x % 8) & 1;
        const int64_t column = columns[std::min(x, input.out_width - 1)];
        const uint8_t byte = masks[(mask * input.height + rows[y]) * row_bytes + column / 8];
        MF_EXPECT(is_on == (x < input.out_width && (byte >> (column % 8) & 1)));
        MF_EXPECT(!is_on || static_cast<float>(x) < boxes[4 * mask + 2]);
      }
    }
  }
}

}  // namespace maskformer_fast
