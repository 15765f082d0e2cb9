// softmax(Q K^T / sqrt(d) + bias) V of one window and head at a time, and its gradients. Queries, keys and values are
// copied to scratch memory first, where they stay in the first-level cache: keys transposed (in the backward pass also
// values), channels and keys padded to full vectors.
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
  int64_t* places;                 // [tokens] in the image, -1 for padding
  float* queries;    // [tokens, channels]
  float* key_rows;   // [keys, channels]
  float* keys_t;     // [channels, keys]
  float* values;     // [keys, channels]
  float* scores;     // [kRows, keys], in the backward pass [tokens, keys]
  float* sums;       // [kRows, channels], in the backward pass [tokens, channels]
};

// What the backward pass needs beside them.
struct Slopes {
  float* values_t;  // [channels, keys]
  float* upstream;  // [tokens, channels] gradient of the result
  float* scores;    // [tokens, keys] gradient of the weights, then of the scores
};

// Writes the offset of each token of a window in its image, in tokens; -1 for padding.
void locate(const WindowAttention& attention, const Window& window, int64_t* places) {
  const int64_t side = attention.window;
  const int64_t padded_height = (attention.height + side - 1) / side * side;
  const int64_t padded_width = (attention.width + side - 1) / side * side;
  for (int64_t row = 0; row < side; ++row) {
    int64_t y = window.top + row + attention.shift;
    if (y >= padded_height) y -= padded_height;
    for (int64_t column = 0; column < side; ++column) {
      int64_t x = window.left + column + attention.shift;
      if (x >= padded_width) x -= padded_width;
      *places++ = y < attention.height && x < attention.width ? y * attention.width + x : -1;
    }
  }
}

// Transposes rows [keys, channels] of which `dim` channels are used.
void transpose(const float* rows, int64_t dim, const Tokens& own, float* result) {
  for (int64_t token = 0; token < own.tokens; token += 4) {
    for (int64_t c = 0; c < dim; c += 4) {
      transpose_block(rows + token * own.channels + c, own.channels, result + c * own.keys + token, own.keys);
    }
  }
}

template <class Element>
MF_INLINE void read_row(const Element* from, int64_t dim, float scale, float* to) {
  int64_t c = 0;
  for (; c + kLanes <= dim; c += kLanes) store(to + c, load_elements(from + c) * scale);
  for (; c < dim; ++c) to[c] = load_element(from + c) * scale;
}

template <class Element>
void read_tokens(const WindowAttention& attention, const Element* image, const Element* padding, int64_t head,
                 float scale, const Tokens& out) {
  const int64_t dim = attention.head_dim, part = attention.heads * dim;
  for (int64_t token = 0; token < out.tokens; ++token) {
    const int64_t place = out.places[token];
    const Element* source = (place < 0 ? padding : image + place * 3 * part) + head * dim;
    read_row(source, dim, scale, out.queries + token * out.channels);
    read_row(source + part, dim, 1.0f, out.key_rows + token * out.channels);
    read_row(source + 2 * part, dim, 1.0f, out.values + token * out.channels);
  }
  transpose(out.key_rows, dim, out, out.keys_t);
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
  locate(attention, window, own.places);
  for (int64_t head = 0; head < heads; ++head) {
    read_tokens(attention, image, padding, head, scale, own);
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
        const int64_t place = own.places[first + row];
        if (place < 0) continue;
        Element* target = output + (place * heads + head) * dim;
        for (int64_t c = 0; c < dim; c += kLanes) {
          store_elements(target + c, load(own.sums + row * own.channels + c) * inverse[row], dim - c);
        }
      }
    }
  }
}

// Divides scratch memory; `rows` is the number of queries whose scores and sums are kept.
Tokens divide(const WindowAttention& attention, int64_t rows, float* scratch) {
  const int64_t tokens = attention.window * attention.window, channels = round_to_panels(attention.head_dim);
  Tokens own{tokens,  channels, attention.key_stride, reinterpret_cast<int64_t*>(scratch),
             nullptr, nullptr,  nullptr,              nullptr, nullptr, nullptr};
  own.queries = scratch + place_floats(attention);
  own.key_rows = own.queries + tokens * channels;
  own.keys_t = own.key_rows + own.keys * channels;
  own.values = own.keys_t + channels * own.keys;
  own.scores = own.values + own.keys * channels;
  own.sums = own.scores + rows * own.keys;
  return own;
}

