#include <algorithm>

#include "opcode.h"
#include "text.h"

namespace ptx {

namespace {

const std::map<std::string, Type> kTypes = {
    {"pred", Type::pred},     {"b8", Type::b8},     {"s8", Type::s8},       {"u8", Type::u8},
    {"b16", Type::b16},       {"s16", Type::s16},   {"u16", Type::u16},     {"f16", Type::f16},
    {"bf16", Type::bf16},     {"b32", Type::b32},   {"s32", Type::s32},     {"u32", Type::u32},
    {"f32", Type::f32},       {"tf32", Type::tf32}, {"f16x2", Type::f16x2}, {"b64", Type::b64},
    {"bf16x2", Type::bf16x2}, {"s64", Type::s64},   {"u64", Type::u64},     {"f64", Type::f64},
    {"f32x2", Type::f32x2}};

}  // namespace

Type type_of(const std::string& name) {
  const auto found = kTypes.find(name);
  return found == kTypes.end() ? Type::none : found->second;
}

int bytes_of(Type type) {
  switch (type) {
    case Type::none:
    case Type::pred:
    case Type::b8:
    case Type::s8:
    case Type::u8:
      return 1;
    case Type::b16:
    case Type::s16:
    case Type::u16:
    case Type::f16:
    case Type::bf16:
      return 2;
    case Type::b64:
    case Type::s64:
    case Type::u64:
    case Type::f64:
    case Type::f32x2:
      return 8;
    default:
      return 4;
  }
}

int Kernel::add_register(int bytes) {
  constexpr int kLine = 64;
  register_at.push_back(register_bytes);
  register_width.push_back(bytes);
  register_bytes += (bytes * kLanes + kLine - 1) / kLine * kLine;
  return register_at.size() - 1;
}

uint32_t Kernel::constant(uint64_t value, int bytes) {
  const auto [found, added] = constant_at.try_emplace({value, bytes}, constants.size() * sizeof(uint64_t));
  if (added) {
    constants.resize(constants.size() + kLanes * bytes / sizeof(uint64_t));
    auto* to = reinterpret_cast<unsigned char*>(constants.data()) + found->second;
    for (int l = 0; l < kLanes; ++l) memcpy(to + l * bytes, &value, bytes);
  }
  return found->second;
}

Opcode::Opcode(const std::string& text) : left_(split(text, '.')) {
  name = left_.at(0);
  left_.erase(left_.begin());
  // "cp.async.shared::cta" says what "cp.async.shared" means.
  for (std::string& part : left_)
    if (part == "shared::cta") part = "shared";
  std::erase_if(left_, [this](const std::string& part) {
    const Type type = type_of(part);
    if (type != Type::none) types_.push_back(type);
    return type != Type::none;
  });
}

bool Opcode::take(const std::string& modifier) {
  const auto found = std::find(left_.begin(), left_.end(), modifier);
  if (found == left_.end()) return false;
  left_.erase(found);
  return true;
}

std::string Opcode::take_one_of(std::initializer_list<const char*> modifiers) {
  for (const char* modifier : modifiers)
    if (take(modifier)) return modifier;
  return "";
}

void Opcode::finish() const {
  if (!left_.empty()) throw Error("a modifier that is not known, ." + left_[0]);
}

void shape(Kernel& kernel, Instruction& i, const std::vector<int>& bytes) {
  if (i.operand.size() != bytes.size())
    throw Error(std::to_string(i.operand.size()) + " operands where " + std::to_string(bytes.size()) +
                " are expected");
  for (size_t j = 0; j < bytes.size(); ++j) {
    Operand& o = i.operand[j];
    if (o.kind == Operand::Kind::constant && !o.address) {
      if (j < i.outputs) throw Error("a constant cannot be written");
      if (i.type == Type::pred) o.value &= 1;  // -1 is true
      o.bytes = bytes[j] ? bytes[j] : 8;
      o.at = kernel.constant(o.value, o.bytes);
    } else if (o.kind == Operand::Kind::reg && bytes[j] && o.bytes != bytes[j]) {
      throw Error("operand " + std::to_string(j) + " has " + std::to_string(o.bytes) + " bytes, not " +
                  std::to_string(bytes[j]));
    } else if (o.kind == Operand::Kind::nowhere && j >= i.outputs) {
      throw Error("_ cannot be read");
    }
  }
}

void bind(Kernel& kernel, Instruction& i, const std::string& text) {
  Opcode opcode(text);
  i.type = i.source_type = opcode.type();
  if (i.type == Type::f32x2) i.parts = Instruction::Parts::each;
  if (opcode.type(1) != Type::none) i.source_type = opcode.type(1);
  for (const auto group : {bind_arithmetic, bind_approximate, bind_bits, bind_compare, bind_convert,
                           bind_memory, bind_warp, bind_matrix})
    if (group(kernel, i, opcode)) {
      opcode.finish();
      if (!i.run) throw Error("a type that is not known for this opcode");
      return;
    }
  throw Error("an opcode that is not known, " + text);
}

}  // namespace ptx
