// Memory of the host that is lent to the device, at addresses far apart.
#pragma once

#include <bitset>
#include <cstdint>
#include <string>
#include <unordered_map>
#include <vector>

namespace ptx {

class DeviceMemory {
 public:
  static constexpr int kWindowBits = 38;
  static constexpr uint64_t kWindow = 1ull << kWindowBits;

  struct Map {
    unsigned char* host = nullptr;
    uint64_t address = 0, bytes = 0;
    std::string name;
    bool live = false;
  };

  uint64_t map(const void* host, uint64_t bytes, const std::string& name);
  void unmap(uint64_t address);
  // The map that an address belongs to, which may lie outside of its bytes, or null.
  const Map* find(uint64_t address) const {
    const uint64_t number = (address >> kWindowBits) - first_;
    return number < maps_.size() ? &maps_[number] : nullptr;
  }
  unsigned char* host(uint64_t address, uint64_t bytes) const {
    const Map* map = find(address);
    if (!map || !map->live || address < map->address || address - map->address > map->bytes ||
        bytes > map->bytes - (address - map->address))
      return nullptr;
    return map->host + (address - map->address);
  }

 private:
  std::vector<Map> maps_;
  uint64_t first_ = 1;  // number of maps_[0]; numbers are used once
  size_t live_ = 0;
};

// Bytes of the host that nobody has written.
class Undefined {
 public:
  void set(const void* host, uint64_t bytes, bool undefined);
  int64_t first(const void* host, uint64_t bytes) const;  // its offset, or -1
  bool empty() const { return pages_.empty(); }
  void clear() { pages_.clear(); }

 private:
  static constexpr uint64_t kPage = 1024;
  std::unordered_map<uint64_t, std::bitset<kPage>> pages_;
};

extern DeviceMemory device_memory;
extern Undefined undefined_memory;

}  // namespace ptx
