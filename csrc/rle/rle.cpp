#include "rle/rle.h"

#include <algorithm>
#include <atomic>
#include <cstring>
#include <new>
#include <stdexcept>
#include <type_traits>

#include "common/threads.h"

namespace maskformer_fast {
namespace {

// Appends the counts of one mask to a string, run by run.
class RunWriter {
 public:
  explicit RunWriter(std::string& out) : out_(out) {}

  // Ends a run at the next pixel whose value differs, or at the end of the mask.
  void end_run(int64_t position) {
    const int64_t run = position - last_;
    last_ = position;
    if (written_ % 2 == 1) area_ += run;
    write(written_ > 2 ? run - before_last_run_ : run);
    before_last_run_ = last_run_;
    last_run_ = run;
    ++written_;
  }

  // Pixels of the runs of 1 so far.
  int64_t area() const { return area_; }

 private:
  void write(int64_t value) {
    for (bool more = true; more;) {
      const int64_t bits = value & 31;
      value >>= 5;
      more = value != (bits & 16 ? -1 : 0);  // until only the sign is left
      out_.push_back(static_cast<char>(48 + (bits | (more ? 32 : 0))));
    }
  }

  std::string& out_;
  int64_t last_ = 0, last_run_ = 0, before_last_run_ = 0, written_ = 0, area_ = 0;
};

// Columns, of 64, in which a row differs from the row above, one bit each.
struct RowChanges {
  int64_t row;
  uint64_t columns;
};

// Changes of a row in 64 columns, the number of which is `word`.
struct FoundChanges {
  int64_t word;
  RowChanges changes;
};

// Scratch memory of one worker, reused from mask to mask.
struct RleScratch {
  std::vector<FoundChanges> found;  // row by row
  std::vector<RowChanges> rows;     // the same, in the order of words and then rows
  std::vector<int64_t> starts;      // [words + 1], of the rows of each word
  std::vector<int64_t> positions;   // positions of the changes, column by column
};

// Returns 64 pixels of a row.
uint64_t load_word(const uint8_t* row, int64_t row_bytes, int64_t word) {
  uint64_t bits = 0;
  const int64_t first = 8 * word, bytes = std::min<int64_t>(8, row_bytes - first);
#if __BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__
  if (bytes == 8) {
    std::memcpy(&bits, row + first, 8);
    return bits;
  }
#endif
  for (int64_t b = 0; b < bytes; ++b) bits |= static_cast<uint64_t>(row[first + b]) << (8 * b);
  return bits;
}

// Finds the rows of each word that differ from the row above; the pixel before the first row of a column is the last row
// of the column to the left.
void find_changes(const uint8_t* mask, int64_t height, int64_t width, RleScratch& scratch) {
  const int64_t row_bytes = (width + 7) / 8, words = (width + 63) / 64;
  const auto real = [&](int64_t word) {
    const int64_t columns = width - 64 * word;
    return columns >= 64 ? ~uint64_t{0} : (uint64_t{1} << columns) - 1;
  };
  scratch.found.clear();
  scratch.starts.assign(words + 1, 0);
  const auto add = [&](int64_t word, int64_t row, uint64_t columns) {
    if (columns == 0) return;
    scratch.found.push_back({word, {row, columns}});
    ++scratch.starts[word + 1];
  };
  const uint8_t* last = mask + (height - 1) * row_bytes;
  uint64_t carry = 0;  // last pixel of the column before the word
  for (int64_t word = 0; word < words; ++word) {
    const uint64_t low = load_word(last, row_bytes, word) & real(word);
    add(word, 0, (load_word(mask, row_bytes, word) ^ (low << 1 | carry)) & real(word));
    carry = low >> 63;
  }
  for (int64_t row = 1; row < height; ++row) {
    const uint8_t *here = mask + row * row_bytes, *above = here - row_bytes;
    if (std::memcmp(here, above, row_bytes) == 0) continue;  // as most rows of a mask that was enlarged
    for (int64_t word = 0; word < words; ++word) {
      add(word, row, (load_word(here, row_bytes, word) ^ load_word(above, row_bytes, word)) & real(word));
    }
  }
  for (int64_t word = 0; word < words; ++word) scratch.starts[word + 1] += scratch.starts[word];
  scratch.rows.resize(scratch.found.size());
  for (const FoundChanges& found : scratch.found) scratch.rows[scratch.starts[found.word]++] = found.changes;
  for (int64_t word = words; word > 0; --word) scratch.starts[word] = scratch.starts[word - 1];
  scratch.starts[0] = 0;
}

// Encodes one mask. Few rows differ from the row above; the changes of these rows are sorted by column, 64 columns at a
// time. Returns the mask's pixels.
int64_t encode_mask(const uint8_t* mask, int64_t height, int64_t width, RleScratch& scratch, std::string& out) {
  RunWriter runs(out);
  find_changes(mask, height, width, scratch);
  for (int64_t word = 0; 64 * word < width; ++word) {
    const RowChanges *first = scratch.rows.data() + scratch.starts[word];
    const RowChanges *last = scratch.rows.data() + scratch.starts[word + 1];
    int64_t ends[64] = {};
    for (const RowChanges* changes = first; changes < last; ++changes) {
      for (uint64_t left = changes->columns; left; left &= left - 1) ++ends[__builtin_ctzll(left)];
    }
    int64_t total = 0;
    for (int64_t& end : ends) {  // first the start of each column's positions; moves to their end below
      const int64_t count = end;
      end = total;
      total += count;
    }
    scratch.positions.resize(total);
    for (const RowChanges* changes = first; changes < last; ++changes) {
      for (uint64_t left = changes->columns; left; left &= left - 1) {
        const int column = __builtin_ctzll(left);
        scratch.positions[ends[column]++] = (64 * word + column) * height + changes->row;
      }
    }
    for (const int64_t position : scratch.positions) runs.end_run(position);
  }
  runs.end_run(height * width);
  return runs.area();
}

}  // namespace

std::vector<std::string> encode_packed_masks(const uint8_t* masks, int64_t count, int64_t height, int64_t width,
                                             int threads, int64_t* areas) {
  constexpr int64_t kPixelsPerThread = 1 << 20;  // least work that outweighs the start of a thread
  const int64_t stride = height * ((width + 7) / 8);
  const int64_t useful = std::min(count, 1 + count * height * width / kPixelsPerThread);
  threads = static_cast<int>(std::clamp<int64_t>(threads, 1, std::max<int64_t>(1, useful)));
  std::vector<std::string> encoded(count);
  std::vector<RleScratch> scratch(threads);
  std::atomic<bool> out_of_memory{false};  // results grow while they are written, and no exception may leave a thread
  parallel_for(count, threads, [&](int worker, int64_t i) {
    try {
      const int64_t area = encode_mask(masks + i * stride, height, width, scratch[worker], encoded[i]);
      if (areas) areas[i] = area;
    } catch (const std::bad_alloc&) {
      out_of_memory = true;
    }
  });
  if (out_of_memory) throw std::bad_alloc();
  return encoded;
}

namespace {

// Runs of the pixels of a map that have one value.
class ValueRuns {
 public:
  ValueRuns(std::string& out, int64_t height) : writer_(out), height_(height) {}

