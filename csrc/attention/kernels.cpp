// Online softmax: scores of a block of queries and a block of keys are in the second-level cache; sums of values are
// rescaled when a block has a larger score than those before. Keys are packed in panels, transposed, so that the vectors
// of a product are along the keys. In bfloat16 two channels, or the values of two keys, share the place of a float.
#include "attention/kernels.h"

#include "common/elements.h"
#include "common/products.h"

namespace maskformer_fast {
namespace MF_ISA {
namespace {

constexpr float kHidden = -1e30f;  // score of a key that a query does not see
constexpr float kLog2e = 1.44269504088896f;

#if defined(__AVX512BF16__)
template <class Element>
constexpr Factors kFactors = sizeof(Element) == 2 ? Factors::halves : Factors::floats;
#else
template <class Element>
constexpr Factors kFactors = Factors::floats;
#endif
template <class Element>
constexpr int64_t kPerFloat = kFactors<Element> == Factors::halves ? 2 : 1;  // factors in the place of a float

#if defined(__AMX_BF16__)
constexpr int64_t kPadding = kTileChannels, kQueries = kTileQueries;
#else
constexpr int64_t kPadding = kChannelPanel, kQueries = kQueryBlock;
#endif

int64_t channels_of(const Attention& attention) { return round_up(attention.head_dim, kPadding); }

// A product of common/products.h. By tiles, rows after the last are computed as well, of whatever is there.
template <Factors factors>
void multiply_block(int64_t rows, int64_t columns, int64_t depth, const float* a, int64_t a_stride, const float* b,
                    int64_t b_stride, bool add, float* c, int64_t c_stride) {
#if defined(__AMX_BF16__)
  multiply_tiles(rows, columns, depth, a, a_stride, b, b_stride, add, c, c_stride);
#else
  multiply_matrices<factors>(rows, columns, depth, a, a_stride, b, b_stride, add, c, c_stride);
#endif
}

template <class Element>
const Element* row_of(const Element* tokens, const TokenStrides& strides, int64_t image, int64_t token,
                      int64_t head) {
  return tokens + image * strides.image + token * strides.token + head * strides.head;
}

// Copies a token's channels as factors and fills up with zeros.
template <class Element>
void copy_row(const Element* from, int64_t dim, int64_t channels, float* to) {
  if constexpr (kFactors<Element> == Factors::halves) {
    __builtin_memcpy(to, from, sizeof(Element) * dim);
    __builtin_memset(reinterpret_cast<char*>(to) + sizeof(Element) * dim, 0, sizeof(Element) * (channels - dim));
  } else {
    int64_t c = 0;
    for (; c + kLanes <= dim; c += kLanes) store(to + c, load_elements(from + c));
    for (; c < dim; ++c) to[c] = load_element(from + c);
    for (; c < channels; ++c) to[c] = 0.0f;
  }
}

// Panels of kKeyPanel tokens: [panel, channel, token]; tokens that fill a panel up are zero.
template <class Element>
void pack_transposed(const Attention& attention, const Element* tokens, const TokenStrides& strides,
                     int64_t image, int64_t head, float* packed) {
  const int64_t width = channels_of(attention) / kPerFloat<Element>;
  float rows[4 * kChannelPanel];
  for (int64_t panel = 0; panel < attention.keys; panel += kKeyPanel, packed += kKeyPanel * width) {
    for (int64_t first = 0; first < kKeyPanel; first += 4) {
      for (int64_t c = 0; c < width; c += kChannelPanel) {
        const int64_t start = c * kPerFloat<Element>, part = width - c < kChannelPanel ? width - c : kChannelPanel;
        for (int64_t i = 0; i < 4; ++i) {
          const int64_t token = panel + first + i, rest = attention.head_dim - start;
          const int64_t room = part * kPerFloat<Element>;
          if (token < attention.keys && rest > 0) {
            copy_row(row_of(tokens, strides, image, token, head) + start, rest < room ? rest : room, room,
                     rows + i * kChannelPanel);
          } else {
            __builtin_memset(rows + i * kChannelPanel, 0, sizeof(float) * part);
          }
        }
        for (int64_t i = 0; i < part; i += 4) {
          transpose_block(rows + i, kChannelPanel, packed + (c + i) * kKeyPanel + first, kKeyPanel);
        }
      }
    }
  }
}

// [token, channel], in bfloat16 [pair of tokens, channel, token of the pair]; tokens that fill a panel up are zero.
template <class Element>
void pack_rows(const Attention& attention, const Element* tokens, const TokenStrides& strides, int64_t image,
               int64_t head, float* packed) {
  const int64_t channels = channels_of(attention), dim = attention.head_dim;
  const int64_t end = round_up(attention.keys, kKeyPanel);
  for (int64_t token = 0; token < end; token += kPerFloat<Element>, packed += channels) {
    if (token >= attention.keys) {
      __builtin_memset(packed, 0, sizeof(float) * channels);
      continue;
    }
    const Element* row = row_of(tokens, strides, image, token, head);
    if constexpr (kFactors<Element> == Factors::halves) {
      const bool both = token + 1 < attention.keys;
      const Element* next = both ? row_of(tokens, strides, image, token + 1, head) : row;
      for (int64_t c = 0; c < channels; ++c) {
        const uint32_t low = c < dim ? row[c] : 0u, high = both && c < dim ? next[c] : 0u;
        const uint32_t pair = low | high << 16;
        __builtin_memcpy(packed + c, &pair, sizeof pair);
      }
    } else {
      copy_row(row, dim, channels, packed);
    }
  }
}

typedef uint8_t Bytes __attribute__((vector_size(kLanes)));

// Hides keys from a query: those that it must not see and those that only fill a panel up.
void hide(const Attention& attention, int64_t image, int64_t query, int64_t first, int64_t keys, float* scores) {
  if (query < attention.masked_queries) {
    const int64_t start = attention.keys - attention.masked_keys;
    const int64_t row = (image * attention.masked_queries + query) * attention.masked_keys;
    const int64_t offset = row + first - start;  // of the block's first key, which may lie before the masked ones
    const int64_t end = keys < attention.keys - first ? keys : attention.keys - first;
    int64_t key = first < start ? start - first : 0;
    for (; key + kLanes <= end; key += kLanes) {
      Bytes bytes;
      __builtin_memcpy(&bytes, attention.visible + (offset + key), sizeof bytes);
      const Ints seen = __builtin_convertvector(bytes, Ints) != 0;
      store(scores + key, select(seen, load(scores + key), broadcast(kHidden)));
    }
    for (; key < end; ++key) {
      if (!attention.visible[offset + key]) scores[key] = kHidden;
    }
  }
  for (int64_t key = attention.keys - first; key < keys; ++key) scores[key] = 2 * kHidden;
}

// Computes 2^x for x <= 0, down to 2^-126. NaN stays NaN.
MF_INLINE Floats exp2_negative(Floats x) {
#if defined(__AVX512F__)
  const Floats rounded = _mm512_maskz_roundscale_ps(0xffff, x, _MM_FROUND_TO_NEAREST_INT);
  return _mm512_maskz_scalef_ps(0xffff, exp2_fraction(x - rounded), rounded);
#else
  const Floats t = max(broadcast(-126.0f), x);
  const Floats rounded = (t + 12582912.0f) - 12582912.0f;  // 1.5 * 2^23: rounds to the nearest integer
  const Floats power = (Floats)((Ints)exp2_fraction(t - rounded) + (__builtin_convertvector(rounded, Ints) << 23));
  return select((Ints)(x == x), power, x);
#endif
}

#if defined(__AVX512BF16__)
// Computes 2^x for x <= 0 with relative error 8e-5, for results in bfloat16. NaN stays NaN.
MF_INLINE Floats exp2_half(Floats x) {
  const Floats rounded = _mm512_maskz_roundscale_ps(0xffff, x, _MM_FROUND_TO_NEAREST_INT);
  const Floats f = x - rounded;
  Floats p = broadcast(5.517166975121907e-2f);
  p = p * f + 2.42611128278185e-1f;
  p = p * f + 6.932609858590084e-1f;
  p = p * f + 9.999280731781389e-1f;
  return _mm512_maskz_scalef_ps(0xffff, p, rounded);
}
#endif

// Running softmax of a query: largest score and sum of weights.
struct Running {
  float largest, total;
};

// Replaces scores by weights relative to the largest score so far -> the factor for what was summed before.
template <Factors factors>
MF_INLINE float soften(float* scores, int64_t keys, float scale, float* weights, Running& running) {
  Floats largest = broadcast(running.largest), others = largest, total{};
  for (int64_t key = 0; key < keys; key += 2 * kLanes) {
    largest = max(load(scores + key), largest), others = max(load(scores + key + kLanes), others);
  }
  const float top = highest(max(largest, others));
#if defined(__AVX512BF16__)
  if constexpr (factors == Factors::halves) {
    Floats others_total{};
    for (int64_t key = 0; key < keys; key += 2 * kLanes) {
      const Floats low = exp2_half((load(scores + key) - top) * scale);
      const Floats high = exp2_half((load(scores + key + kLanes) - top) * scale);
      total += low, others_total += high;
      const __m512bh narrow = _mm512_cvtne2ps_pbh(high, low);
      __builtin_memcpy(weights + key / 2, &narrow, sizeof narrow);
    }
    total += others_total;
  }
#endif
  for (int64_t key = 0; factors == Factors::floats && key < keys; key += kLanes) {
    const Floats weight = exp2_negative((load(scores + key) - top) * scale);
    total += weight;
    store(weights + key, weight);
  }
  const float factor = exp2_negative(broadcast((running.largest - top) * scale))[0];
  running = {top, running.total * factor + sum(total)};
  return factor;
}

template <class Element>
void attend(const Attention& attention, const Element* query, const float* keys, const float* values, int64_t image,
            int64_t head, int64_t first, int64_t last, Element* result, float* statistics, float* scratch) {
  constexpr Factors factors = kFactors<Element>;
  constexpr int64_t per_float = kPerFloat<Element>;
  const int64_t channels = channels_of(attention), width = channels / per_float, rows = last - first;
  const float scale = kLog2e / __builtin_sqrtf((float)attention.head_dim);
  float* queries = scratch;
  float* sums = queries + kQueries * channels;
  float* scores = sums + kQueries * channels;
  float* weights = factors == Factors::halves ? scores + kQueries * kKeyBlock : scores;
  constexpr int64_t kWeightStride = kKeyBlock / per_float;
  Running running[kQueries];
  for (int64_t row = 0; row < rows; ++row) {
    copy_row(row_of(query, attention.query_strides, image, first + row, head), attention.head_dim, channels,
             queries + row * width);
    running[row] = {4 * kHidden, 0.0f};
  }
#if defined(__AMX_BF16__)
  begin_tiles();
#endif
  const int64_t end = round_up(attention.keys, kKeyPanel);
  for (int64_t start = 0; start < end; start += kKeyBlock) {
    const int64_t block = end - start < kKeyBlock ? end - start : kKeyBlock;
    for (int64_t panel = 0; panel < block; panel += kKeyPanel) {
      multiply_block<factors>(rows, kKeyPanel, width, queries, width, keys + (start + panel) * width, kKeyPanel,
                                 false, scores + panel, kKeyBlock);
    }
    for (int64_t row = 0; row < rows; ++row) {
      float* own = scores + row * kKeyBlock;
      hide(attention, image, first + row, start, block, own);
      const float factor = soften<factors>(own, block, scale, weights + row * kWeightStride, running[row]);
      if (start == 0 || factor == 1.0f) continue;
      float* sum = sums + row * channels;
      for (int64_t c = 0; c < channels; c += kLanes) store(sum + c, load(sum + c) * factor);
    }
    multiply_block<factors>(rows, channels, block / per_float, weights, kWeightStride,
                               values + start / per_float * channels, channels, start > 0, sums, channels);
  }
#if defined(__AMX_BF16__)
  end_tiles();
#endif
  for (int64_t row = 0; row < rows; ++row) {
    const int64_t place = image * attention.queries + first + row;
    Element* target = result + (place * attention.heads + head) * attention.head_dim;
    const float inverse = 1.0f / running[row].total;
    for (int64_t c = 0; c < attention.head_dim; c += kLanes) {
      store_elements(target + c, load(sums + row * channels + c) * inverse, attention.head_dim - c);
    }
    float* own = statistics + ((image * attention.heads + head) * attention.queries + first + row) * kStatistics;
    own[0] = running[row].largest, own[1] = inverse;
  }
}

}  // namespace

#define MF_DEFINE_ATTENTION(ELEMENT)                                                                                \
  void pack_head(const Attention& attention, const ELEMENT* key, const ELEMENT* value, int64_t image, int64_t head, \
                 float* keys, float* values) {                                                                      \
    pack_transposed(attention, key, attention.key_strides, image, head, keys);                                      \
    pack_rows(attention, value, attention.value_strides, image, head, values);                                      \
  }                                                                                                                 \
  void attend_block(const Attention& attention, const ELEMENT* query, const float* keys, const float* values,       \
                    int64_t image, int64_t head, int64_t first, int64_t last, ELEMENT* result, float* statistics,   \
                    float* scratch) {                                                                               \
    attend(attention, query, keys, values, image, head, first, last, result, statistics, scratch);                  \
  }
MF_DEFINE_ATTENTION(uint16_t)

#if !defined(__AVX512BF16__)
MF_DEFINE_ATTENTION(float)

void differentiate_head(const Attention& attention, const float* query, const float* key, const float* value,
                        const float* result, const float* statistics, const float* upstream, int64_t image,
                        int64_t head, const AttentionGradients& gradients, float* scratch) {
  const int64_t channels = channels_of(attention), dim = attention.head_dim, floats = packed_floats(attention);
  const float scale = 1.0f / __builtin_sqrtf((float)dim);
  float* keys_t = scratch;
  float* values_t = keys_t + floats;
  float* keys = values_t + floats;
  float* by_key = keys + floats;
  float* by_value = by_key + floats;
  float* queries = by_value + floats;
  float* slopes = queries + kQueryBlock * channels;
  float* by_query = slopes + kQueryBlock * channels;
  float* weights = by_query + kQueryBlock * channels;
  float* by_score = weights + kQueryBlock * kKeyBlock;
  pack_transposed(attention, key, attention.key_strides, image, head, keys_t);
  pack_transposed(attention, value, attention.value_strides, image, head, values_t);
  pack_rows(attention, key, attention.key_strides, image, head, keys);
  __builtin_memset(by_key, 0, sizeof(float) * floats);
  __builtin_memset(by_value, 0, sizeof(float) * floats);
  const int64_t end = round_up(attention.keys, kKeyPanel);
  for (int64_t first = 0; first < attention.queries; first += kQueryBlock) {
    const int64_t rows = attention.queries - first < kQueryBlock ? attention.queries - first : kQueryBlock;
    float products[kQueryBlock];  // of a query's result and its gradient
    for (int64_t row = 0; row < rows; ++row) {
      const int64_t place = ((image * attention.queries + first + row) * attention.heads + head) * dim;
      copy_row(row_of(query, attention.query_strides, image, first + row, head), dim, channels,
               queries + row * channels);
      copy_row(upstream + place, dim, channels, slopes + row * channels);
      Floats product{};
      for (int64_t c = 0; c < dim; c += kLanes) {
        product += load_elements(result + place + c, dim - c) * load(slopes + row * channels + c);
      }
      products[row] = sum(product);
    }
    for (int64_t start = 0; start < end; start += kKeyBlock) {
      const int64_t block = end - start < kKeyBlock ? end - start : kKeyBlock;
      for (int64_t panel = 0; panel < block; panel += kKeyPanel) {
        multiply_matrices(rows, kKeyPanel, channels, queries, channels, keys_t + (start + panel) * channels, kKeyPanel,
                          false, weights + panel, kKeyBlock);
        multiply_matrices(rows, kKeyPanel, channels, slopes, channels, values_t + (start + panel) * channels, kKeyPanel,
                          false, by_score + panel, kKeyBlock);
      }
      for (int64_t row = 0; row < rows; ++row) {
        float* weight = weights + row * kKeyBlock;
        float* slope = by_score + row * kKeyBlock;
        hide(attention, image, first + row, start, block, weight);
        const float* own =
            statistics + ((image * attention.heads + head) * attention.queries + first + row) * kStatistics;
        for (int64_t k = 0; k < block; k += kLanes) {
          const Floats share = exp2_negative((load(weight + k) - own[0]) * (scale * kLog2e)) * own[1];
          store(weight + k, share);
          store(slope + k, share * (load(slope + k) - products[row]) * scale);
        }
      }
      multiply_matrices<Factors::floats, true>(block, channels, rows, weights, kKeyBlock, slopes, channels, true,
                                               by_value + start * channels, channels);
      multiply_matrices<Factors::floats, true>(block, channels, rows, by_score, kKeyBlock, queries, channels, true,
                                               by_key + start * channels, channels);
      multiply_matrices(rows, channels, block, by_score, kKeyBlock, keys + start * channels, channels, start > 0,
                        by_query, channels);
    }
    for (int64_t row = 0; row < rows; ++row) {
      float* target = gradients.query + ((image * attention.queries + first + row) * attention.heads + head) * dim;
      __builtin_memcpy(target, by_query + row * channels, sizeof(float) * dim);
    }
  }
  for (int64_t token = 0; token < attention.keys; ++token) {
    const int64_t place = ((image * attention.keys + token) * attention.heads + head) * dim;
    __builtin_memcpy(gradients.key + place, by_key + token * channels, sizeof(float) * dim);
    __builtin_memcpy(gradients.value + place, by_value + token * channels, sizeof(float) * dim);
  }
}
#endif

}  // namespace MF_ISA
}  // namespace maskformer_fast
