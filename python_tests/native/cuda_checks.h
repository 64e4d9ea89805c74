// What the tests of the block programs share: checks, random values, the run of all blocks.
#pragma once

#include <cstdio>
#include <cuda/numeric.cuh>
#include <string>

#include "cuda_block.h"

namespace engram::cuda {

inline int failures = 0, checks = 0;
inline std::string context;
inline std::mt19937_64 generator(1);

inline void check(bool passed, const char* what) {
  ++checks;
  if (passed) return;
  if (++failures <= 20) std::printf("FAILED %s: %s\n", context.c_str(), what);
}

// The exit status.
inline int report() {
  std::printf("%d checks, %d failed\n", checks, failures);
  return failures != 0;
}

inline double normal() { return std::normal_distribution<double>()(generator); }

template <typename T>
T element(double value) {
  T result;
  narrow(static_cast<Compute<T>>(value), result);
  return result;
}

template <typename T>
std::vector<T> random_values(int64_t count) {
  std::vector<T> values(count);
  for (T& value : values) value = element<T>(normal());
  return values;
}

template <typename T>
bool same_bits(const std::vector<T>& a, const std::vector<T>& b) {
  return a.empty() || std::memcmp(a.data(), b.data(), a.size() * sizeof(T)) == 0;
}

template <typename T>
const char* name_of() {
  if constexpr (std::is_same_v<T, BFloat16>) return "bf16";
  if constexpr (std::is_same_v<T, Half>) return "f16";
  return sizeof(T) == 4 ? "f32" : "f64";
}

template <typename Kernel, typename Shared = typename Kernel::Shared>
void run_blocks(const Kernel& kernel, Order order) {
  for (int64_t i = 0; i < kernel.blocks(); ++i) {
    HostBlock<typename Kernel::Registers> block(order);
    Poisoned<Shared> shared(1);
    kernel.run(block, i, *shared.data());
  }
}

}  // namespace engram::cuda
