#include "text.h"

#include <cctype>
#include <cstring>

#include "ptx.h"

namespace ptx {

std::string without_comments(std::string text) {
  for (size_t i = 0; i + 1 < text.size(); ++i) {
    size_t end = i;
    if (text[i] == '"') {
      i = std::min(text.find('"', i + 1), text.size());
      continue;
    }
    if (text.compare(i, 2, "//") == 0) end = std::min(text.find('\n', i), text.size());
    if (text.compare(i, 2, "/*") == 0) end = std::min(text.find("*/", i) + 2, text.size());
    for (; i < end; ++i)
      if (text[i] != '\n') text[i] = ' ';
  }
  return text;
}

std::string trimmed(const std::string& text) {
  const size_t begin = text.find_first_not_of(" \t\r\n");
  return begin == std::string::npos ? "" : text.substr(begin, text.find_last_not_of(" \t\r\n") - begin + 1);
}

std::string with_single_spaces(const std::string& text) {
  std::string out;
  for (const char c : text)
    if (!isspace(c))
      out += c;
    else if (!out.empty() && out.back() != ' ')
      out += ' ';
  return trimmed(out);
}

std::vector<std::string> split(const std::string& text, char by) {
  std::vector<std::string> parts(1);
  int depth = 0;
  for (const char c : text) {
    depth += (strchr("{[(", c) != nullptr) - (strchr("}])", c) != nullptr);
    if (c == by && depth == 0)
      parts.emplace_back();
    else
      parts.back() += c;
  }
  for (std::string& part : parts) part = trimmed(part);
  if (parts.back().empty()) parts.pop_back();
  return parts;
}

bool starts_with(const std::string& text, const char* beginning) { return text.rfind(beginning, 0) == 0; }

void Cursor::step() { line_ += text_[at_++] == '\n'; }

void Cursor::skip_space() {
  while (at_ < text_.size() && isspace(text_[at_])) step();
}

bool Cursor::at_end() {
  skip_space();
  return at_ >= text_.size();
}

bool Cursor::take(char c) {
  if (peek() != c) return false;
  step();
  return true;
}

std::string Cursor::until(const char* any) {
  std::string out;
  for (; at_ < text_.size() && !strchr(any, text_[at_]); step()) out += text_[at_];
  return out;
}

std::string Cursor::word() { return until(" \t\r\n({[;"); }

std::string Cursor::statement() {
  std::string out = until(";");
  if (!take(';')) throw Error("PTX line " + std::to_string(line_) + ": a statement does not end");
  return out;
}

std::string Cursor::brackets() {
  std::string out;
  int depth = 0;
  do {
    if (at_ >= text_.size()) throw Error("PTX line " + std::to_string(line_) + ": a bracket is not closed");
    depth += (strchr("{[(", peek()) != nullptr) - (strchr("}])", peek()) != nullptr);
    out += peek();
    step();
  } while (depth > 0);
  return out.substr(1, out.size() - 2);
}

std::string Cursor::label() {
  size_t end = at_;
  while (end < text_.size() && (isalnum(text_[end]) || strchr("_$%", text_[end]))) ++end;
  if (end == at_ || end >= text_.size() || text_[end] != ':') return "";
  std::string name = text_.substr(at_, end - at_);
  while (at_ <= end) step();
  return name;
}

}  // namespace ptx
