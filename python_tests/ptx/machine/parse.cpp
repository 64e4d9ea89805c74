// Modules, kernels and their variables. Instructions are read in instruction.cpp.
#include <cstdlib>
#include <regex>

#include "instruction.h"
#include "memory.h"
#include "text.h"

namespace ptx {

namespace {

uint64_t aligned(uint64_t value, uint64_t to) { return (value + to - 1) / to * to; }

// A variable or a parameter as it is declared: ".align 16 .b8 name[64]".
struct Declaration {
  std::string name;
  Type type = Type::none;
  int64_t bytes = 0, alignment = 0;
  bool sized = true;
  std::vector<std::string> values;
};

Declaration declaration(std::string text) {
  Declaration d;
  const size_t equals = text.find('=');
  if (equals != std::string::npos) {
    std::string values = trimmed(text.substr(equals + 1));
    if (starts_with(values, "{")) values = values.substr(1, values.size() - 2);
    d.values = split(values, ',');
    text.resize(equals);
  }
  static const std::regex pointer(R"(\.ptr(\s*\.(global|shared|const|local))?(\s*\.align\s+\d+)?)");
  static const std::regex form(R"(([A-Za-z_$%][\w$]*)\s*(\[\s*(\d*)\s*\])?\s*$)"),
      align(R"(\.align\s+(\d+))");
  text = trimmed(std::regex_replace(text, pointer, ""));
  std::smatch match;
  if (!std::regex_search(text, match, form)) throw Error("a declaration that is not known: " + text);
  d.name = match[1];
  for (const std::string& word : split(with_single_spaces(match.prefix()), ' '))
    if (starts_with(word, ".") && type_of(word.substr(1)) != Type::none) d.type = type_of(word.substr(1));
  if (d.type == Type::none) throw Error("a declaration without a type: " + text);
  d.sized = !match[2].matched || match[3].length();
  d.bytes = bytes_of(d.type) * (match[2].matched ? d.sized ? atoll(match[3].str().c_str()) : 0 : 1);
  d.alignment = bytes_of(d.type);
  if (std::regex_search(text, match, align)) d.alignment = atoll(match[1].str().c_str());
  return d;
}

class Parser {
 public:
  explicit Parser(const std::string& text) : text_(without_comments(text)), cursor_(text_) {}

  std::unique_ptr<Module> run() {
    try {
      while (!cursor_.at_end()) directive();
    } catch (const Error& error) {
      if (starts_with(error.what(), "PTX line")) throw;
      throw Error("PTX line " + std::to_string(cursor_.line()) + ": " + error.what());
    }
    for (auto& [name, kernel] : module_->kernels)
      for (Instruction& i : kernel->code) name_source(i);
    return std::move(module_);
  }

 private:
  void directive() {
    const std::string word = cursor_.word();
    if (word == ".version" || word == ".address_size") {
      cursor_.until("\n");
    } else if (word == ".file") {
      file(cursor_.until("\n"));
    } else if (word == ".target") {
      target(cursor_.until("\n"));
    } else if (word == ".section") {
      cursor_.until("{");
      cursor_.brackets();
    } else if (word == ".extern" || word == ".shared") {
      const std::string rest = cursor_.statement();
      if (word == ".extern" && !starts_with(trimmed(rest), ".shared")) throw Error(".extern of " + rest);
      module_shared_.push_back(declaration(rest));
    } else if (word == ".global" || word == ".const") {
      variable(declaration(cursor_.statement()));
    } else if (word == ".entry") {
      kernel();
    } else if (word != ".visible" && word != ".weak") {
      throw Error("a directive that is not known: " + word);
    }
  }

  void file(const std::string& text) {
    const size_t quote = text.find('"'), end = text.rfind('"');
    const std::string path = text.substr(quote + 1, end - quote - 1);
    files_[atoi(text.c_str())] = path.substr(path.rfind('/') + 1);
  }

  void target(const std::string& text) {
    std::smatch match;
    if (!std::regex_search(text, match, std::regex(R"(sm_(\d+)([af]?))"))) throw Error("target" + text);
    module_->architecture = atoi(match[1].str().c_str());
    module_->only = match[2].length() > 0;
  }

