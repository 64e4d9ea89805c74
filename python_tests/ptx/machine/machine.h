// One launch: blocks of warps, their registers and shared memory, and in which order they run.
#pragma once

#include <array>
#include <cstring>
#include <deque>
#include <map>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "options.h"
#include "ptx.h"
#include "shadow.h"

namespace ptx {

struct Block;
struct Machine;

// Lanes of a warp that are at one instruction.
struct Fragment {
  enum class State : uint8_t { running, at_barrier, waiting };  // waiting: for lanes of their mask
  int at = 0;
  uint32_t lanes = 0;
  State state = State::running;
};

// A copy from global to shared memory that has been started.
struct AsyncCopy {
  uint64_t from, to;
  int bytes, size;  // read, and written: the rest is zeros
  const Instruction* instruction;
};

// Lanes in which the halves of a register are defined.
struct Defined {
  uint32_t low = 0, high = 0;
  uint32_t both() const { return low & high; }
};

struct Warp {
  Block* block = nullptr;
  const Kernel* kernel = nullptr;
  const Instruction* now = nullptr;  // the instruction that runs
  int index = 0;
  uint32_t alive = 0, sync = 0;
  std::vector<Fragment> fragments;
  std::unique_ptr<unsigned char[]> registers;
  std::vector<Defined> defined;                       // of each register
  std::map<int, std::array<uint8_t, kLanes>> partly;  // bytes that are defined where a register is not wholly
  std::deque<std::vector<AsyncCopy>> copies[kLanes];  // groups of a lane; the last one is open
  uint32_t fenced[kLanes] = {};                       // the block's clock at a lane's last fence
  std::map<int, std::vector<uint32_t>> acquired;      // what a lane has seen of other blocks, before a fence

  template <class T>
  const T* in(const Operand& o) const {
    const auto* base = o.kind == Operand::Kind::reg
                           ? registers.get()
                           : reinterpret_cast<const unsigned char*>(kernel->constants.data());
    return reinterpret_cast<const T*>(base + o.at);
  }
  template <class T>
  T* out(const Operand& o) {
    alignas(64) static unsigned char nowhere[kLanes * 8];
    return reinterpret_cast<T*>(o.kind == Operand::Kind::reg ? registers.get() + o.at : nowhere);
  }
  uint64_t value(const Operand& o, int lane) const;
  void set(const Operand& o, int lane, uint64_t value);
  uint64_t address(const Operand& o, int lane) const;
  int thread(int lane) const { return index * kLanes + lane; }
};

// Lanes in which an operand is not wholly defined; and sets that.
uint32_t undefined_lanes(const Warp& w, const Operand& o);
void define(Warp& w, const Operand& o, uint32_t lanes, uint32_t bad_low, uint32_t bad_high);
// Raises where an operand of an instruction is undefined in one of the lanes.
void require_defined(Warp& w, const Instruction& i, size_t operand, uint32_t lanes);

enum class ByteState : uint8_t { undefined, defined, arriving };  // arriving: by a cp.async

struct Block {
  Machine* machine = nullptr;
  uint32_t index = 0, position[3] = {};
  uint32_t clock = 1;
  std::vector<Warp> warps;
  std::vector<unsigned char> shared;
  std::vector<ByteState> state;
  Shadow shadow;
  // Clocks of other blocks: all before them happens before what this block does now, or after its next
  // barrier.
  std::vector<uint32_t> seen, pending;
  uint32_t seen_of(uint32_t block) const { return block < seen.size() ? seen[block] : 0; }
};

struct Launch {
  uint32_t grid[3], block[3];
  int64_t dynamic_shared;
  const unsigned char* parameters;
  bool cooperative;
  int64_t shared_allowed;
};

struct Machine {
  Machine(const Kernel& kernel, const Launch& launch);
  void run();
  uint64_t random() { return generator(); }
  bool chance(double share) { return share > 0 && double(generator() >> 11) * 0x1p-53 < share; }

  const Kernel& kernel;
  const Launch& launch;
  uint32_t threads, blocks_total;
  std::mt19937_64 generator;
  std::vector<std::unique_ptr<Block>> resident, spare;  // spare: ended blocks, whose memory serves others
  Shadow shadow;                                        // of global memory
  std::map<uint64_t, std::vector<uint32_t>> released;   // by the address of an atomic: clocks of blocks

 private:
  void start_block(uint32_t index);
  void start_warp(Block& block, Warp& warp);
  void end_block(size_t which);
};

// Runs up to `most` instructions of a warp that is not waiting.
void run_warp(Warp& warp, int most);
bool is_ready(const Warp& warp);

// Checks the limits of the device and runs a kernel to its end.
void launch(const Kernel& kernel, const Module& module, const Launch& launch);
bool serves(const Module& module);
int occupancy(const Kernel& kernel, int threads, int64_t dynamic_shared);

[[noreturn]] void fault(const Warp& warp, int lane, const std::string& what);
std::string described(const Instruction& instruction);  // its line and text
std::string hexadecimal(uint64_t value);
std::string short_name(const std::string& kernel);

// -- Memory as lanes see it
// ----------------------------------------------------------------------------------

// Checks bounds, alignment, definedness and races of a lane's access; returns where the bytes are. `wins`:
// for a write, whether it is to take effect.
unsigned char* access(Warp& warp, int lane, uint64_t address, int bytes, Space space, bool write,
                      const unsigned char* value = nullptr, bool* wins = nullptr);
void start_copy(Warp& warp, int lane, const AsyncCopy& copy);
void finish_copy(Warp& warp, int lane, const AsyncCopy& copy);
// The order that fences and atomics make between blocks: a fence and then an atomic release what the block
// did before its last barrier; an atomic or volatile read and then a fence acquire it for the block, from its
// next barrier on. That is less than PTX promises: what a thread does between its block's barriers and its
// fences is taken to be in no order.
void fence(Warp& warp, int lane);
// What a lane has acquired, for its block, from its next barrier on.
void order_after(Warp& warp, int lane);
void release(Warp& warp, int lane, uint64_t address, bool replaces);
void acquire(Warp& warp, int lane, uint64_t address);

}  // namespace ptx
