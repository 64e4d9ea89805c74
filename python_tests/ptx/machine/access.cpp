// Memory as lanes see it: bounds, alignment, definedness, races, and the order that fences make.
#include <algorithm>
#include <bit>

#include "machine.h"
#include "memory.h"

namespace ptx {

namespace {

std::string bytes_at(int bytes, const std::string& where) {
  return std::to_string(bytes) + " bytes at " + where;
}

std::string place(uint64_t address, Space space) {
  if (space == Space::shared) return "byte " + std::to_string(address) + " of shared memory";
  const DeviceMemory::Map* map = device_memory.find(address);
  if (!map) return hexadecimal(address) + ", where no memory is";
  const int64_t offset = address - map->address;
  std::string text =
      "byte " + std::to_string(offset) + " of " + map->name + ", which has " + std::to_string(map->bytes);
  return map->live ? text : text + " and was freed";
}

template <class F>
void reporting_races(Warp& w, int lane, bool write, uint64_t address, Space space, F f) {
  try {
    f();
  } catch (const Race& race) {
    fault(w, lane,
          std::string("race: a ") + (write ? "write" : "read") + " of " + place(address, space) +
              " in no order with a " + race.kind + " of block " + std::to_string(race.block) + ", thread " +
              std::to_string(race.thread) + "\n  by " + described(w.kernel->code[race.instruction]));
  }
}

unsigned char* shared_access(Warp& w, int lane, uint64_t address, int bytes, bool write,
                             const unsigned char* value, bool* wins) {
  Block& b = *w.block;
  if (address > b.shared.size() || bytes > int64_t(b.shared.size() - address))
    fault(w, lane,
          std::string(write ? "write" : "read") +
              " out of bounds: " + bytes_at(bytes, place(address, Space::shared)) + ", which has " +
              std::to_string(b.shared.size()));
  ByteState* state = &b.state[address];
  if (write)
    std::fill_n(state, bytes, ByteState::defined);
  else if (options.definedness)
    for (int j = 0; j < bytes; ++j)
      if (state[j] != ByteState::defined)
        fault(
            w, lane,
            std::string("read of ") +
                (state[j] == ByteState::arriving ? "what a cp.async is still writing" : "undefined memory") +
                ": " + place(address + j, Space::shared));
  unsigned char* p = &b.shared[address];
  if (options.races)
    reporting_races(w, lane, write, address, Space::shared, [&] {
      const bool won = b.shadow.access(w, lane, address, bytes, write, p, value);
      if (wins) *wins = won;
    });
  return p;
}

unsigned char* global_access(Warp& w, int lane, uint64_t address, int bytes, bool write,
                             const unsigned char* value, bool* wins) {
  unsigned char* p = device_memory.host(address, bytes);
  if (!p)
    fault(w, lane,
          std::string(write ? "write" : "read") +
              " out of bounds: " + bytes_at(bytes, place(address, Space::global)));
  if (!undefined_memory.empty()) {
    const int64_t first = undefined_memory.first(p, bytes);
    if (!write && first >= 0 && options.definedness)
      fault(w, lane, "read of undefined memory: " + place(address + first, Space::global));
    if (write && first >= 0) undefined_memory.set(p, bytes, false);
  }
  if (options.races)
    reporting_races(w, lane, write, address, Space::global, [&] {
      const bool won =
          w.block->machine->shadow.access(w, lane, reinterpret_cast<uint64_t>(p), bytes, write, p, value);
      if (wins) *wins = won;
    });
  return p;
}

// Bytes from an aligned address on, in pieces that are aligned too.
template <class F>
void each_piece(int bytes, F f) {
  for (int at = 0, size; at < bytes; at += size) {
    size = std::bit_floor(unsigned(bytes - at));
    f(at, size);
  }
}

}  // namespace

unsigned char* access(Warp& w, int lane, uint64_t address, int bytes, Space space, bool write,
                      const unsigned char* value, bool* wins) {
  if (space == Space::parameter || address >= kParameterWindow) {
    const uint64_t offset = address & ~kParameterWindow;
    if (write || offset + bytes > uint64_t(w.kernel->parameter_bytes) || offset % bytes)
      fault(w, lane, "parameter access out of bounds: " + bytes_at(bytes, std::to_string(offset)));
    return const_cast<unsigned char*>(w.block->machine->launch.parameters) + offset;
  }
  if (space == Space::generic && address >= kSharedWindow) {
    space = Space::shared;
    address -= kSharedWindow;
  }
  if (address % bytes)
    fault(w, lane,
          "misaligned " + std::string(write ? "write: " : "read: ") + bytes_at(bytes, place(address, space)));
  return space == Space::shared ? shared_access(w, lane, address, bytes, write, value, wins)
                                : global_access(w, lane, address, bytes, write, value, wins);
}

// A copy may read and write at any time from now to its wait, and so is checked for races at both ends.
void start_copy(Warp& w, int lane, const AsyncCopy& c) {
  if (c.bytes > c.size) fault(w, lane, "a cp.async that reads more than it writes");
  if (c.to % c.size || (c.bytes && c.from % c.size)) fault(w, lane, "misaligned cp.async");
  each_piece(c.bytes, [&](int at, int size) { access(w, lane, c.from + at, size, Space::global, false); });
  access(w, lane, c.to, c.size, Space::shared, true);
  std::fill_n(&w.block->state[c.to], c.size, ByteState::arriving);
}

void finish_copy(Warp& w, int lane, const AsyncCopy& c) {
  const Instruction* const now = w.now;
  w.now = c.instruction;
  unsigned char value[16] = {};
  each_piece(c.bytes, [&](int at, int size) {
    memcpy(value + at, access(w, lane, c.from + at, size, Space::global, false), size);
  });
  memcpy(access(w, lane, c.to, c.size, Space::shared, true), value, c.size);
  w.now = now;
}

void fence(Warp& w, int lane) {
  w.fenced[lane] = w.block->clock;
  order_after(w, lane);
}

void order_after(Warp& w, int lane) {
  const auto found = w.acquired.find(lane);
  if (found == w.acquired.end()) return;
  auto& pending = w.block->pending;
  pending.resize(std::max(pending.size(), found->second.size()));
  for (size_t j = 0; j < found->second.size(); ++j) pending[j] = std::max(pending[j], found->second[j]);
  w.acquired.erase(found);
}

void release(Warp& w, int lane, uint64_t address, bool replaces) {
  const Block& b = *w.block;
  if (replaces) b.machine->released.erase(address);
  if (!options.races || w.fenced[lane] != b.clock) return;
  auto& clocks = b.machine->released[address];
  clocks.resize(b.machine->blocks_total);
  for (size_t j = 0; j < b.seen.size(); ++j) clocks[j] = std::max(clocks[j], b.seen[j]);
  clocks[b.index] = std::max(clocks[b.index], b.clock - 1);
}

void acquire(Warp& w, int lane, uint64_t address) {
  if (!options.races) return;
  const auto& released = w.block->machine->released;
  const auto found = released.find(address);
  if (found == released.end()) return;
  auto& clocks = w.acquired[lane];
  clocks.resize(found->second.size());
  for (size_t j = 0; j < clocks.size(); ++j) clocks[j] = std::max(clocks[j], found->second[j]);
}

}  // namespace ptx
