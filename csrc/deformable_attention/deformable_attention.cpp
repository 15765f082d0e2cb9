// A task of the forward pass is a run of queries; one of the backward pass is an image and head.
#include "deformable_attention/deformable_attention.h"

#include <algorithm>
#include <memory>
#include <vector>

#include "common/cpu_isa.h"
#include "common/threads.h"
#include "deformable_attention/kernels.h"

namespace maskformer_fast {
namespace {

constexpr int64_t kTaskQueries = 64;

// Holds the level of each sample.
class Levels {
 public:
  explicit Levels(const DeformableAttention& attention)
      : samples_(attention.levels * attention.points),
        stride_(round_to_panels_of_samples(samples_)),
        sides_(2 * stride_, 0.0f),
        first_(stride_, 0) {
    int64_t first = 0;
    for (int64_t level = 0; level < attention.levels; ++level) {
      const int64_t height = attention.level_sizes[2 * level], width = attention.level_sizes[2 * level + 1];
      for (int64_t sample = level * attention.points; sample < (level + 1) * attention.points; ++sample) {
        sides_[sample] = static_cast<float>(height);
        sides_[stride_ + sample] = static_cast<float>(width);
        first_[sample] = static_cast<int32_t>(first);
      }
      first += height * width;
    }
  }

  SampleLevels get() const { return {samples_, stride_, sides_.data(), sides_.data() + stride_, first_.data()}; }

 private:
  int64_t samples_, stride_;
  std::vector<float> sides_;
  std::vector<int32_t> first_;
};

}  // namespace

template <class Element>
void deformable_attention(const DeformableAttention& attention, const Element* value, const Element* offsets,
                          const Element* logits, Element* result, int threads) {
  const int64_t queries = attention.count * attention.queries;
  if (queries * attention.heads * attention.dim == 0) return;
  const int64_t tasks = std::max((queries + kTaskQueries - 1) / kTaskQueries, std::min<int64_t>(queries, threads));
  threads = static_cast<int>(std::min<int64_t>(threads, tasks));
  const Levels levels(attention);
  const int64_t floats = forward_scratch_floats(attention, levels.get().stride);
  const std::unique_ptr<float[]> scratch(new float[threads * floats]);
  parallel_for(tasks, threads, [&](int worker, int64_t task) {
    MF_DISPATCH(attend_queries, attention, levels.get(), value, offsets, logits, result, queries * task / tasks,
                queries * (task + 1) / tasks, scratch.get() + worker * floats);
  });
}

template <class Element>
void deformable_attention_backward(const DeformableAttention& attention, const Element* upstream, const Element* value,
                                   const Element* offsets, const Element* logits,
                                   const DeformableGradients<Element>& gradients, int threads) {
  const int64_t tasks = attention.count * attention.heads;
  if (tasks == 0) return;
  threads = static_cast<int>(std::min<int64_t>(threads, tasks));
  const Levels levels(attention);
  const int64_t floats = backward_scratch_floats(attention, levels.get().stride);
  const std::unique_ptr<float[]> scratch(new float[threads * floats]);
  parallel_for(tasks, threads, [&](int worker, int64_t task) {
    MF_DISPATCH(differentiate_head, attention, levels.get(), upstream, value, offsets, logits, gradients,
                task / attention.heads, task % attention.heads, scratch.get() + worker * floats);
  });
}

template void deformable_attention(const DeformableAttention&, const float*, const float*, const float*, float*, int);
template void deformable_attention(const DeformableAttention&, const uint16_t*, const uint16_t*, const uint16_t*,
                                   uint16_t*, int);
template void deformable_attention_backward(const DeformableAttention&, const float*, const float*, const float*,
                                            const float*, const DeformableGradients<float>&, int);
template void deformable_attention_backward(const DeformableAttention&, const uint16_t*, const uint16_t*,
                                            const uint16_t*, const uint16_t*, const DeformableGradients<uint16_t>&,
                                            int);

}  // namespace maskformer_fast
