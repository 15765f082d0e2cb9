// A task is a row of windows or a part of one.
#include "window_attention/window_attention.h"

#include <algorithm>
#include <memory>

#include "common/cpu_isa.h"
#include "common/threads.h"
#include "window_attention/kernels.h"

namespace maskformer_fast {
namespace {

constexpr int64_t kTaskWindows = 8;

}  // namespace

template <class Element>
void window_attention(const WindowAttention& attention, const Element* qkv, const Element* padding, Element* result,
                      int threads) {
  const int64_t rows = (attention.height + attention.window - 1) / attention.window;
  const int64_t columns = (attention.width + attention.window - 1) / attention.window;
  const int64_t windows = attention.count * rows * columns;
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

}  // namespace maskformer_fast
