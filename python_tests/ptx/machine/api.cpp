#include "api.h"

#include "machine.h"
#include "memory.h"

using namespace ptx;

namespace {

std::string error_text, listing_text;
// Never destroyed: when the process ends, the memory that they give back may have gone before them.
auto& modules = *new std::vector<std::unique_ptr<Module>>;
std::vector<Kernel*> kernels;
std::map<std::pair<int, int>, Instruction> originals;  // of patched instructions, by kernel and index

// What f returns, or `failed` with the reason kept.
template <class T, class F>
T guarded(T failed, F f) {
  try {
    return f();
  } catch (const std::exception& error) {
    error_text = error.what();
    return failed;
  }
}

Kernel& kernel_of(void* module, const char* name) {
  const auto& all = static_cast<Module*>(module)->kernels;
  const auto found = all.find(name);
  if (found == all.end()) throw Error(std::string("no kernel ") + name);
  return *found->second;
}

}  // namespace

const char* ptx_error() { return error_text.c_str(); }

int ptx_device(const char* name, int multiprocessors) {
  return guarded(1, [&] {
    if (!set_device(name, multiprocessors)) throw Error(std::string("no device ") + name);
    return 0;
  });
}

int64_t ptx_device_attribute(const char* name) { return device_attribute(name); }

int ptx_option(const char* name, double value) {
  return guarded(1, [&] {
    if (!set_option(name, value)) throw Error(std::string("no option ") + name);
    return 0;
  });
}

uint64_t ptx_map(const void* host, uint64_t bytes, const char* name) {
  return guarded(uint64_t(0), [&] {
    const uint64_t address = device_memory.map(host, bytes, name);
    if (!address) throw Error("no device addresses are left");
    return address;
  });
}

void ptx_unmap(uint64_t address) { device_memory.unmap(address); }
void* ptx_host(uint64_t address, uint64_t bytes) { return device_memory.host(address, bytes); }
void ptx_undefine(const void* host, uint64_t bytes) { undefined_memory.set(host, bytes, true); }
void ptx_define(const void* host, uint64_t bytes) { undefined_memory.set(host, bytes, false); }
int64_t ptx_first_undefined(const void* host, uint64_t bytes) { return undefined_memory.first(host, bytes); }
void ptx_define_all() { undefined_memory.clear(); }

void* ptx_load(const char* text, int may_fuse) {
  return guarded(static_cast<void*>(nullptr), [&] {
    modules.push_back(parse(text));
    for (auto& [name, kernel] : modules.back()->kernels) {
      if (may_fuse) fuse(*kernel);
      kernels.push_back(kernel.get());
    }
    return static_cast<void*>(modules.back().get());
  });
}

int ptx_parameters(void* module, const char* name, int* out, int capacity) {
  return guarded(-1, [&] {
    const auto& parameters = kernel_of(module, name).parameters;
    if (int(2 * parameters.size() + 1) > capacity) throw Error("more parameters than there is room for");
    for (const auto& [offset, size] : parameters) {
      *out++ = offset;
      *out++ = size;
    }
    *out = -1;
    return int(parameters.size());
  });
}

int ptx_static_shared(void* module, const char* name) {
  return guarded(-1, [&] { return kernel_of(module, name).shared_bytes; });
}

int ptx_serves(void* module) { return serves(*static_cast<Module*>(module)); }

int ptx_occupancy(void* module, const char* name, int threads, int64_t dynamic_shared) {
  return guarded(-1, [&] { return occupancy(kernel_of(module, name), threads, dynamic_shared); });
}

int ptx_launch(void* module, const char* name, const uint32_t grid[3], const uint32_t block[3],
               int64_t dynamic_shared, const void* parameters, int cooperative, int64_t shared_allowed) {
  return guarded(1, [&] {
    launch(kernel_of(module, name), *static_cast<Module*>(module),
           {{grid[0], grid[1], grid[2]},
            {block[0], block[1], block[2]},
            dynamic_shared,
            static_cast<const unsigned char*>(parameters),
            cooperative != 0,
            shared_allowed});
    return 0;
  });
}

void ptx_statistics(int64_t out[5]) {
  out[0] = statistics.launches;
  out[1] = statistics.warp_instructions;
  out[2] = statistics.lane_instructions;
  out[3] = statistics.same_values;
  out[4] = statistics.conflicts;
  statistics = {};
}

int ptx_kernels() { return kernels.size(); }

const char* ptx_kernel_name(int kernel) {
  return guarded("", [&] { return kernels.at(kernel)->name.c_str(); });
}

const char* ptx_listing(int kernel) {
  return guarded("", [&] {
    listing_text.clear();
    for (const Instruction& i : kernels.at(kernel)->code)
      if (i.line)  // the parser's end of a kernel has none
        listing_text +=
            std::to_string(i.line) + "\t" + std::to_string(i.runs) + "\t" + i.source + "\t" + i.text + "\n";
    return listing_text.c_str();
  });
}

void ptx_reset_counts() {
  for (Kernel* kernel : kernels)
    for (Instruction& i : kernel->code) i.runs = 0;
}

int ptx_patch(int index, int instruction, const char* opcode, int64_t shift) {
  return guarded(1, [&] {
    Kernel& kernel = *kernels.at(index);
    Instruction& i = kernel.code.at(instruction);
    Instruction patched = i;
    if (*opcode) {
      patched = Instruction();
      patched.text = std::string(opcode) + " in place of " + i.text;
      patched.line = i.line;
      patched.source = i.source;
      patched.predicated = i.predicated;
      patched.negated = i.negated;
      patched.predicate = i.predicate;
      if (std::string(opcode) == "nop") {
        patched.run = [](Warp&, const Instruction&, uint32_t) {};
      } else {
        patched.operand = i.operand;
        patched.outputs = i.outputs;
        bind(kernel, patched, opcode);
      }
    }
    if (shift) {
      bool moved = false;
      for (Operand& o : patched.operand)
        if (o.address && !moved) {
          moved = true;
          o.value += shift;
          if (o.kind == Operand::Kind::constant) o.at = kernel.constant(o.value, o.bytes);
        }
      if (!moved) throw Error("no address to be shifted in " + i.text);
    }
    originals.try_emplace({index, instruction}, i);
    i = patched;
    return 0;
  });
}

void ptx_restore() {
  for (const auto& [at, original] : originals) {
    Instruction& i = kernels[at.first]->code[at.second];
    const uint64_t runs = i.runs;
    i = original;
    i.runs = runs;
  }
  originals.clear();
}
