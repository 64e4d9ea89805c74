// Pieces of PTX text.
#pragma once

#include <string>
#include <vector>

namespace ptx {

struct Statement {
  std::string text;
  int line;
};

// The text with every comment as blanks, so that lines keep their numbers.
std::string without_comments(std::string text);
std::string trimmed(const std::string& text);
std::string with_single_spaces(const std::string& text);
// The parts of a list, divided where no bracket is open.
std::vector<std::string> split(const std::string& text, char by);
bool starts_with(const std::string& text, const char* beginning);

// Reads a module from its beginning to its end.
class Cursor {
 public:
  explicit Cursor(const std::string& text) : text_(text) {}
  void skip_space();
  bool at_end();
  char peek() const { return at_ < text_.size() ? text_[at_] : '\0'; }
  bool take(char c);
  std::string word();                  // up to a blank, a bracket or a semicolon
  std::string until(const char* any);  // up to one of these characters, which stays
  std::string statement();             // up to a semicolon, which goes
  std::string brackets();              // what stands between the bracket here and its closing one
  std::string label();                 // a name before a colon, both of which go; else nothing
  int line() const { return line_; }

 private:
  void step();
  const std::string& text_;
  size_t at_ = 0;
  int line_ = 1;
};

}  // namespace ptx
