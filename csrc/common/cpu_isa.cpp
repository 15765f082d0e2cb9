#include "common/cpu_isa.h"

#include <atomic>
#include <stdexcept>

namespace maskformer_fast {
namespace {

constexpr const char* kNames[] = {"baseline", "avx2", "avx512"};

Isa widest() {
#if defined(__x86_64__)
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vl")) {
    return Isa::avx512;
  }
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return Isa::avx2;
#endif
  return Isa::baseline;
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
