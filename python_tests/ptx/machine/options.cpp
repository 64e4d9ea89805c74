#include "options.h"

#include <map>

namespace ptx {

namespace {

const Device kDevices[] = {
    {"A100", 80, 108, 164 << 10, 163 << 10, 2048, 32},
    {"H100", 90, 132, 228 << 10, 227 << 10, 2048, 32},
    {"B200", 100, 148, 228 << 10, 227 << 10, 2048, 32},
    {"RTX 4090", 89, 128, 100 << 10, 99 << 10, 1536, 24},
    {"RTX 5090", 120, 170, 100 << 10, 99 << 10, 1536, 24},
};

}  // namespace

Device device = kDevices[0];
Options options;
Statistics statistics;

bool set_device(const std::string& name, int multiprocessors) {
  for (const Device& known : kDevices)
    if (known.name == name) {
      device = known;
      if (multiprocessors) device.multiprocessors = multiprocessors;
      return true;
    }
  return false;
}

int64_t device_attribute(const std::string& name) {
  const std::map<std::string, int> attributes = {
      {"multiprocessors", device.multiprocessors},
      {"architecture", device.architecture},
      {"shared_optin", device.shared_optin},
      {"shared_multiprocessor", device.shared_multiprocessor},
      {"threads_multiprocessor", device.threads_multiprocessor},
  };
  const auto found = attributes.find(name);
  return found == attributes.end() ? -1 : found->second;
}

bool set_option(const std::string& name, double value) {
  static const std::map<std::string, double Options::*> members = {
      {"seed", &Options::seed},
      {"quantum", &Options::quantum},
      {"divergence", &Options::divergence},
      {"resident", &Options::resident},
      {"races", &Options::races},
      {"definedness", &Options::definedness},
      {"conflicts", &Options::conflicts},
      {"fusion", &Options::fusion},
      {"approximation", &Options::approximation},
      {"sums", &Options::sums},
      {"limit", &Options::limit},
      {"partition", &Options::partition},
  };
  const auto found = members.find(name);
  if (found == members.end()) return false;
  options.*found->second = value;
  return true;
}

}  // namespace ptx