  void start(int64_t position) {
    writer_.end_run(position);
    start_ = position;
  }
  void stop(int64_t position) {
    writer_.end_run(position);
    end_ = position;
    area_ += position - start_;
    const int64_t first = start_ / height_, last = (position - 1) / height_;
    left_ = std::min(left_, first), right_ = std::max(right_, last + 1);
    upper_ = std::min(upper_, first == last ? start_ - first * height_ : 0);
    lower_ = std::max(lower_, first == last ? position - first * height_ : height_);
  }
  void finish(int64_t pixels, int64_t& area, int64_t* box) {
    if (end_ < pixels) writer_.end_run(pixels);
    area = area_;
    const int64_t sides[4] = {left_, upper_, right_, lower_};
    for (int k = 0; k < 4; ++k) box[k] = area_ > 0 ? sides[k] : 0;
  }

 private:
  RunWriter writer_;
  int64_t height_, start_ = 0, end_ = 0, area_ = 0;
  int64_t left_ = INT64_MAX, upper_ = INT64_MAX, right_ = 0, lower_ = 0;
};

// Number of each value, or -1.
class ValueTable {
 public:
  explicit ValueTable(const std::vector<int64_t>& values) {
    if (values.empty()) return;
    const auto [low, high] = std::minmax_element(values.begin(), values.end());
    first_ = *low;
    if (static_cast<uint64_t>(*high) - static_cast<uint64_t>(*low) >= uint64_t{1} << 20) {
      throw std::invalid_argument("values: expected within 2^20 of one another");
    }
    numbers_.assign(*high - *low + 1, -1);
    for (size_t i = 0; i < values.size(); ++i) numbers_[values[i] - first_] = static_cast<int32_t>(i);
  }
  template <class Element>
  int32_t operator()(Element value) const {
    if constexpr (std::is_floating_point_v<Element>) {
      if (!(value > Element{-1e15} && value < Element{1e15})) return -1;  // NaN too
    }
    const auto whole = static_cast<int64_t>(value);
    const uint64_t place = static_cast<uint64_t>(whole) - static_cast<uint64_t>(first_);
    return place < numbers_.size() && static_cast<Element>(whole) == value ? numbers_[place] : -1;
  }

