// Choice of the instruction set that the kernels of the CPU use.
//
// CMakeLists.txt compiles each csrc/*/kernels.cpp once for each instruction set. MF_ISA names the namespace of the
// result: maskformer_fast::baseline, ::avx2 or ::avx512. MF_DECLARE_KERNELS declares the kernels in all of them, and
// MF_DISPATCH calls the one for the current instruction set. Products of bfloat16, by AVX-512's instruction or by AMX,
// are further sets: attention alone is compiled for them, and all other kernels are those of AVX-512.
//
// Kernel files must not use inline functions of the standard library, nor share inline functions that are neither
// static nor in an unnamed namespace. The linker keeps one copy of such a function for all files, and that copy could
// be one that this processor cannot run.
#pragma once

#include <string>
#include <vector>

namespace maskformer_fast {

enum class Isa { baseline, avx2, avx512, avx512_bf16, avx512_amx };

// Returns the widest instruction set that this processor runs, or the one that use_isa chose.
Isa current_isa();

// Names of the instruction sets that this processor runs, narrowest first.
std::vector<std::string> available_isas();

// Forces an instruction set, for tests: "baseline", "avx2", "avx512", "avx512_bf16", "avx512_amx", or "auto" for the
// widest.
// Throws std::invalid_argument for any other name, and for an instruction set that this processor does not run.
void use_isa(const std::string& name);

}  // namespace maskformer_fast

// MF_DECLARE_KERNELS(declarations...) declares functions in the namespace of each instruction set.
// MF_DISPATCH(function, arguments...) calls maskformer_fast::ISA::function for the current instruction set.
#if defined(__x86_64__)
#define MF_DECLARE_KERNELS(...) \
  namespace baseline {          \
  __VA_ARGS__                   \
  }                             \
  namespace avx2 {              \
  __VA_ARGS__                   \
  }                             \
  namespace avx512 {            \
  __VA_ARGS__                   \
  }
#define MF_DISPATCH(FUNCTION, ...)                                         \
  (::maskformer_fast::current_isa() >= ::maskformer_fast::Isa::avx512      \
       ? ::maskformer_fast::avx512::FUNCTION(__VA_ARGS__)                  \
       : ::maskformer_fast::current_isa() == ::maskformer_fast::Isa::avx2  \
             ? ::maskformer_fast::avx2::FUNCTION(__VA_ARGS__)              \
             : ::maskformer_fast::baseline::FUNCTION(__VA_ARGS__))
#else
#define MF_DECLARE_KERNELS(...) \
  namespace baseline {          \
  __VA_ARGS__                   \
  }
#define MF_DISPATCH(FUNCTION, ...) ::maskformer_fast::baseline::FUNCTION(__VA_ARGS__)
#endif
