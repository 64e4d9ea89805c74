#include "isa.h"

#ifdef ENGRAM_X86
#include <cpuid.h>
#endif

#include <cstdint>
#include <cstdlib>
#include <cstring>

namespace engram::cpu {

#ifdef ENGRAM_X86
static bool has(uint32_t word, uint32_t bits) { return (word & bits) == bits; }

// Which of the machine's registers the system saves when it switches threads: XCR0.
static uint32_t saved_registers() {
  uint32_t low, high;
  asm volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return low;
}
#endif

// Asked of the processor itself: what __builtin_cpu_supports reads is filled in by the compiler's runtime
// library, and that of Zig, which links the wheels, leaves it at zero.
static Isa best() {
#ifdef ENGRAM_X86
  uint32_t eax, ebx, ecx, edx;
  if (!__get_cpuid(1, &eax, &ebx, &ecx, &edx) || !has(ecx, bit_OSXSAVE | bit_AVX | bit_FMA | bit_F16C)) {
    return Isa::baseline;
  }
  constexpr uint32_t kYmm = 0x6, kZmm = 0xe6;
  const uint32_t saved = saved_registers();
  if (!has(saved, kYmm) || !__get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx) || !has(ebx, bit_AVX2)) {
    return Isa::baseline;
  }
  const bool avx512 = has(ebx, bit_AVX512F | bit_AVX512DQ | bit_AVX512BW | bit_AVX512VL);
  return avx512 && has(saved, kZmm) ? Isa::avx512 : Isa::avx2;
#else
  return Isa::baseline;
#endif
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