  void variable(const Declaration& d) {
    auto bytes = std::make_unique<std::vector<unsigned char>>(d.bytes);
    const int each = bytes_of(d.type);
    for (size_t j = 0; j < d.values.size(); ++j) {
      char* end;
      const uint64_t value = strtoull(d.values[j].c_str(), &end, 0);
      if (*end || is_float(d.type)) throw Error("an initial value that is not known: " + d.values[j]);
      for (int k = 0; k < each; ++k) bytes->at(j * each + k) = value >> (8 * k);
    }
    symbols_[d.name] = device_memory.map(bytes->data(), d.bytes, "variable " + d.name);
    module_->mapped.push_back(symbols_[d.name]);
    module_->variables.push_back(std::move(bytes));
  }

  void kernel() {
    cursor_.skip_space();
    auto owner = std::make_unique<Kernel>();
    Kernel& kernel = *owner;
    kernel.name = cursor_.word();
    InstructionReader reader(kernel);
    reader.symbols = symbols_;
    cursor_.skip_space();
    if (cursor_.peek() == '(')
      for (const std::string& text : split(cursor_.brackets(), ','))
        parameter(kernel, reader, declaration(text));
    for (cursor_.skip_space(); cursor_.peek() != '{'; cursor_.skip_space())
      bound(kernel, cursor_.until("\n{"));
    const std::vector<Statement> statements = body();
    shared_variables(kernel, reader, statements);
    for (const Statement& s : statements) reader.read(s);
    reader.finish();
    module_->kernels[kernel.name] = std::move(owner);
  }

  static void parameter(Kernel& kernel, InstructionReader& reader, const Declaration& d) {
    const int at = aligned(kernel.parameter_bytes, d.alignment);
    reader.symbols[d.name] = kParameterWindow + at;
    kernel.parameters.push_back({at, d.bytes});
    kernel.parameter_bytes = at + d.bytes;
  }

  static void bound(Kernel& kernel, const std::string& text) {
    static const std::regex form(R"(\.(reqntid|maxntid)\s+(\d+)(\s*,\s*(\d+))?(\s*,\s*(\d+))?)");
    std::smatch match;
    if (std::regex_search(text, match, form)) {
      kernel.exact_threads = match[1] == "reqntid";
      kernel.threads = 1;
      for (const int part : {2, 4, 6})
        if (match[part].matched) kernel.threads *= atoi(match[part].str().c_str());
    } else if (!starts_with(text, ".minnctapersm") && !starts_with(text, ".maxnreg")) {
      throw Error("a bound of a kernel that is not known: " + text);
    }
  }

  std::vector<Statement> body() {
    std::vector<Statement> statements;
    int depth = 0;
    do {
      cursor_.skip_space();
      const int line = cursor_.line();
      if (cursor_.take('{')) {
        ++depth;
      } else if (cursor_.take('}')) {
        --depth;
      } else if (const std::string label = cursor_.label(); !label.empty()) {
        statements.push_back({label + ":", line});
      } else if (cursor_.peek() == '.') {
        const std::string word = cursor_.word();
        statements.push_back({word + (word == ".loc" ? cursor_.until("\n") : cursor_.statement()), line});
      } else {
        statements.push_back({with_single_spaces(cursor_.statement()), line});
      }
    } while (depth > 0);
    return statements;
  }

  // Those with a size first: the dynamic ones begin where they end.
  void shared_variables(Kernel& kernel, InstructionReader& reader, const std::vector<Statement>& statements) {
    std::vector<Declaration> all = module_shared_;
    for (const Statement& s : statements)
      if (starts_with(s.text, ".shared")) all.push_back(declaration(s.text.substr(7)));
    for (const bool sized : {true, false})
      for (const Declaration& d : all)
        if (d.sized == sized) {
          const uint64_t at = aligned(kernel.shared_bytes, d.alignment);
          reader.symbols[d.name] = at;
          kernel.shared_bytes = at + d.bytes;
          kernel.dynamic_shared |= !sized;
        }
  }

  void name_source(Instruction& i) const {
    const size_t colon = i.source.find(':');
    if (colon == std::string::npos) return;
    const auto found = files_.find(atoi(i.source.c_str()));
    i.source = (found == files_.end() ? "?" : found->second) + i.source.substr(colon);
  }

  const std::string text_;
  Cursor cursor_;
  std::unique_ptr<Module> module_ = std::make_unique<Module>();
  std::map<std::string, uint64_t> symbols_;
  std::vector<Declaration> module_shared_;
  std::map<int, std::string> files_;
};

}  // namespace

Module::~Module() {
  for (const uint64_t address : mapped) device_memory.unmap(address);
}

std::unique_ptr<Module> parse(const std::string& text) { return Parser(text).run(); }

}  // namespace ptx
