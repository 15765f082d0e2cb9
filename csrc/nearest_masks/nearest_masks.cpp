// A task is a mask. Each of its rows is made once, whatever the number of rows of the result that read it, and only
// where the row has pixels.
#include "nearest_masks/nearest_masks.h"

#include <algorithm>
#include <cstring>
#include <stdexcept>
#include <string>
#include <vector>

#include "common/threads.h"

namespace maskformer_fast {
namespace {

// Eight columns of the result. Where they read at most eight columns, which begin at bit `shift` of `byte`, they are
// the sum of an entry of `low`, by the first four, and one of `high`.
struct ByteTable {
  int64_t byte;
  int shift;
  bool is_near;
  uint8_t low[16], high[16];
};

void check_positions(const char* name, const int64_t* positions, int64_t count, int64_t limit) {
  for (int64_t i = 0; i < count; ++i) {
    const int64_t low = i == 0 ? 0 : positions[i - 1];
    if (positions[i] < low || positions[i] >= limit) {
      throw std::invalid_argument(std::string(name) + ": expected ascending numbers in 0.." +
                                  std::to_string(limit - 1) + ", got " + std::to_string(positions[i]) + " at " +
                                  std::to_string(i));
    }
  }
}

class Columns {
 public:
  explicit Columns(const NearestMasks& input)
      : columns_(input.columns), count_(input.out_width), row_bytes_((input.width + 7) / 8), used_(row_bytes_),
        tables_((count_ + 7) / 8) {
    for (int64_t x = 0; x < count_; ++x) used_[columns_[x] / 8] |= static_cast<uint8_t>(1 << columns_[x] % 8);
    for (int64_t b = 0; b < bytes(); ++b) {
      const int64_t first = columns_[8 * b], last = columns_[std::min(8 * b + 7, count_ - 1)];
      ByteTable& table = tables_[b];
      table = {first / 8, static_cast<int>(first % 8), last - first < 8, {}, {}};
      if (!table.is_near) continue;
      for (int64_t x = 8 * b; x < std::min(8 * b + 8, count_); ++x) {
        const int place = static_cast<int>(columns_[x] - first);
        for (int entry = 0; entry < 16; ++entry) {
          if (entry >> place % 4 & 1) (place < 4 ? table.low : table.high)[entry] |= static_cast<uint8_t>(1 << x % 8);
        }
      }
    }
    for (int64_t byte = 0; byte <= row_bytes_; ++byte) {  // bytes of the result that read nothing from this byte on
      const int64_t x = std::lower_bound(columns_, columns_ + count_, 8 * byte) - columns_;
      before_.push_back(x == count_ ? bytes() : x / 8);
      after_.push_back((x + 7) / 8);
    }
  }

  int64_t bytes() const { return static_cast<int64_t>(tables_.size()); }

  // Marks in `seen` the pixels of a row that are read. Writes their first byte and one past the last; both 0 for none.
  void find(const uint8_t* row, uint8_t* seen, int64_t& begin, int64_t& end) const {
    begin = end = 0;
    for (int64_t byte = 0; byte < row_bytes_; ++byte) {
      const uint8_t bits = row[byte] & used_[byte];
      seen[byte] |= bits;
      if (bits == 0) continue;
      if (end == 0) begin = byte;
      end = byte + 1;
    }
  }

  // Writes the columns of a row that has pixels only in the bytes begin..end.
  void write(const uint8_t* row, int64_t begin, int64_t end, uint8_t* out) const {
    const int64_t first = before_[begin], last = after_[end];
    std::memset(out, 0, first);
    std::memset(out + last, 0, bytes() - last);
    for (int64_t b = first; b < last; ++b) {
      const ByteTable& table = tables_[b];
      if (table.is_near) {
        const int next = table.byte + 1 < row_bytes_ ? row[table.byte + 1] : 0;
        const int bits = (row[table.byte] | next << 8) >> table.shift;
        out[b] = table.low[bits & 15] | table.high[bits >> 4 & 15];
        continue;
      }
      uint8_t bits = 0;
      for (int64_t x = 8 * b; x < std::min(8 * b + 8, count_); ++x) {
        bits |= static_cast<uint8_t>((row[columns_[x] / 8] >> columns_[x] % 8 & 1) << x % 8);
      }
      out[b] = bits;
    }
  }

  // Finds the first column of the result with a pixel that was seen and one past the last; one has.
  void span(const uint8_t* seen, float& first, float& last) const {
    const auto has = [&](int64_t x) { return seen[columns_[x] / 8] >> columns_[x] % 8 & 1; };
    int64_t x = 0;
    while (!has(x)) ++x;
    first = static_cast<float>(x);
    for (x = count_; !has(x - 1);) --x;
    last = static_cast<float>(x);
  }

 private:
  const int64_t* columns_;
  int64_t count_, row_bytes_;
  std::vector<uint8_t> used_;  // pixels of a row that are read
  std::vector<ByteTable> tables_;
  std::vector<int64_t> before_, after_;
};

}  // namespace

void nearest_masks(const NearestMasks& input, uint8_t* result, float* boxes, int threads) {
  check_positions("rows", input.rows, input.out_height, input.height);
  check_positions("columns", input.columns, input.out_width, input.width);
  const Columns columns(input);
  const int64_t row_bytes = (input.width + 7) / 8, out_bytes = columns.bytes();
  threads = static_cast<int>(std::clamp<int64_t>(threads, 1, std::max<int64_t>(1, input.count)));
  std::vector<std::vector<uint8_t>> seen(threads, std::vector<uint8_t>(row_bytes));
  parallel_for(input.count, threads, [&](int worker, int64_t mask) {
    std::vector<uint8_t>& own = seen[worker];
    std::fill(own.begin(), own.end(), uint8_t{0});
    int64_t upper = -1, lower = 0, begin = 0, end = 0;
    for (int64_t y = 0; y < input.out_height; ++y) {
      uint8_t* out = result + (mask * input.out_height + y) * out_bytes;
      const bool is_new = y == 0 || input.rows[y] != input.rows[y - 1];
      const uint8_t* row = input.masks + (mask * input.height + input.rows[y]) * row_bytes;
      if (is_new) columns.find(row, own.data(), begin, end);
      if (end == 0) {
        std::memset(out, 0, out_bytes);
        continue;
      }
      if (is_new) {
        columns.write(row, begin, end, out);
      } else {
        std::memcpy(out, out - out_bytes, out_bytes);
      }
      if (upper < 0) upper = y;
      lower = y + 1;
    }
    float* box = boxes + 4 * mask;
    std::fill(box, box + 4, 0.0f);
    if (upper < 0) return;
    columns.span(own.data(), box[0], box[2]);
    box[1] = static_cast<float>(upper), box[3] = static_cast<float>(lower);
  });
}

}  // namespace maskformer_fast
