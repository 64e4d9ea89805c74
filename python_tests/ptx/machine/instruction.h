// Reads the statements of a kernel's body.
#pragma once

#include <map>
#include <string>
#include <utility>
#include <vector>

#include "ptx.h"
#include "text.h"

namespace ptx {

class InstructionReader {
 public:
  explicit InstructionReader(Kernel& kernel) : kernel_(kernel) {}
  void read(const Statement& statement);
  void finish();  // after the last one: branches get their targets

  std::map<std::string, uint64_t> symbols;  // addresses of variables and parameters

 private:
  void registers(const std::string& text);
  void instruction(const Statement& statement);
  void operands(Instruction& i, const std::string& text);
  Operand operand(const std::string& text);
  Operand address(const std::string& text);
  int register_of(const std::string& name);

  Kernel& kernel_;
  std::map<std::string, int> registers_, labels_;
  std::vector<std::pair<size_t, std::string>> branches_;
  std::string source_;
};

}  // namespace ptx
