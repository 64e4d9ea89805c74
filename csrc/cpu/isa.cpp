#include "isa.h"

#include <cstdlib>
#include <cstring>

namespace engram::cpu {

static Isa best() {
#ifdef ENGRAM_X86
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq")) {
    return Isa::avx512;
  }
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c")) {
    return Isa::avx2;
  }
#endif
  return Isa::baseline;
}

static Isa choose() {
  const char* name = std::getenv("ENGRAM_CPU_ISA");
  Isa level = best();
  while (name && level != Isa::baseline && std::strcmp(name, isa_name(level)) != 0) {
    level = static_cast<Isa>(static_cast<int>(level) - 1);
  }
  return level;
}

Isa isa() {
  static const Isa chosen = choose();
  return chosen;
}

const char* isa_name(Isa level) {
  switch (level) {
    case Isa::avx512:
      return "avx512";
    case Isa::avx2:
      return "avx2";
    default:
      return "baseline";
  }
}

}  // namespace engram::cpu
