// A task is a band of rows of an image. Bands do not depend on the number of threads: each has sums of its own for the
// weights' gradients, which are added up in order.
#include "upscaling/upscaling.h"

#include <algorithm>
#include <memory>

#include "common/cpu_isa.h"
#include "common/threads.h"
#include "upscaling/kernels.h"

namespace maskformer_fast {
namespace {

constexpr int64_t kBandRows = 32;  // those beside a band are computed twice

int64_t count_bands(const Upscaling& sizes) {
  if (sizes.width == 0 || sizes.channels == 0) return 0;
  return (2 * sizes.height + kBandRows - 1) / kBandRows;
}

}  // namespace

template <class Element>
void upscaling(const Upscaling& sizes, const Element* maps, Element* result, int threads) {
  const int64_t bands = count_bands(sizes), tasks = sizes.count * bands;
  if (tasks == 0) return;
  threads = static_cast<int>(std::min<int64_t>(threads, tasks));
  const int64_t floats = scratch_floats(sizes);
  const std::unique_ptr<float[]> scratch(new float[threads * floats]);
  parallel_for(tasks, threads, [&](int worker, int64_t task) {
    const int64_t first = task % bands * kBandRows;
    MF_DISPATCH(upscale_rows, sizes, maps, result, task / bands, first,
                std::min(first + kBandRows, 2 * sizes.height), scratch.get() + worker * floats);
  });
}

template void upscaling(const Upscaling&, const float*, float*, int);
template void upscaling(const Upscaling&, const uint16_t*, uint16_t*, int);

void upscaling_backward(const Upscaling& sizes, const float* gradient, const float* maps, float* by_maps,
                        float* by_weights, int threads) {
  const int64_t bands = count_bands(sizes), tasks = sizes.count * bands, weights = kWeightRows * sizes.channels;
  std::fill_n(by_weights, weights, 0.0f);
  if (tasks == 0) return;
  threads = static_cast<int>(std::min<int64_t>(threads, tasks));
  const int64_t floats = backward_scratch_floats(sizes);
  const std::unique_ptr<float[]> scratch(new float[threads * floats]);
  const std::unique_ptr<float[]> sums(new float[tasks * weights]);
  parallel_for(tasks, threads, [&](int worker, int64_t task) {
    const int64_t first = task % bands * kBandRows;
    MF_DISPATCH(differentiate_rows, sizes, gradient, maps, by_maps, sums.get() + task * weights, task / bands, first,
                std::min(first + kBandRows, 2 * sizes.height), scratch.get() + worker * floats);
  });
  for (int64_t task = 0; task < tasks; ++task) {
    for (int64_t i = 0; i < weights; ++i) by_weights[i] += sums[task * weights + i];
  }
}

}  // namespace maskformer_fast
