#include <cmath>

#include "mask_loss/mask_loss.h"
#include "run_operators.h"

namespace maskformer_fast {

void run_mask_loss(Random& random, int threads) {
  MaskPairs batch{};
  batch.pairs = random.one_of<int64_t>({0, 1, 3, 40}), batch.targets = random.integer(1, 5);
  batch.height = random.integer(1, 20), batch.width = random.integer(1, 40);
  batch.input_height = random.integer(1, 70), batch.input_width = random.integer(1, 140);
  const bool extreme = random.chance(0.3);
  const int64_t cells = batch.pairs * batch.height * batch.width, bytes = (batch.input_width + 7) / 8;
  const std::vector<float> logits = random.values<float>(cells, -5, 5, extreme);
  const std::vector<float> upstream = random.values<float>(4 * batch.pairs, -1, 1, extreme);
  std::vector<uint8_t> masks(batch.targets * batch.input_height * bytes);
  for (uint8_t& byte : masks) byte = static_cast<uint8_t>(random.integer(0, 255));
  std::vector<int64_t> rows(batch.pairs), valid(2 * batch.targets);
  for (int64_t& row : rows) row = random.integer(-1, batch.targets - 1);
  for (int64_t t = 0; t < batch.targets; ++t) {
    valid[2 * t] = random.integer(-1, batch.input_height + 1);
    valid[2 * t + 1] = random.integer(-1, batch.input_width + 1);
  }
  std::vector<float> sums(4 * batch.pairs, -7), gradient(cells, -7);

  batch.logits = logits.data();
  batch.masks = masks.data();
  batch.rows = rows.data();
  batch.valid_sizes = random.chance(0.5) ? valid.data() : nullptr;
  batch.loss = {0.25f, 0.75f, random.one_of({0.0f, 1.0f, 1.5f, 2.0f})};
  mask_sums(batch, sums.data(), threads);
  mask_sums_backward(batch, upstream.data(), gradient.data(), threads);

  for (int64_t k = 0; k < 4 * batch.pairs; ++k) {
    MF_EXPECT(rows[k / 4] < 0 ? sums[k] == 0 : (extreme && k % 4 < 3) || (std::isfinite(sums[k]) && sums[k] >= 0));
  }
  for (int64_t k = 0; k < cells; ++k) {
    const int64_t row = rows[k / (batch.height * batch.width)];
    MF_EXPECT(row < 0 ? gradient[k] == 0 : extreme || std::isfinite(gradient[k]));
  }
}

}  // namespace maskformer_fast
