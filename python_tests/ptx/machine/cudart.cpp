// The part of the CUDA runtime that the package and the host code of nvcc call, on the machine. It is linked
// into the module in place of the real one.
#include <cstring>
#include <map>
#include <string>
#include <vector>

#include "api.h"

namespace {

enum Error {
  kSuccess = 0,
  kInvalidValue = 1,
  kNoKernelImage = 209,
  kLaunchFailure = 719,
  kCooperativeTooLarge = 720,
  kNotSupported = 801
};
enum Attribute { kMultiprocessors = 16, kCooperative = 95, kSharedOptin = 97 };
constexpr int kDynamicSharedAttribute = 8, kSharedDefault = 48 << 10;

struct Dim {
  uint32_t x, y, z;
};
struct Function {
  void* module;
  std::string name;
  int64_t dynamic_allowed = kSharedDefault;
};
struct Configuration {
  Dim grid, block;
  size_t shared;
  void* stream;
};

// Modules are registered before main(), and before what stands outside of functions is there.
std::map<const void*, Function>& functions() {
  static std::map<const void*, Function> all;
  return all;
}
// Why a module could not be loaded, which its launches say.
std::string& load_error() {
  static std::string text;
  return text;
}
std::vector<Configuration> configurations;
int last_error = kSuccess;
std::string last_text;

int failed(int error, const std::string& text) {
  last_text = text;
  return last_error = error;
}

int run(const void* host, Dim grid, Dim block, void** arguments, size_t shared, bool cooperative) {
  constexpr int kCapacity = 1024;
  const Function& f = functions().at(host);
  if (!f.module) return failed(kLaunchFailure, load_error());
  int parameters[kCapacity];
  if (ptx_parameters(f.module, f.name.c_str(), parameters, kCapacity) < 0)
    return failed(kLaunchFailure, ptx_error());
  std::vector<unsigned char> memory;
  for (int j = 0; parameters[j] >= 0; j += 2) {
    memory.resize(parameters[j] + parameters[j + 1]);
    memcpy(&memory[parameters[j]], arguments[j / 2], parameters[j + 1]);
  }
  const uint32_t grid_size[] = {grid.x, grid.y, grid.z}, block_size[] = {block.x, block.y, block.z};
  // The attribute is about dynamic shared memory; without it the sum of both has the default bound.
  const int64_t fixed = ptx_static_shared(f.module, f.name.c_str());
  const int64_t allowed = f.dynamic_allowed > kSharedDefault ? f.dynamic_allowed + fixed : kSharedDefault;
  if (ptx_launch(f.module, f.name.c_str(), grid_size, block_size, shared, memory.data(), cooperative,
                 allowed)) {
    const std::string text = ptx_error();
    const bool too_large = text.find("launch refused: a cooperative grid") != std::string::npos;
    return failed(too_large ? kCooperativeTooLarge : kLaunchFailure, text);
  }
  return kSuccess;
}

}  // namespace

extern "C" {

// The wrapper points to a fat binary: a header of 16 bytes with the size of the rest at 8, and in the rest,
// not compressed, the text of the PTX.
void** __cudaRegisterFatBinary(void* wrapper) {
  const char* binary;
  memcpy(&binary, static_cast<char*>(wrapper) + 8, sizeof binary);
  uint64_t size;
  memcpy(&size, binary + 8, sizeof size);
  const char* end = binary + 16 + size;
  const char* text = static_cast<const char*>(memmem(binary, end - binary, ".version", 8));
  void* module = text ? ptx_load(std::string(text, strnlen(text, end - text)).c_str(), 1) : nullptr;
  if (!module) load_error() = text ? ptx_error() : "no uncompressed PTX in the module";
  return static_cast<void**>(module);
}
void __cudaRegisterFatBinaryEnd(void**) {}
void __cudaUnregisterFatBinary(void**) {}

void __cudaRegisterFunction(void** module, const char* host, char*, const char* name, int, void*, void*,
                            void*, void*, int*) {
  functions()[host] = {module, name};
}

unsigned __cudaPushCallConfiguration(Dim grid, Dim block, size_t shared, void* stream) {
  configurations.push_back({grid, block, shared, stream});
  return kSuccess;
}
int __cudaPopCallConfiguration(Dim* grid, Dim* block, size_t* shared, void* stream) {
  const Configuration c = configurations.back();
  configurations.pop_back();
  *grid = c.grid;
  *block = c.block;
  *shared = c.shared;
  memcpy(stream, &c.stream, sizeof c.stream);
  return kSuccess;
}
int __cudaGetKernel(void** kernel, const void* host) {
  *kernel = const_cast<void*>(host);
  return kSuccess;
}
int __cudaLaunchKernel(void* kernel, Dim grid, Dim block, void** arguments, size_t shared, void*) {
  return run(kernel, grid, block, arguments, shared, false);
}
int cudaLaunchKernel(const void* kernel, Dim grid, Dim block, void** arguments, size_t shared, void*) {
  return run(kernel, grid, block, arguments, shared, false);
}
int cudaLaunchCooperativeKernel(const void* kernel, Dim grid, Dim block, void** arguments, size_t shared,
                                void*) {
  return run(kernel, grid, block, arguments, shared, true);
}

int cudaFuncSetAttribute(const void* kernel, int attribute, int value) {
  Function& f = functions().at(kernel);
  if (!f.module) return kSuccess;  // the launch fails
  const int64_t total = int64_t(value) + ptx_static_shared(f.module, f.name.c_str());
  if (attribute != kDynamicSharedAttribute || total > ptx_device_attribute("shared_optin"))
    return failed(kInvalidValue, "invalid value");
  f.dynamic_allowed = value;
  return kSuccess;
}

int cudaFuncGetAttributes(void* attributes, const void* kernel) {
  constexpr size_t kAttributesBytes = 56;
  memset(attributes, 0, kAttributesBytes);
  void* const module = functions().at(kernel).module;
  if (!module) return failed(kNoKernelImage, load_error());
  return ptx_serves(module)
             ? kSuccess
             : failed(kNoKernelImage, "no kernel image is available for execution on the device");
}

int cudaMemsetAsync(void* to, int value, size_t bytes, void*) {
  if (bytes == 0) return kSuccess;
  void* host = ptx_host(reinterpret_cast<uint64_t>(to), bytes);
  if (!host)
    return failed(kLaunchFailure, "cudaMemsetAsync out of bounds: " + std::to_string(bytes) + " bytes");
  memset(host, value, bytes);
  ptx_define(host, bytes);
  return kSuccess;
}

int cudaGetLastError() {
  const int error = last_error;
  last_error = kSuccess;
  return error;
}
const char* cudaGetErrorString(int error) {
  switch (error) {
    case kLaunchFailure:
    case kCooperativeTooLarge:
    case kNoKernelImage:
      return last_text.c_str();
    case kInvalidValue:
      return "invalid value";
    case kNotSupported:
      return "not supported";
    default:
      return "no error";
  }
}

int cudaGetDevice(int* device) {
  *device = 0;
  return kSuccess;
}
int cudaGetDeviceCount(int* count) {
  *count = 1;
  return kSuccess;
}
int cudaDeviceGetAttribute(int* value, int attribute, int) {
  switch (attribute) {
    case kMultiprocessors:
      *value = ptx_device_attribute("multiprocessors");
      return kSuccess;
    case kSharedOptin:
      *value = ptx_device_attribute("shared_optin");
      return kSuccess;
    case kCooperative:
      *value = 1;
      return kSuccess;
    default:
      return failed(kInvalidValue, "invalid value");
  }
}

}  // extern "C"
