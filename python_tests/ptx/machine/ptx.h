// What the parser makes of PTX: modules of kernels of instructions.
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

namespace ptx {

inline constexpr int kLanes = 32;

// A fault of a kernel, a refused launch or unknown PTX.
struct Error : std::runtime_error {
  using std::runtime_error::runtime_error;
};

enum class Type : uint8_t {
  none,
  pred,
  b8,
  s8,
  u8,
  b16,
  s16,
  u16,
  f16,
  bf16,
  b32,
  s32,
  u32,
  f32,
  f16x2,
  bf16x2,
  tf32,
  b64,
  s64,
  u64,
  f64,
  f32x2
};
int bytes_of(Type type);
Type type_of(const std::string& name);  // Type::none where it is not one
inline bool is_signed(Type t) { return t == Type::s8 || t == Type::s16 || t == Type::s32 || t == Type::s64; }
inline bool is_float(Type t) {
  return t == Type::f16 || t == Type::bf16 || t == Type::f32 || t == Type::f64 || t == Type::tf32;
}

enum class Space : uint8_t { generic, global, shared, parameter };
// Where these begin in the generic address space. Global addresses are their own generic ones.
inline constexpr uint64_t kSharedWindow = 1ull << 62, kParameterWindow = 1ull << 63;

struct Operand {
  enum class Kind : uint8_t { reg, constant, nowhere };
  Kind kind = Kind::nowhere;
  uint8_t bytes = 0;  // of a lane
  bool address = false;
  int reg = -1;
  uint32_t at = 0;    // byte at which its lanes begin, among the registers or the kernel's constants
  int64_t value = 0;  // of a constant; of an address in a register what is added to it
};

// What the scheduler must know of an instruction before it runs it.
enum class Role : uint8_t {
  plain,
  branch,
  exit,
  barrier,   // waits for all threads of the block
  together,  // needs the lanes of its mask, or of the warp, at one time
};

struct Warp;
struct Instruction;
using Handler = void (*)(Warp&, const Instruction&, uint32_t lanes);

struct Instruction {
  Handler run = nullptr;
  Role role = Role::plain;
  bool predicated = false, negated = false;
  bool selects = false;  // selp: what is not selected may be undefined
  // Which parts of a register are defined matters: it is made of two halves, divided into two, or taken by
  // halves; its bytes are permuted or masked; lanes take each other's.
  enum class Parts : uint8_t { none, pack, unpack, each, low, permute, mask, shuffle } parts = Parts::none;
  bool uses = false;  // what it takes leaves the registers, and must be defined
  bool atomic = false, releases = false, acquires = false, trans = false, flush = false;
  Space space = Space::generic;
  Type type = Type::none, source_type = Type::none;
  uint8_t outputs = 0;  // the first so many operands are written
  uint8_t vector = 1;
  int8_t mask = -1;  // the operand with the mask of lanes; none: all of the warp
  int variant = 0;   // what the handler makes of it
  int target = -1;   // of a branch
  int line = 0;
  std::vector<Operand> operand;
  Operand predicate;
  std::string text, source;  // source: file:line, where the PTX says it
  mutable uint64_t runs = 0;
};

struct Kernel {
  std::string name;
  std::vector<Instruction> code;
  std::vector<std::pair<int, int>> parameters;  // offset, size
  int parameter_bytes = 0, shared_bytes = 0;
  int threads = 1024;  // at most, or exactly
  bool exact_threads = false, dynamic_shared = false;
  std::vector<int> register_at, register_width;  // of each register, byte at which its lanes begin; of a lane
  int register_bytes = 0;
  std::vector<uint64_t> constants;                           // their lanes
  std::map<std::pair<uint64_t, int>, uint32_t> constant_at;  // value and bytes of a lane
  struct Special {
    std::string name;
    int reg;
  };
  std::vector<Special> specials;  // %tid.x and the like, which are registers that the launch fills

  int add_register(int bytes);
  uint32_t constant(uint64_t value, int bytes);
};

struct Module {
  std::map<std::string, std::unique_ptr<Kernel>> kernels;
  std::vector<std::unique_ptr<std::vector<unsigned char>>> variables;
  std::vector<uint64_t> mapped;  // device addresses of the variables
  int architecture = 0;
  bool only = false;  // sm_90a: for this architecture and no later one
  ~Module();
};

std::unique_ptr<Module> parse(const std::string& text);
// Chooses the handler for an opcode, and checks its operands against it.
void bind(Kernel& kernel, Instruction& instruction, const std::string& opcode);
// Lets sums take the products that the assembler may fuse them with.
void fuse(Kernel& kernel);

}  // namespace ptx
