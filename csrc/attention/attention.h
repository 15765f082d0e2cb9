// Softmax attention of all queries to all keys on the host, without an array of scores.
#pragma once

#include <cstdint>

namespace maskformer_fast {

struct TokenStrides {
  int64_t image, token, head;  // channels are adjacent
};

// Queries [images, queries, heads, head_dim], keys and values [images, keys, heads, head_dim]; a score is
// query . key / sqrt(head_dim). The first `masked_queries` queries see the last `masked_keys` keys only where `visible`
// [images, masked_queries, masked_keys] is not zero; a query that sees no key attends to all alike.
struct Attention {
  int64_t images, queries, keys;
  int64_t heads, head_dim;
  TokenStrides query_strides, key_strides, value_strides;
  const uint8_t* visible;
  int64_t masked_queries, masked_keys;
};

// Numbers of a query and head: the largest product query . key, and the inverse of the sum of the weights relative to it.
constexpr int64_t kStatistics = 2;

// Attends -> result [images, queries, heads, head_dim] and statistics [images, heads, queries, kStatistics]. Element is
// float, or uint16_t for bfloat16, whose sums are in float; products are of bfloat16 where the processor has them. Uses
// at most `threads` threads, the calling one included; the result does not depend on their number. A query with a score
// that is NaN or infinity gives NaN; one of minus infinity has no weight. Throws std::bad_alloc.
template <class Element>
void attention(const Attention& attention, const Element* query, const Element* key, const Element* value,
               Element* result, float* statistics, int threads);
extern template void attention(const Attention&, const float*, const float*, const float*, float*, float*, int);
extern template void attention(const Attention&, const uint16_t*, const uint16_t*, const uint16_t*, uint16_t*, float*,
                               int);

struct AttentionGradients {
  float* query;  // [images, queries, heads, head_dim]
  float* key;    // [images, keys, heads, head_dim]
  float* value;  // [images, keys, heads, head_dim]
};

// Gradients of a sum of result * upstream [images, queries, heads, head_dim]. `result` and `statistics` are those of
// attention(); threads and exceptions too.
void attention_backward(const Attention& attention, const float* query, const float* key, const float* value,
                        const float* result, const float* statistics, const float* upstream,
                        const AttentionGradients& gradients, int threads);

}  // namespace maskformer_fast
