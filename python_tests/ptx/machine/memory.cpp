#include "memory.h"

#include <algorithm>

namespace ptx {

DeviceMemory device_memory;
Undefined undefined_memory;

uint64_t DeviceMemory::map(const void* host, uint64_t bytes, const std::string& name) {
  constexpr uint64_t kNumbers = 1ull << (61 - kWindowBits), kAlignment = 256;
  const uint64_t number = first_ + maps_.size();
  if (number >= kNumbers || bytes > kWindow / 2) return 0;
  // In the middle of its window, so that addresses before it are its own too.
  const uint64_t address =
      (number << kWindowBits) + kWindow / 4 + reinterpret_cast<uint64_t>(host) % kAlignment;
  maps_.push_back({static_cast<unsigned char*>(const_cast<void*>(host)), address, bytes, name, true});
  ++live_;
  return address;
}

void DeviceMemory::unmap(uint64_t address) {
  const uint64_t index = (address >> kWindowBits) - first_;
  if (index >= maps_.size() || !maps_[index].live || maps_[index].address != address) return;
  maps_[index].live = false;
  if (--live_ == 0) {
    first_ += maps_.size();
    maps_.clear();
  }
}

void Undefined::set(const void* host, uint64_t bytes, bool undefined) {
  uint64_t at = reinterpret_cast<uint64_t>(host);
  const uint64_t end = at + bytes;
  while (at < end) {
    const uint64_t number = at / kPage, stop = std::min(end, (number + 1) * kPage);
    const auto found = undefined ? pages_.try_emplace(number).first : pages_.find(number);
    if (found != pages_.end()) {
      for (; at < stop; ++at) found->second[at % kPage] = undefined;
      if (found->second.none()) pages_.erase(found);
    }
    at = stop;
  }
}

int64_t Undefined::first(const void* host, uint64_t bytes) const {
  const uint64_t begin = reinterpret_cast<uint64_t>(host), end = begin + bytes;
  for (uint64_t at = begin; at < end;) {
    const uint64_t stop = std::min(end, (at / kPage + 1) * kPage);
    const auto found = pages_.find(at / kPage);
    if (found != pages_.end())
      for (uint64_t b = at; b < stop; ++b)
        if (found->second[b % kPage]) return b - begin;
    at = stop;
  }
  return -1;
}

}  // namespace ptx
