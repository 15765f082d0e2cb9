// A batch of assignment problems on the host.
#pragma once

#include "assignment/batch.h"

namespace maskformer_fast {

// Solves the batch with at most `threads` threads, the calling one included.
// Throws std::invalid_argument on a count outside 0..columns, std::bad_alloc.
template <class T>
void assign_batch(const AssignmentBatch<T>& batch, int threads);

}  // namespace maskformer_fast
