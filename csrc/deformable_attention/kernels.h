// Kernels of multi-scale deformable attention, compiled once for each instruction set (common/cpu_isa.h).
#pragma once

#include <cstdint>

#include "common/cpu_isa.h"
#include "deformable_attention/deformable_attention.h"

namespace maskformer_fast {

// Vectors of samples, points of all levels, are padded to multiples of this in scratch memory.
constexpr int64_t kSamplePanel = 16;

constexpr int64_t round_to_panels_of_samples(int64_t size) {
  return (size + kSamplePanel - 1) / kSamplePanel * kSamplePanel;
}

// The level of each sample, [levels * points, rounded up to a multiple of kSamplePanel]; sides beyond are zero.
struct SampleLevels {
  int64_t samples, stride;  // levels * points, and rounded up
  const float* height;
  const float* width;
  const int32_t* first;  // first cell of the level
};

// Arrays of `stride` floats that the samples of one query and head take in scratch memory.
constexpr int64_t kForwardArrays = 9, kBackwardArrays = 21;

// Floats of scratch memory that a call of attend_queries needs.
inline int64_t forward_scratch_floats(const DeformableAttention& attention, int64_t stride) {
  return (2 + attention.heads * kForwardArrays) * stride + attention.heads;
}

// Floats of scratch memory that a call of differentiate_head needs.
inline int64_t backward_scratch_floats(const DeformableAttention& attention, int64_t stride) {
  return (2 + kBackwardArrays) * stride + (2 * attention.cells + 1) * round_to_panels_of_samples(attention.dim);
}

MF_DECLARE_KERNELS(
    // Attends with queries first..last-1. Queries are numbered image by image.
    void attend_queries(const DeformableAttention& attention, const SampleLevels& levels, const float* value,
                        const float* offsets, const float* logits, float* result, int64_t first, int64_t last,
                        float* scratch);
    void attend_queries(const DeformableAttention& attention, const SampleLevels& levels, const uint16_t* value,
                        const uint16_t* offsets, const uint16_t* logits, uint16_t* result, int64_t first, int64_t last,
                        float* scratch);

    // Writes the gradients of one image and head.
    void differentiate_head(const DeformableAttention& attention, const SampleLevels& levels, const float* upstream,
                            const float* value, const float* offsets, const float* logits,
                            const DeformableGradients<float>& gradients, int64_t image, int64_t head, float* scratch);
    void differentiate_head(const DeformableAttention& attention, const SampleLevels& levels, const uint16_t* upstream,
                            const uint16_t* value, const uint16_t* offsets, const uint16_t* logits,
                            const DeformableGradients<uint16_t>& gradients, int64_t image, int64_t head,
                            float* scratch);)

}  // namespace maskformer_fast
