// softmax(Q K^T / sqrt(d) + bias) V of one window and head at a time. Its queries, keys and values are copied to scratch
// memory first, where they stay in the first-level cache: keys transposed, channels and keys padded to full vectors.
#include "window_attention/kernels.h"

#include "common/elements.h"
#include "common/products.h"

namespace maskformer_fast {
namespace MF_ISA {
namespace {

// Place of a window in its padded and shifted map.
struct Window {
  int64_t image, top, left;
  bool bottom, right;  // whether it is in the last row or column of windows, which a shift fills from the other side
};

// A window and head of the copied queries (scaled), keys and values.
struct Tokens {
  int64_t tokens, channels, keys;  // numbers of them in scratch memory; the latter two with padding
  float* queries;    // [tokens, channels]
  float* key_rows;   // [keys, channels]
  float* keys_t;     // [channels, keys]
  float* values;     // [tokens, channels]
  float* scores;     // [kRows, keys]
  float* sums;       // [kRows, channels]
};

// Offset of the token at row, column of a window in its image, in tokens; -1 for padding.
MF_INLINE int64_t token_at(const WindowAttention& attention, const Window& window, int64_t row, int64_t column) {
  const int64_t side = attention.window;
  const int64_t padded_height = (attention.height + side - 1) / side * side;
  const int64_t padded_width = (attention.width + side - 1) / side * side;
  int64_t y = window.top + row + attention.shift, x = window.left + column + attention.shift;
  if (y >= padded_height) y -= padded_height;
  if (x >= padded_width) x -= padded_width;
  return y < attention.height && x < attention.width ? y * attention.width + x : -1;
}

template <class Element>
MF_INLINE void read_row(const Element* from, int64_t dim, float scale, float* to) {
  int64_t c = 0;
  for (; c + kLanes <= dim; c += kLanes) store(to + c, load_elements(from + c) * scale);
  for (; c < dim; ++c) to[c] = load_element(from + c) * scale;
}

template <class Element>
void read_tokens(const WindowAttention& attention, const Element* image, const Element* padding, const Window& window,
                 int64_t head, float scale, const Tokens& out) {
  const int64_t dim = attention.head_dim, part = attention.heads * dim;
  for (int64_t row = 0, token = 0; row < attention.window; ++row) {
    for (int64_t column = 0; column < attention.window; ++column, ++token) {
      const int64_t place = token_at(attention, window, row, column);
      const Element* source = (place < 0 ? padding : image + place * 3 * part) + head * dim;
      read_row(source, dim, scale, out.queries + token * out.channels);
      read_row(source + part, dim, 1.0f, out.key_rows + token * out.channels);
      read_row(source + 2 * part, dim, 1.0f, out.values + token * out.channels);
    }
  }
  for (int64_t token = 0; token < out.tokens; token += 4) {
    for (int64_t c = 0; c < dim; c += 4) {
      transpose_block(out.key_rows + token * out.channels + c, out.channels, out.keys_t + c * out.keys + token,
                      out.keys);
    }
  }
}

// Side of the seam on which a token of a window in the last row (or column) lies.
MF_INLINE bool beyond_seam(const WindowAttention& attention, int64_t position) {
  return position >= attention.window - attention.window / 2;
}

// Adds kSeam to the scores of one query where the key is on another side.
void separate_sides(const WindowAttention& attention, const Window& window, int64_t query, float* scores) {
  const int64_t side = attention.window;
  const bool below = beyond_seam(attention, query / side), beside = beyond_seam(attention, query % side);
  for (int64_t row = 0; row < side; ++row) {
    const bool other_row = window.bottom && beyond_seam(attention, row) != below;
    for (int64_t column = 0; column < side; ++column) {
      const bool other_column = window.right && beyond_seam(attention, column) != beside;
      if (other_row || other_column) scores[row * side + column] += kSeam;
    }
  }
}

// Replaces scores by weights, not yet divided by their sum -> the divisor's inverse, NaN where a score is not finite.
float soften(float* scores, int64_t keys) {
  Floats largest = load(scores), total{}, all{};
  for (int64_t key = 0; key < keys; key += kLanes) {
    const Floats score = load(scores + key);
    largest = max(score, largest);
    all += score - score;
  }
  const Floats top = broadcast(highest(largest));
  for (int64_t key = 0; key < keys; key += kLanes) {
    const Floats weight = exp(load(scores + key) - top);
    store(scores + key, weight);
    total += weight;
  }
  return 1.0f / sum(total) + sum(all);
}

template <class Element>
void attend_window(const WindowAttention& attention, const Element* qkv, const Element* padding, Element* result,
                   const Window& window, const Tokens& own) {
  const int64_t dim = attention.head_dim, heads = attention.heads, pixels = attention.height * attention.width;
  const Element* image = qkv + window.image * pixels * 3 * heads * dim;
  Element* output = result + window.image * pixels * heads * dim;
  const float scale = 1.0f / __builtin_sqrtf((float)dim);
  const bool seam = attention.shift > 0 && (window.bottom || window.right);
  for (int64_t head = 0; head < heads; ++head) {
    read_tokens(attention, image, padding, window, head, scale, own);
    const float* bias = attention.bias + head * own.tokens * own.keys;
    for (int64_t first = 0; first < own.tokens; first += kRows) {
      const int64_t rows = own.tokens - first < kRows ? own.tokens - first : kRows;
      __builtin_memcpy(own.scores, bias + first * own.keys, sizeof(float) * rows * own.keys);
      multiply_matrices(rows, own.keys, dim, own.queries + first * own.channels, own.channels, own.keys_t, own.keys,
                        true, own.scores, own.keys);
      float inverse[kRows];
      for (int64_t row = 0; row < rows; ++row) {
        float* scores = own.scores + row * own.keys;
        if (seam) separate_sides(attention, window, first + row, scores);
        inverse[row] = soften(scores, own.keys);
      }
      multiply_matrices(rows, own.channels, own.tokens, own.scores, own.keys, own.values, own.channels, false, own.sums,
                        own.channels);
      for (int64_t row = 0; row < rows; ++row) {
        const int64_t token = first + row;
        const int64_t place = token_at(attention, window, token / attention.window, token % attention.window);
        if (place < 0) continue;
        Element* target = output + (place * heads + head) * dim;
        for (int64_t c = 0; c < dim; c += kLanes) {
          store_elements(target + c, load(own.sums + row * own.channels + c) * inverse[row], dim - c);
        }
      }
    }
  }
}

template <class Element>
void attend(const WindowAttention& attention, const Element* qkv, const Element* padding, Element* result,
            int64_t first, int64_t last, float* scratch) {
  const int64_t tokens = attention.window * attention.window, channels = round_to_panels(attention.head_dim);
  Tokens own{tokens, channels, attention.key_stride, scratch, nullptr, nullptr, nullptr, nullptr, nullptr};
  own.key_rows = own.queries + tokens * channels;
  own.keys_t = own.key_rows + own.keys * channels;
  own.values = own.keys_t + channels * own.keys;
  own.scores = own.values + tokens * channels;
  own.sums = own.scores + kRows * own.keys;
  // what pads keys and channels stays zero
  __builtin_memset(scratch, 0, sizeof(float) * scratch_floats(attention));
  const int64_t rows = (attention.height + attention.window - 1) / attention.window;
  const int64_t columns = (attention.width + attention.window - 1) / attention.window;
  for (int64_t index = first; index < last; ++index) {
    const int64_t row = index / columns % rows, column = index % columns;
    const Window window{index / (rows * columns), row * attention.window, column * attention.window,
                        row == rows - 1, column == columns - 1};
    attend_window(attention, qkv, padding, result, window, own);
  }
}

}  // namespace

void attend_windows(const WindowAttention& attention, const float* qkv, const float* padding, float* result,
                    int64_t first, int64_t last, float* scratch) {
  attend(attention, qkv, padding, result, first, last, scratch);
}

void attend_windows(const WindowAttention& attention, const uint16_t* qkv, const uint16_t* padding, uint16_t* result,
                    int64_t first, int64_t last, float* scratch) {
  attend(attention, qkv, padding, result, first, last, scratch);
}

}  // namespace MF_ISA
}  // namespace maskformer_fast