Window window_at(const WindowAttention& attention, int64_t index) {
  const int64_t rows = (attention.height + attention.window - 1) / attention.window;
  const int64_t columns = (attention.width + attention.window - 1) / attention.window;
  const int64_t row = index / columns % rows, column = index % columns;
  return {index / (rows * columns), row * attention.window, column * attention.window, row == rows - 1,
          column == columns - 1};
}

template <class Element>
void attend(const WindowAttention& attention, const Element* qkv, const Element* padding, Element* result,
            int64_t first, int64_t last, float* scratch) {
  const Tokens own = divide(attention, kRows, scratch);
  // what pads keys and channels stays zero
  __builtin_memset(scratch, 0, sizeof(float) * scratch_floats(attention));
  for (int64_t index = first; index < last; ++index) {
    attend_window(attention, qkv, padding, result, window_at(attention, index), own);
  }
}

// Replaces the gradients of a query's weights by those of its scores, weight * (gradient - mean).
void differentiate_softmax(const float* weights, int64_t keys, float* slopes) {
  Floats total{};
  for (int64_t key = 0; key < keys; key += kLanes) total += load(weights + key) * load(slopes + key);
  const Floats mean = broadcast(sum(total));
  for (int64_t key = 0; key < keys; key += kLanes) {
    store(slopes + key, load(weights + key) * (load(slopes + key) - mean));
  }
}

// Computes weights and gradients of the scores of all queries, and adds the latter to by_bias [tokens, keys].
void differentiate_scores(const WindowAttention& attention, const Window& window, const float* bias, float* by_bias,
                          const Tokens& own, const Slopes& slopes) {
  const bool seam = attention.shift > 0 && (window.bottom || window.right);
  __builtin_memcpy(own.scores, bias, sizeof(float) * own.tokens * own.keys);
  for (int64_t first = 0; first < own.tokens; first += kRows) {
    const int64_t rows = own.tokens - first < kRows ? own.tokens - first : kRows;
    const int64_t token = first * own.channels, score = first * own.keys;
    multiply_matrices(rows, own.keys, attention.head_dim, own.queries + token, own.channels, own.keys_t, own.keys, true,
                      own.scores + score, own.keys);
    multiply_matrices(rows, own.keys, attention.head_dim, slopes.upstream + token, own.channels, slopes.values_t,
                      own.keys, false, slopes.scores + score, own.keys);
    for (int64_t row = 0; row < rows; ++row) {
      float* scores = own.scores + score + row * own.keys;
      float* by_score = slopes.scores + score + row * own.keys;
      if (seam) separate_sides(attention, window, first + row, scores);
      const float inverse = soften(scores, own.keys);
      for (int64_t key = 0; key < own.keys; key += kLanes) store(scores + key, load(scores + key) * inverse);
      differentiate_softmax(scores, own.keys, by_score);
      float* sums = by_bias + score + row * own.keys;
      for (int64_t key = 0; key < own.keys; key += kLanes) store(sums + key, load(sums + key) + load(by_score + key));
    }
  }
}

// Multiplies scores [tokens, keys], or the transpose of its first columns, by rows [tokens, channels] to own.sums.
template <bool transposed>
void multiply_scores(const float* scores, const float* rows, const Tokens& own) {
  multiply_matrices<Factors::floats, transposed>(own.tokens, own.channels, own.tokens, scores, own.keys, rows,
                                                 own.channels, false, own.sums, own.channels);
}

// Writes own.sums times `scale` as the gradient of the queries, keys or values of a window; adds it up for padding.
template <class Element>
void write_gradient(const WindowAttention& attention, float scale, const Tokens& own, Element* by_tokens,
                    float* by_padding) {
  const int64_t dim = attention.head_dim, stride = 3 * attention.heads * dim;
  for (int64_t token = 0; token < own.tokens; ++token) {
    const int64_t place = own.places[token];
    const float* sums = own.sums + token * own.channels;
    for (int64_t c = 0; c < dim; c += kLanes) {
      const Floats slope = load(sums + c) * scale;
      if (place >= 0) {
        store_elements(by_tokens + place * stride + c, slope, dim - c);
      } else {
        store_elements(by_padding + c, load_elements(by_padding + c, dim - c) + slope, dim - c);
      }
    }
  }
}

