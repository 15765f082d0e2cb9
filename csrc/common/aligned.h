// Memory whose start is that of a cache line.
#pragma once

#include <cstdint>
#include <memory>
#include <new>

namespace maskformer_fast {

constexpr std::align_val_t kCacheLine{64};

struct FreeAligned {
  void operator()(float* memory) const { ::operator delete[](memory, kCacheLine); }
};
using AlignedFloats = std::unique_ptr<float[], FreeAligned>;

// Throws std::bad_alloc.
inline AlignedFloats aligned_floats(int64_t count) {
  return AlignedFloats(static_cast<float*>(::operator new[](sizeof(float) * count, kCacheLine)));
}

}  // namespace maskformer_fast
