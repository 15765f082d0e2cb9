// Weighted focal loss of vectors of logits, for kernel files (cpu_isa.h).
#pragma once

#include "common/focal_loss.h"
#include "common/simd.h"

namespace maskformer_fast {
namespace MF_ISA {

// Exponents gamma of the focal loss that have code of their own.
enum class Exponent { zero, two, other };

MF_INLINE Exponent exponent_of(const FocalLoss& loss) {
  return loss.gamma == 0.0f ? Exponent::zero : loss.gamma == 2.0f ? Exponent::two : Exponent::other;
}

// The loss with the target on is on_weight * on, with the target off off_weight * off.
struct PixelLoss {
  Floats probability, rest;        // sigmoid of x and of -x
  Floats on, off;                  // softplus of -x and of x
  Floats on_weight, off_weight;    // weight * rest^gamma and weight * probability^gamma
};

template <Exponent exponent>
MF_INLINE PixelLoss pixel_loss(Floats x, const FocalLoss& loss) {
  const Ints positive = x > 0.0f;
  const Floats e = exp(select(positive, -x, x));  // e^-|x|
  const Floats small = log1p_unit(e), reciprocal = 1.0f / (1.0f + e);
  const Floats minor = e * reciprocal;
  PixelLoss pixel;
  pixel.probability = select(positive, reciprocal, minor), pixel.rest = select(positive, minor, reciprocal);
  const Floats rectified = max(x, Floats{});
  pixel.off = rectified + small, pixel.on = rectified - x + small;
  if (exponent == Exponent::zero) {
    pixel.on_weight = broadcast(loss.on_weight), pixel.off_weight = broadcast(loss.off_weight);
  } else if (exponent == Exponent::two) {
    pixel.on_weight = loss.on_weight * (pixel.rest * pixel.rest);
    pixel.off_weight = loss.off_weight * (pixel.probability * pixel.probability);
  } else {  // probability = e^-softplus(-x)
    pixel.on_weight = loss.on_weight * exp(-loss.gamma * pixel.off);
    pixel.off_weight = loss.off_weight * exp(-loss.gamma * pixel.on);
  }
  return pixel;
}

}  // namespace MF_ISA
}  // namespace maskformer_fast
