// What the kernels use in place of the standard library's templates: those would be linked once for all
// levels (isa.h), with the instructions of any of them.
#pragma once

#include <cstdint>
#include <new>

namespace engram::cpu::ENGRAM_ISA {

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
constexpr int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

// Uninitialised, aligned to cache lines, released at the end of the scope.
template <class T>
class Scratch {
 public:
  explicit Scratch(int64_t count) : data_(static_cast<T*>(::operator new(count * sizeof(T), kAlignment))) {}
  ~Scratch() { ::operator delete(data_, kAlignment); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  T* data() const { return data_; }

 private:
  static constexpr std::align_val_t kAlignment{64};
  T* data_;
};

}  // namespace engram::cpu::ENGRAM_ISA
