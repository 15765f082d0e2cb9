// A task is some windows; in the backward pass, a head in a group of windows. Groups do not depend on the number of
// threads: each has sums of its own, which are added up in order.
#include "window_attention/window_attention.h"

#include <algorithm>
#include <memory>

#include "common/cpu_isa.h"
#include "common/threads.h"
#include "window_attention/kernels.h"

namespace maskformer_fast {
namespace {

constexpr int64_t kTaskWindows = 8;
constexpr int64_t kGroups = 8;

int64_t count_windows(const WindowAttention& attention) {
  const int64_t rows = (attention.height + attention.window - 1) / attention.window;
  const int64_t columns = (attention.width + attention.window - 1) / attention.window;
  return attention.count * rows * columns;
}

// Adds up rows one after another.
void add_rows(const float* values, int64_t rows, int64_t columns, float* result) {
  std::fill_n(result, columns, 0.0f);
  for (int64_t row = 0; row < rows; ++row) {
    for (int64_t column = 0; column < columns; ++column) result[column] += values[row * columns + column];
  }
}

}  // namespace

template <class Element>
void window_attention(const WindowAttention& attention, const Element* qkv, const Element* padding, Element* result,
                      int threads) {
  const int64_t windows = count_windows(attention);
  if (windows == 0) return;
  const int64_t tasks = std::max<int64_t>((windows + kTaskWindows - 1) / kTaskWindows,
                                          std::min<int64_t>(windows, threads));
  threads = static_cast<int>(std::min<int64_t>(threads, tasks));
  const int64_t floats = scratch_floats(attention);
  const std::unique_ptr<float[]> scratch(new float[threads * floats]);
  parallel_for(tasks, threads, [&](int worker, int64_t task) {
    MF_DISPATCH(attend_windows, attention, qkv, padding, result, windows * task / tasks, windows * (task + 1) / tasks,
                scratch.get() + worker * floats);
  });
}

template void window_attention(const WindowAttention&, const float*, const float*, float*, int);
template void window_attention(const WindowAttention&, const uint16_t*, const uint16_t*, uint16_t*, int);

template <class Element>
void window_attention_backward(const WindowAttention& attention, const Element* gradient, const Element* qkv,
                               const Element* padding, Element* by_qkv, float* by_padding, float* by_bias,
                               int threads) {
  const int64_t windows = count_windows(attention), groups = std::min(windows, kGroups);
  const int64_t tokens = attention.window * attention.window, head_bias = tokens * attention.key_stride;
  const int64_t channels = 3 * attention.heads * attention.head_dim, floats = backward_scratch_floats(attention);
  const int64_t tasks = attention.heads * groups;
  threads = static_cast<int>(std::max<int64_t>(std::min<int64_t>(threads, tasks), 1));
  const std::unique_ptr<float[]> scratch(new float[threads * floats]);
  const std::unique_ptr<float[]> padding_sums(new float[groups * channels]());
  const std::unique_ptr<float[]> bias_sums(new float[tasks * head_bias]());
  parallel_for(tasks, threads, [&](int worker, int64_t task) {
    const int64_t head = task % attention.heads, group = task / attention.heads;
    MF_DISPATCH(differentiate_windows, attention, gradient, qkv, padding, by_qkv, padding_sums.get() + group * channels,
                bias_sums.get() + task * head_bias, head, windows * group / groups, windows * (group + 1) / groups,
                scratch.get() + worker * floats);
  });
  add_rows(padding_sums.get(), groups, channels, by_padding);
  add_rows(bias_sums.get(), groups, attention.heads * head_bias, by_bias);
}

template void window_attention_backward(const WindowAttention&, const float*, const float*, const float*, float*,
                                        float*, float*, int);
template void window_attention_backward(const WindowAttention&, const uint16_t*, const uint16_t*, const uint16_t*,
                                        uint16_t*, float*, float*, int);

}  // namespace maskformer_fast
