#include "common/cpu_isa.h"

#include <atomic>
#include <stdexcept>

#if defined(__x86_64__) && defined(__linux__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace maskformer_fast {
namespace {

constexpr const char* kNames[] = {"baseline", "avx2", "avx512", "avx512_bf16", "avx512_amx"};

#if defined(__x86_64__)
// Whether the processor multiplies tiles of bfloat16 and the system lets this process do so. It is asked once: Linux
// makes room for the tiles of all threads.
bool may_use_tiles() {
#if defined(__linux__)
  constexpr unsigned kTiles = 1u << 24, kBfloat16 = 1u << 22;  // of register EDX of leaf 7
  constexpr long kRequestFeature = 0x1023, kTileData = 18;     // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  unsigned a, b, c, d;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return false;
  return (d & kTiles) && (d & kBfloat16) && syscall(SYS_arch_prctl, kRequestFeature, kTileData) == 0;
#else
  return false;
#endif
}

Isa find_widest() {
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vl")) {
    if (!__builtin_cpu_supports("avx512bf16")) return Isa::avx512;
    return may_use_tiles() ? Isa::avx512_amx : Isa::avx512_bf16;
  }
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") ? Isa::avx2 : Isa::baseline;
}
#else
Isa find_widest() { return Isa::baseline; }
#endif

Isa widest() {
  static const Isa isa = find_widest();
  return isa;
}

std::atomic<Isa>& chosen() {
  static std::atomic<Isa> isa{widest()};
  return isa;
}

}  // namespace

Isa current_isa() { return chosen().load(std::memory_order_relaxed); }

std::vector<std::string> available_isas() { return {kNames, kNames + static_cast<int>(widest()) + 1}; }

void use_isa(const std::string& name) {
  if (name == "auto") {
    chosen() = widest();
    return;
  }
  std::string known;
  for (int isa = 0; isa <= static_cast<int>(widest()); ++isa) {
    if (name == kNames[isa]) {
      chosen() = static_cast<Isa>(isa);
      return;
    }
    known += std::string(kNames[isa]) + ", ";
  }
  throw std::invalid_argument("isa: expected one of " + known + "auto on this processor, got " + name);
}

}  // namespace maskformer_fast
