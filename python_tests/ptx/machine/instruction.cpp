#include "instruction.h"

#include <cctype>
#include <cstdlib>
#include <cstring>

namespace ptx {

void InstructionReader::read(const Statement& s) {
  try {
    if (s.text.back() == ':') {
      labels_[s.text.substr(0, s.text.size() - 1)] = kernel_.code.size();
    } else if (starts_with(s.text, ".reg")) {
      registers(s.text.substr(4));
    } else if (starts_with(s.text, ".loc") && isspace(s.text[4])) {
      const std::vector<std::string> words = split(with_single_spaces(s.text), ' ');
      if (words.at(2) != "0") source_ = words[1] + ":" + words[2];  // 0: the compiler's own
    } else if (s.text[0] != '.') {
      instruction(s);
    } else if (!starts_with(s.text, ".shared") && !starts_with(s.text, ".pragma")) {
      throw Error("a directive that is not known");
    }
  } catch (const Error& error) {
    throw Error("PTX line " + std::to_string(s.line) + ": " + error.what() + ": " + trimmed(s.text));
  }
}

void InstructionReader::finish() {
  for (const auto& [index, label] : branches_) {
    Instruction& i = kernel_.code[index];
    const auto found = labels_.find(label);
    if (found == labels_.end())
      throw Error("PTX line " + std::to_string(i.line) + ": no label " + label + ": " + i.text);
    i.target = found->second;
  }
  Instruction end;
  end.role = Role::exit;
  end.text = "(end)";
  kernel_.code.push_back(end);
}

// "%rd<9>" declares %rd0 to %rd8. A name that is declared again, in an inner block, is another register.
void InstructionReader::registers(const std::string& text) {
  const std::vector<std::string> words = split(with_single_spaces(text), ' ');
  const Type type = type_of(words.at(0).substr(1));
  if (type == Type::none) throw Error("registers of a type that is not known");
  for (const std::string& name : split(trimmed(text).substr(words[0].size()), ',')) {
    const size_t bracket = name.find('<');
    if (bracket == std::string::npos) {
      registers_[name] = kernel_.add_register(bytes_of(type));
    } else {
      const int count = atoi(name.c_str() + bracket + 1);
      for (int j = 0; j < count; ++j)
        registers_[name.substr(0, bracket) + std::to_string(j)] = kernel_.add_register(bytes_of(type));
    }
  }
}

void InstructionReader::instruction(const Statement& statement) {
  Instruction i;
  i.text = statement.text;
  i.line = statement.line;
  i.source = source_;
  std::string text = statement.text;
  if (text[0] == '@') {
    i.predicated = true;
    i.negated = text[1] == '!';
    const size_t begin = i.negated ? 2 : 1, end = text.find(' ');
    i.predicate = operand(text.substr(begin, end - begin));
    text = trimmed(text.substr(end));
  }
  const size_t end = std::min(text.find(' '), text.size());
  const std::string opcode = text.substr(0, end);
  const std::vector<std::string> arguments = split(text.substr(end), ',');
  if (opcode == "bra" || opcode == "bra.uni") {
    i.role = Role::branch;
    branches_.push_back({kernel_.code.size(), arguments.at(0)});
  } else {
    for (const std::string& argument : arguments) {
      operands(i, argument);
      if (i.outputs == 0) i.outputs = i.operand.size();  // the first argument is written, mostly
    }
    bind(kernel_, i, opcode);
  }
  kernel_.code.push_back(std::move(i));
}

void InstructionReader::operands(Instruction& i, const std::string& text) {
  const size_t bar = text.find('|');
  if (text[0] == '{') {
    for (const std::string& part : split(text.substr(1, text.size() - 2), ','))
      i.operand.push_back(operand(part));
  } else if (text[0] == '[') {
    i.operand.push_back(address(trimmed(text.substr(1, text.size() - 2))));
  } else if (bar != std::string::npos) {
    i.operand.push_back(operand(trimmed(text.substr(0, bar))));
    i.operand.push_back(operand(trimmed(text.substr(bar + 1))));
  } else {
    i.operand.push_back(operand(text));
  }
}

Operand InstructionReader::operand(const std::string& text) {
  Operand o;
  if (text == "_") return o;
  if (text[0] == '%' || registers_.count(text)) {
    o.kind = Operand::Kind::reg;
    o.reg = register_of(text);
    o.at = kernel_.register_at[o.reg];
    o.bytes = kernel_.register_width[o.reg];
    return o;
  }
  o.kind = Operand::Kind::constant;
  char* end = nullptr;
  if (text.size() >= 10 && text[0] == '0' && strchr("fFdD", text[1])) {
    o.value = strtoull(text.c_str() + 2, &end, 16);
  } else if (isdigit(text[0]) || text[0] == '-') {
    o.value = text[0] == '-' ? strtoll(text.c_str(), &end, 0) : int64_t(strtoull(text.c_str(), &end, 0));
    if (*end == 'U') ++end;
  } else {
    const auto found = symbols.find(text);
    if (found == symbols.end()) throw Error("an operand that is not known, " + text);
    o.value = found->second;
    return o;
  }
  if (*end) throw Error("an operand that is not known, " + text);
  return o;
}

Operand InstructionReader::address(const std::string& text) {
  const size_t plus = text.rfind('+');
  const int64_t displacement =
      plus == std::string::npos ? 0 : atoll(text.c_str() + plus + 1 + (text[plus + 1] == ' '));
  Operand o = operand(trimmed(text.substr(0, plus)));
  o.address = true;
  o.value += displacement;
  if (o.kind == Operand::Kind::constant) {
    o.bytes = 8;
    o.at = kernel_.constant(o.value, 8);
  }
  return o;
}

int InstructionReader::register_of(const std::string& name) {
  const auto found = registers_.find(name);
  if (found != registers_.end()) return found->second;
  static const char* const specials[] = {"%tid.x",    "%tid.y",    "%tid.z",   "%ntid.x",  "%ntid.y",
                                         "%ntid.z",   "%ctaid.x",  "%ctaid.y", "%ctaid.z", "%nctaid.x",
                                         "%nctaid.y", "%nctaid.z", "%laneid"};
  for (const char* special : specials)
    if (name == special) {
      const int reg = kernel_.add_register(4);
      kernel_.specials.push_back({name, reg});
      return registers_[name] = reg;
    }
  throw Error("a register that is not known, " + name);
}

}  // namespace ptx
