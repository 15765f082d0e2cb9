// Which instruction set the kernels of the CPU use.
//
// The files of KERNEL_SOURCES in CMakeLists.txt are compiled once for each instruction set, with MF_ISA naming the
// namespace that holds the result: maskformer_fast::baseline, ::avx2, ::avx512. They include nothing of the standard
// library that has code of its own: the linker keeps one copy of an inline function for all files, and it could be
// one that this processor cannot run.
#pragma once

#include <string>
#include <vector>

namespace maskformer_fast {

enum class Isa { baseline, avx2, avx512 };

// The widest that this processor runs, or the one that use_isa chose.
Isa current_isa();

// Names of those that this processor runs, narrowest first.
std::vector<std::string> available_isas();

// For tests: "baseline", "avx2", "avx512", or "auto" for the widest. Throws std::invalid_argument for others.
void use_isa(const std::string& name);

}  // namespace maskformer_fast

// Calls maskformer_fast::ISA::FUNCTION(arguments...) for the current instruction set.
#if defined(__x86_64__)
#define MF_DISPATCH(FUNCTION, ...)                                       \
  (::maskformer_fast::current_isa() == ::maskformer_fast::Isa::avx512    \
       ? ::maskformer_fast::avx512::FUNCTION(__VA_ARGS__)                \
       : ::maskformer_fast::current_isa() == ::maskformer_fast::Isa::avx2 \
             ? ::maskformer_fast::avx2::FUNCTION(__VA_ARGS__)            \
             : ::maskformer_fast::baseline::FUNCTION(__VA_ARGS__))
#else
#define MF_DISPATCH(FUNCTION, ...) ::maskformer_fast::baseline::FUNCTION(__VA_ARGS__)
#endif
