// Parameters of the weighted focal loss of a pixel.
#pragma once

namespace maskformer_fast {

// Loss of a pixel with logit x, where sp is softplus and p is sigmoid(x):
//   target on:   on_weight * (1 - p)^gamma * sp(-x)
//   target off:  off_weight * p^gamma * sp(x)
struct FocalLoss {
  float on_weight;
  float off_weight;
  float gamma;
};

}  // namespace maskformer_fast
