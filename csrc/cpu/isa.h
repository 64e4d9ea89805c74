// One source, several instruction sets: `*_kernels.cpp` is compiled once for each level, in a namespace of
// that level, and ENGRAM_DISPATCH calls the best one that this machine runs. A whole file for a level, rather
// than target_clones on functions, so that templates and lambdas belong to it too.
#pragma once

namespace engram::cpu {

enum class Isa : int { baseline, avx2, avx512 };

// The best level compiled in that this machine has; the environment variable ENGRAM_CPU_ISA lowers it.
Isa isa();
const char* isa_name(Isa level);

// For a function declared in namespace engram::cpu, declare its copy at each level.
#ifdef ENGRAM_X86
#define ENGRAM_DECLARE_LEVELS(function)       \
  namespace baseline {                        \
  decltype(::engram::cpu::function) function; \
  }                                           \
  namespace avx2 {                            \
  decltype(::engram::cpu::function) function; \
  }                                           \
  namespace avx512 {                          \
  decltype(::engram::cpu::function) function; \
  }
#define ENGRAM_DISPATCH(function) \
  (isa() == Isa::avx512 ? avx512::function : isa() == Isa::avx2 ? avx2::function : baseline::function)
#else
#define ENGRAM_DECLARE_LEVELS(function)       \
  namespace baseline {                        \
  decltype(::engram::cpu::function) function; \
  }
#define ENGRAM_DISPATCH(function) baseline::function
#endif

}  // namespace engram::cpu
