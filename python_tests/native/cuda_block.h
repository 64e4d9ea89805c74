// Runs the block programs of csrc/cuda on a host: every step thread by thread, in an order of the test's
// choice.
#pragma once

#include <algorithm>
#include <cstring>
#include <cuda/block.cuh>
#include <numeric>
#include <random>
#include <vector>

namespace engram::cuda {

enum class Order { forward, reversed, shuffled };
constexpr Order kOrders[] = {Order::forward, Order::reversed, Order::shuffled};

// Memory as a kernel finds it: aligned, of exactly the size asked for, and full of NaN.
template <typename T>
class Poisoned {
 public:
  explicit Poisoned(size_t count)
      : data_(static_cast<T*>(::operator new(count * sizeof(T), std::align_val_t(16)))) {
    std::memset(static_cast<void*>(data_), 0xff, count * sizeof(T));
  }
  Poisoned(const Poisoned&) = delete;
  ~Poisoned() { ::operator delete(data_, std::align_val_t(16)); }
  T* data() { return data_; }

 private:
  T* data_;
};

template <typename Registers>
class HostBlock {
 public:
  explicit HostBlock(Order order) : registers_(kThreads), order_(order), threads_(kThreads) {
    std::iota(threads_.begin(), threads_.end(), 0);
    if (order == Order::reversed) std::reverse(threads_.begin(), threads_.end());
  }

  template <typename Step>
  void step(const Step& run) {
    if (order_ == Order::shuffled) std::shuffle(threads_.begin(), threads_.end(), random_);
    for (const int thread : threads_) run(thread, registers_.data()[thread]);
  }

  // Adds in the order of the device's shuffles, so that the result is the device's, bit for bit.
  template <int kLanes, typename Select>
  void warp_sum(const Select& select) {
    using Value = std::decay_t<decltype(select(*registers_.data()))>;
    std::vector<Value> before(kThreads);
    for (int distance = kLanes / 2; distance > 0; distance /= 2) {
      for (int t = 0; t < kThreads; ++t) before[t] = select(registers_.data()[t]);
      for (int t = 0; t < kThreads; ++t) select(registers_.data()[t]) = before[t] + before[t ^ distance];
    }
  }

 private:
  Poisoned<Registers> registers_;
  Order order_;
  std::vector<int> threads_;
  std::mt19937 random_{7};
};

}  // namespace engram::cuda