// Fetches a head's channels of a token to the processor's cache.
template <bool written, class Element>
MF_INLINE void fetch(const Element* token, int64_t dim) {
  for (int64_t c = 0; c < dim; c += 64 / sizeof(Element)) __builtin_prefetch(token + c, written);
}

// Fetches a head's queries, keys, values and gradients of a window.
template <class Element>
void fetch_window(const WindowAttention& attention, const Element* gradient, const Element* qkv, const Window& window,
                  int64_t head) {
  const int64_t dim = attention.head_dim, part = attention.heads * dim;
  const int64_t first = window.image * attention.height * attention.width;
  for (int64_t row = 0; row < attention.window; ++row) {
    const int64_t y = window.top + row + attention.shift;
    for (int64_t column = 0; column < attention.window; ++column) {
      const int64_t x = window.left + column + attention.shift;
      if (y >= attention.height || x >= attention.width) continue;  // padding, or few tokens of the other side
      const int64_t token = first + y * attention.width + x;
      fetch<false>(gradient + token * part + head * dim, dim);
      for (int64_t i = 0; i < 3; ++i) fetch<false>(qkv + (3 * token + i) * part + head * dim, dim);
    }
  }
}

template <class Element>
void differentiate(const WindowAttention& attention, const Element* gradient, const Element* qkv,
                   const Element* padding, Element* by_qkv, float* by_padding, float* by_bias, int64_t head,
                   int64_t first, int64_t last, float* scratch) {
  const int64_t dim = attention.head_dim, part = attention.heads * dim;
  const int64_t pixels = attention.height * attention.width;
  __builtin_memset(scratch, 0, sizeof(float) * backward_scratch_floats(attention));
  const Tokens own = divide(attention, attention.window * attention.window, scratch);
  Slopes slopes{own.sums + own.tokens * own.channels, nullptr, nullptr};
  slopes.upstream = slopes.values_t + own.channels * own.keys;
  slopes.scores = slopes.upstream + own.tokens * own.channels;
  const float scale = 1.0f / __builtin_sqrtf((float)dim);
  const float* bias = attention.bias + head * own.tokens * own.keys;
  for (int64_t index = first; index < last; ++index) {
    const Window window = window_at(attention, index);
    const Element* image = qkv + window.image * pixels * 3 * part;
    const Element* upstream = gradient + window.image * pixels * part + head * dim;
    Element* target = by_qkv + window.image * pixels * 3 * part + head * dim;
    locate(attention, window, own.places);
    read_tokens(attention, image, padding, head, scale, own);
    for (int64_t token = 0; token < own.tokens; ++token) {
      const int64_t place = own.places[token];
      float* row = slopes.upstream + token * own.channels;
      if (place < 0) {
        __builtin_memset(row, 0, sizeof(float) * dim);
        continue;
      }
      read_row(upstream + place * part, dim, 1.0f, row);
      for (int64_t i = 0; i < 3; ++i) fetch<true>(target + (3 * place + i) * part, dim);
    }
    if (index + 1 < last) fetch_window(attention, gradient, qkv, window_at(attention, index + 1), head);
    transpose(own.values, dim, own, slopes.values_t);
    differentiate_scores(attention, window, bias, by_bias, own, slopes);
    multiply_scores<false>(slopes.scores, own.key_rows, own);
    write_gradient(attention, scale, own, target, by_padding + head * dim);
    multiply_scores<true>(slopes.scores, own.queries, own);
    write_gradient(attention, 1.0f, own, target + part, by_padding + part + head * dim);
    multiply_scores<true>(own.scores, slopes.upstream, own);
    write_gradient(attention, 1.0f, own, target + 2 * part, by_padding + 2 * part + head * dim);
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

void differentiate_windows(const WindowAttention& attention, const float* gradient, const float* qkv,
                           const float* padding, float* by_qkv, float* by_padding, float* by_bias, int64_t head,
                           int64_t first, int64_t last, float* scratch) {
  differentiate(attention, gradient, qkv, padding, by_qkv, by_padding, by_bias, head, first, last, scratch);
}

void differentiate_windows(const WindowAttention& attention, const uint16_t* gradient, const uint16_t* qkv,
                           const uint16_t* padding, uint16_t* by_qkv, float* by_padding, float* by_bias, int64_t head,
                           int64_t first, int64_t last, float* scratch) {
  differentiate(attention, gradient, qkv, padding, by_qkv, by_padding, by_bias, head, first, last, scratch);
}

}  // namespace MF_ISA
}  // namespace maskformer_fast
