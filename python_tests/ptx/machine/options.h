// The device whose limits hold, the options of a run, and what was counted.
#pragma once

#include <cstdint>
#include <string>

namespace ptx {

// From the CUDA C++ programming guide's table of compute capabilities, and NVIDIA's whitepapers.
struct Device {
  std::string name;
  int architecture, multiprocessors;
  int shared_multiprocessor, shared_optin;  // bytes a multiprocessor has, and bytes a block can ask for
  int threads_multiprocessor, blocks_multiprocessor;
};
extern Device device;
inline constexpr int kSharedDefault = 48 << 10, kSharedReserved = 1 << 10;  // bytes a block
inline constexpr int kThreadsBlock = 1024, kParameterBytes = 4096;

bool set_device(const std::string& name, int multiprocessors);
int64_t device_attribute(const std::string& name);

struct Options {
  double seed = 1, quantum = 64, divergence = 0.05, resident = 3;
  double races = 1, definedness = 1, conflicts = 1;
  double fusion = 0, approximation = 0, sums = 0;
  double limit = 2e10;
  double partition = 0;
};
extern Options options;
bool set_option(const std::string& name, double value);

struct Statistics {
  int64_t launches = 0, warp_instructions = 0, lane_instructions = 0, same_values = 0, conflicts = 0;
};
extern Statistics statistics;

}  // namespace ptx
