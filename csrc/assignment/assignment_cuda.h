// A batch of assignment problems on a CUDA device. Needs no CUDA header.
#pragma once

#include "assignment/batch.h"

namespace maskformer_fast {

// Bytes of the device's memory that assign_batch_cuda needs for this batch beside shared memory; often none. At most
// what the costs take and the tables of the problems that are solved at a time.
// Throws std::invalid_argument on sizes that are too large, std::runtime_error with CUDA's reason.
template <class T>
int64_t assignment_scratch_bytes(const AssignmentBatch<T>& batch, int device);

// Starts the batch on a stream (a cudaStream_t) of `device`, where all its pointers lie, and returns. Allocates and
// waits for nothing, so it can be captured into a graph; the calling thread's current device stays as it was.
// A problem with a count outside 0..columns comes back all -1: to raise, the host would have to wait.
// scratch: as many bytes as above, aligned to 16, not used by anyone else until the stream has passed.
// Throws as above.
template <class T>
void assign_batch_cuda(const AssignmentBatch<T>& batch, void* scratch, int64_t scratch_bytes, int device, void* stream);

}  // namespace maskformer_fast
