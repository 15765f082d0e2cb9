// Assignment on a CUDA device: a warp for each small problem, a block for each large one.
#include <cuda_runtime.h>

#include <algorithm>
#include <limits>
#include <stdexcept>
#include <string>

#include "assignment/assignment.h"
#include "assignment/team.h"

namespace maskformer_fast {
namespace {

constexpr int kWarpLanes = 32;
constexpr int kBlockThreads = 512;
constexpr int64_t kWarpColumns = 256;  // longest side of a problem that one warp solves; a guess, not measured

// Bytes of shared memory that a block has without opting in. A warp uses no more, so that several warps fit on a
// multiprocessor.
constexpr int64_t kPlainSharedBytes = 48 * 1024;

// Slots of a BlockGroup and their bytes, in static shared memory. They count against the same limits.
constexpr int kSlots = 2 * kBlockThreads / kWarpLanes;
constexpr int64_t kSlotBytes = kSlots * static_cast<int64_t>(sizeof(ColumnKey));

// Problems that a multiprocessor solves at a time where they use scratch memory.
constexpr int kWarpsPerMultiprocessor = 8, kBlocksPerMultiprocessor = 1;

struct CudaHardware {
  __device__ __forceinline__ int lane() const { return threadIdx.x % kWarpLanes; }
  __device__ __forceinline__ int lanes() const { return kWarpLanes; }
  __device__ __forceinline__ int warp() const { return threadIdx.x / kWarpLanes; }
  __device__ __forceinline__ int warps() const { return kBlockThreads / kWarpLanes; }
  __device__ __forceinline__ void sync_warp() const { __syncwarp(); }
  __device__ __forceinline__ void sync_block() const { __syncthreads(); }
  __device__ __forceinline__ uint32_t warp_min(uint32_t x) const { return __reduce_min_sync(0xffffffffu, x); }
};

// Launch of a batch.
struct Plan {
  int64_t blocks;
  int64_t shared_bytes;   // dynamic shared memory of a block
  int64_t scratch_bytes;  // scratch memory of a block: tables and copied problem, those that are not in shared memory
  bool one_warp;
  bool shared_tables;
  bool shared_matrix;  // each problem is copied to shared memory
  bool copies;         // problems may be copied to scratch memory
};

template <class T, bool kOneWarp, bool kSharedTables, bool kSharedMatrix>
__global__ void __launch_bounds__(kOneWarp ? kWarpLanes : kBlockThreads, 1)
    assign_kernel(const TeamBatch<T> batch, char* scratch, int64_t scratch_bytes, bool copies) {
  extern __shared__ __align__(16) char shared[];
  const int64_t rows = min(batch.rows, batch.columns), columns = max(batch.rows, batch.columns);
  scratch += blockIdx.x * scratch_bytes;
  char* const tables = kSharedTables ? shared : scratch;
  const int64_t bytes = table_bytes(rows, columns);
  T* matrix = nullptr;
  if (kSharedMatrix) {
    matrix = reinterpret_cast<T*>(shared + bytes);
  } else if (copies) {
    matrix = reinterpret_cast<T*>(kSharedTables ? scratch : scratch + bytes);
  }
  const auto solve_all = [&](auto& team) {
    for (int64_t problem = blockIdx.x; problem < batch.problems; problem += gridDim.x) {
      assign_problem(team, batch, problem, tables, matrix, kSharedMatrix);
      team.sync();
    }
  };
  if constexpr (kOneWarp) {
    StridedTeam<WarpGroup<CudaHardware>> team{WarpGroup<CudaHardware>(CudaHardware{})};
    solve_all(team);
  } else {
    __shared__ ColumnKey slots[kSlots];
    StridedTeam<BlockGroup<CudaHardware>> team{BlockGroup<CudaHardware>(CudaHardware{}, slots)};
    solve_all(team);
  }
}

void check(cudaError_t status, const char* what) {
  if (status == cudaSuccess) return;
  throw std::runtime_error(std::string("linear_sum_assignment on CUDA: ") + what + ": " + cudaGetErrorString(status));
}

// Makes a device current and restores the one before.
class DeviceGuard {
 public:
  explicit DeviceGuard(int device) {
    check(cudaGetDevice(&before_), "no current device");
    if (before_ == device) return;
    check(cudaSetDevice(device), "cannot use the device");
    changed_ = true;
  }
  ~DeviceGuard() {
    if (changed_) cudaSetDevice(before_);
  }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

