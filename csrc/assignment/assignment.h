// Rectangular linear sum assignment of a batch of problems, on the host and on CUDA devices. Needs no CUDA header.
#pragma once

#include <array>
#include <cstdint>

namespace maskformer_fast {

template <class T>
struct AssignmentBatch {
  const T* cost;                   // [batch, rows, columns]
  std::array<int64_t, 3> sizes;    // batch, rows, columns
  std::array<int64_t, 3> strides;  // of cost, in elements
  const int64_t* counts;           // [batch], valid columns of each problem; nullptr: all of them
  int64_t* row_of;                 // result, [batch, columns]: the row of each column, or -1
};

// Solves the batch with at most `threads` threads, the calling one included.
// Throws std::invalid_argument on a count outside 0..columns, std::bad_alloc.
template <class T>
void linear_sum_assignment(const AssignmentBatch<T>& batch, int threads);

// The functions below are built only with CUDA (MF_HAS_CUDA).

// Returns the bytes of device memory that linear_sum_assignment_cuda needs for this batch besides shared memory, often
// none. It is at most the size of the costs and of the tables of the problems that are solved at a time.
// Throws std::invalid_argument on sizes that are too large, std::runtime_error with CUDA's reason.
template <class T>
int64_t assignment_scratch_bytes(const AssignmentBatch<T>& batch, int device);

// Launches the solution of the batch on a stream (a cudaStream_t) of `device`, where all pointers of the batch lie, and
// returns without waiting. Allocates nothing, so it can be captured into a graph. The calling thread's current device
// stays as it was. A problem with a count outside 0..columns gets all -1, because raising an error would need a wait.
// scratch: assignment_scratch_bytes bytes, aligned to 16, used by nothing else until the stream has passed this call.
// Throws std::invalid_argument on too large sizes and on too few bytes, std::runtime_error with CUDA's reason.
template <class T>
void linear_sum_assignment_cuda(const AssignmentBatch<T>& batch, void* scratch, int64_t scratch_bytes, int device,
                                void* stream);

}  // namespace maskformer_fast