 private:
  int64_t first_ = 0;
  std::vector<int32_t> numbers_;
};

struct Change {
  int64_t position;
  int32_t number;  // of the value that begins here, or -1
};

template <class Element>
void add_runs(const Element* map, int64_t height, int64_t width, const ValueTable& table,
              std::vector<ValueRuns>& runs) {
  constexpr int64_t kColumns = 64;  // whose changes are found together, row by row
  std::vector<RowChanges> rows;
  std::vector<Change> changes;
  Element before[kColumns] = {};
  int32_t current = -1;
  for (int64_t first = 0; first < width; first += kColumns) {
    const int64_t columns = std::min(kColumns, width - first);
    // the pixel before the first row of a column is the last row of the column to the left
    const Element* last = map + (height - 1) * width + first;
    for (int64_t c = 0; c < columns; ++c) before[c] = first + c > 0 ? last[c - 1] : map[0];
    int64_t ends[kColumns] = {};
    rows.clear();
    const Element* above = before;
    for (int64_t row = 0; row < height; ++row) {
      const Element* here = map + row * width + first;
      if (std::memcmp(here, above, columns * sizeof(Element)) != 0) {
        uint64_t bits = 0;
        for (int64_t c = 0; c < columns; ++c) bits |= static_cast<uint64_t>(here[c] != above[c]) << c;
        rows.push_back({row, bits});
        for (uint64_t left = bits; left; left &= left - 1) ++ends[__builtin_ctzll(left)];
      }
      above = here;
    }
    int64_t total = 0;
    for (int64_t& end : ends) {  // first the start of each column's changes; moves to their end below
      const int64_t count = end;
      end = total;
      total += count;
    }
    changes.resize(total);
    for (const RowChanges& change : rows) {
      for (uint64_t left = change.columns; left; left &= left - 1) {
        const int column = __builtin_ctzll(left);
        changes[ends[column]++] = {(first + column) * height + change.row,
                                   table(map[change.row * width + first + column])};
      }
    }
    if (first == 0) {
      current = table(map[0]);
      if (current >= 0) runs[current].start(0);
    }
    for (const Change& change : changes) {
      if (change.number == current) continue;  // both of no segment
      if (current >= 0) runs[current].stop(change.position);
      if (change.number >= 0) runs[change.number].start(change.position);
      current = change.number;
    }
  }
  if (current >= 0) runs[current].stop(height * width);
}

}  // namespace

std::vector<std::string> encode_map(MapType type, const void* map, int64_t height, int64_t width,
                                    const std::vector<int64_t>& values, int64_t* areas, int64_t* boxes) {
  const ValueTable table(values);
  std::vector<std::string> encoded(values.size());
  std::vector<ValueRuns> runs;
  for (std::string& text : encoded) runs.emplace_back(text, height);
  const auto add = [&](auto* none) {
    add_runs(static_cast<const std::remove_pointer_t<decltype(none)>*>(map), height, width, table, runs);
  };
  switch (type) {
    case MapType::uint8: add(static_cast<uint8_t*>(nullptr)); break;
    case MapType::int16: add(static_cast<int16_t*>(nullptr)); break;
    case MapType::int32: add(static_cast<int32_t*>(nullptr)); break;
    case MapType::int64: add(static_cast<int64_t*>(nullptr)); break;
    case MapType::float32: add(static_cast<float*>(nullptr)); break;
  }
  for (size_t i = 0; i < values.size(); ++i) runs[i].finish(height * width, areas[i], boxes + 4 * i);
  return encoded;
}

}  // namespace maskformer_fast