 private:
  int before_ = 0;
  bool changed_ = false;
};

int64_t attribute(cudaDeviceAttr name, int device) {
  int value = 0;
  check(cudaDeviceGetAttribute(&value, name, device), "cannot ask the device");
  return value;
}

int64_t largest_shared_bytes(int device) {
  return attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, device) - kSlotBytes;
}

template <class T>
TeamBatch<T> team_batch(const AssignmentBatch<T>& batch) {
  // a lane's column number passes the last column by up to kBlockThreads and must not overflow
  constexpr int64_t limit = std::numeric_limits<int>::max() - kBlockThreads;
  if (batch.sizes[1] > limit || batch.sizes[2] > limit) {
    throw std::invalid_argument("cost: expected fewer than 2^31 - 512 rows and columns");
  }
  return {batch.cost,       batch.sizes[0],   static_cast<int>(batch.sizes[1]), static_cast<int>(batch.sizes[2]),
          batch.strides[0], batch.strides[1], batch.strides[2],                 batch.counts,
          batch.row_of};
}

template <class T>
Plan make_plan(const TeamBatch<T>& batch, int device) {
  const int64_t rows = std::min(batch.rows, batch.columns), columns = std::max(batch.rows, batch.columns);
  const int64_t tables = table_bytes(rows, columns);
  Plan plan{};
  plan.blocks = std::min<int64_t>(batch.problems, std::numeric_limits<int>::max());
  if (plan.blocks == 0) return plan;
  const int64_t matrix = aligned(rows * copy_stride(columns) * static_cast<int64_t>(sizeof(T)));
  plan.one_warp = columns <= kWarpColumns;
  if (plan.one_warp) {
    plan.shared_tables = true;
    plan.shared_matrix = tables + matrix <= kPlainSharedBytes;
  } else {
    plan.shared_tables = tables <= largest_shared_bytes(device);
  }
  plan.copies = !plan.shared_matrix && !is_contiguous(batch);
  plan.shared_bytes = (plan.shared_tables ? tables : 0) + (plan.shared_matrix ? matrix : 0);
  plan.scratch_bytes = (plan.shared_tables ? 0 : tables) + (plan.copies ? matrix : 0);
  if (plan.scratch_bytes > 0) {
    const int64_t at_a_time = plan.one_warp ? kWarpsPerMultiprocessor : kBlocksPerMultiprocessor;
    plan.blocks = std::min(plan.blocks, at_a_time * attribute(cudaDevAttrMultiProcessorCount, device));
  }
  return plan;
}

template <class T>
using Kernel = void (*)(const TeamBatch<T>, char*, int64_t, bool);

template <class T>
Kernel<T> kernel_for(const Plan& plan) {
  if (plan.one_warp) {
    return plan.shared_matrix ? assign_kernel<T, true, true, true> : assign_kernel<T, true, true, false>;
  }
  return plan.shared_tables ? assign_kernel<T, false, true, false> : assign_kernel<T, false, false, false>;
}

}  // namespace

template <class T>
int64_t assignment_scratch_bytes(const AssignmentBatch<T>& batch, int device) {
  const Plan plan = make_plan(team_batch(batch), device);
  return plan.blocks * plan.scratch_bytes;
}

template <class T>
void linear_sum_assignment_cuda(const AssignmentBatch<T>& batch, void* scratch, int64_t scratch_bytes, int device,
                                void* stream) {
  TeamBatch<T> problems = team_batch(batch);
  if (problems.problems == 0 || problems.columns == 0) return;
  const DeviceGuard guard(device);
  Plan plan = make_plan(problems, device);
  if (scratch_bytes < plan.blocks * plan.scratch_bytes) {
    throw std::invalid_argument("scratch: expected " + std::to_string(plan.blocks * plan.scratch_bytes) +
                                " bytes, got " + std::to_string(scratch_bytes));
  }
  const void* kernel = reinterpret_cast<const void*>(kernel_for<T>(plan));
  if (plan.shared_bytes + kSlotBytes > kPlainSharedBytes) {
    // the largest possible value, so that callers on several threads set the same
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                               static_cast<int>(largest_shared_bytes(device))),
          "no such shared memory");
  }
  char* memory = static_cast<char*>(scratch);
  void* arguments[] = {&problems, &memory, &plan.scratch_bytes, &plan.copies};
  check(cudaLaunchKernel(kernel, dim3(static_cast<unsigned>(plan.blocks)),
                         dim3(plan.one_warp ? kWarpLanes : kBlockThreads), arguments,
                         static_cast<size_t>(plan.shared_bytes), static_cast<cudaStream_t>(stream)),
        "cannot start");
}

template int64_t assignment_scratch_bytes<float>(const AssignmentBatch<float>&, int);
template int64_t assignment_scratch_bytes<double>(const AssignmentBatch<double>&, int);
template void linear_sum_assignment_cuda<float>(const AssignmentBatch<float>&, void*, int64_t, int, void*);
template void linear_sum_assignment_cuda<double>(const AssignmentBatch<double>&, void*, int64_t, int, void*);

}  // namespace maskformer_fast
