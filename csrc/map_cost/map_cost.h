// Matching cost of mask logits at random points of each image, on the host.
#pragma once

#include "points/points.h"

namespace maskformer_fast {

// The costs of `point_cost` where points are given: maps [layers, images, queries, height, width], float or uint16_t
// (bfloat16), are sampled bilinearly with zeros outside. Results do not depend on the number of threads.
template <class Element>
void map_cost(const PointCosts& costs, const Element* maps, float* result, int threads);

}  // namespace maskformer_fast
