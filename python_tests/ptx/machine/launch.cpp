// Launches: limits of the device, blocks and warps in random order, deadlocks.
#include <cxxabi.h>

#include <algorithm>
#include <numeric>

#include "machine.h"
#include "text.h"

namespace ptx {

std::string hexadecimal(uint64_t value) {
  char text[24];
  snprintf(text, sizeof text, "0x%llx", static_cast<unsigned long long>(value));
  return text;
}

std::string short_name(const std::string& kernel) {
  constexpr size_t kLength = 160;
  int status = 0;
  std::unique_ptr<char, decltype(&free)> plain(abi::__cxa_demangle(kernel.c_str(), nullptr, nullptr, &status),
                                               free);
  std::string name = plain ? plain.get() : kernel;
  const size_t anonymous = name.find("(anonymous namespace)::");
  if (anonymous != std::string::npos) name.erase(0, name.find("::", anonymous) + 2);
  return name.size() > kLength ? name.substr(0, kLength) + "..." : name;
}

std::string described(const Instruction& i) {
  return "PTX line " + std::to_string(i.line) + (i.source.empty() ? "" : " (" + i.source + ")") + ": " +
         i.text;
}

void fault(const Warp& w, int lane, const std::string& what) {
  throw Error(what + "\n  kernel " + short_name(w.kernel->name) + ", block " +
              std::to_string(w.block->index) + ", thread " + std::to_string(w.thread(lane)) + "\n  " +
              described(*w.now));
}

Machine::Machine(const Kernel& k, const Launch& l)
    : kernel(k),
      launch(l),
      threads(l.block[0] * l.block[1] * l.block[2]),
      blocks_total(l.grid[0] * l.grid[1] * l.grid[2]),
      generator(uint64_t(options.seed)) {}

namespace {

// The value of a special register in a thread.
uint32_t special(const std::string& name, const Block& b, const Launch& l, uint32_t thread) {
  const uint32_t x = l.block[0], y = l.block[1];
  const uint32_t position[] = {thread % x, thread / x % y, thread / x / y};
  const int axis = name.back() - 'x';
  if (name == "%laneid") return thread % kLanes;
  if (starts_with(name, "%tid.")) return position[axis];
  if (starts_with(name, "%ntid.")) return l.block[axis];
  if (starts_with(name, "%ctaid.")) return b.position[axis];
  return l.grid[axis];
}

}  // namespace

void Machine::start_warp(Block& block, Warp& w) {
  const uint32_t first = w.index * kLanes;
  w.block = &block;
  w.kernel = &kernel;
  w.alive = threads - first >= kLanes ? ~0u : (1u << (threads - first)) - 1;
  w.sync = 0;
  w.fragments = {{0, w.alive}};
  if (!w.registers) w.registers.reset(new unsigned char[kernel.register_bytes]);
  w.defined.assign(kernel.register_at.size(), {});
  std::fill_n(w.fenced, kLanes, 0);
  w.acquired.clear();
  for (auto& groups : w.copies) groups.clear();
  for (const auto& [name, reg] : kernel.specials) {
    w.defined[reg] = {~0u, ~0u};
    auto* lanes = reinterpret_cast<uint32_t*>(w.registers.get() + kernel.register_at[reg]);
    for (int l = 0; l < kLanes; ++l) lanes[l] = special(name, block, launch, first + l);
  }
}

void Machine::start_block(uint32_t index) {
  std::unique_ptr<Block> block;
  if (spare.empty()) {
    block = std::make_unique<Block>();
    block->machine = this;
    block->warps.resize((threads + kLanes - 1) / kLanes);
  } else {
    block = std::move(spare.back());
    spare.pop_back();
  }
  Block& b = *block;
  b.index = index;
  b.position[0] = index % launch.grid[0];
  b.position[1] = index / launch.grid[0] % launch.grid[1];
  b.position[2] = index / launch.grid[0] / launch.grid[1];
  b.clock = 1;
  const int64_t bytes = kernel.shared_bytes + launch.dynamic_shared;
  b.shared.assign(bytes, 0xff);
  b.state.assign(bytes, ByteState::undefined);
  b.shadow.clear();
  b.seen.clear();
  b.pending.clear();
  for (size_t j = 0; j < b.warps.size(); ++j) {
    b.warps[j].index = j;
    start_warp(b, b.warps[j]);
  }
  resident.push_back(std::move(block));
}

void Machine::end_block(size_t which) {
  Block& b = *resident[which];
  for (Warp& w : b.warps)
    for (int l = 0; l < kLanes; ++l)
      for (const auto& group : w.copies[l])
        if (!group.empty()) {
          w.now = group[0].instruction;
          fault(w, l, "a thread ended with a cp.async that it did not wait for");
        }
  spare.push_back(std::move(resident[which]));
  resident.erase(resident.begin() + which);
}

namespace {

bool has_ended(const Block& b) {
  return std::all_of(b.warps.begin(), b.warps.end(), [](const Warp& w) { return w.alive == 0; });
}

std::vector<Warp*> ready_warps(Block& b) {
  std::vector<Warp*> ready;
  for (Warp& w : b.warps)
    if (is_ready(w)) ready.push_back(&w);
  return ready;
}

[[noreturn]] void deadlock(const Machine& machine) {
  std::string text = "deadlock: no thread can go on\n  kernel " + short_name(machine.kernel.name);
  for (const auto& b : machine.resident)
    for (const Warp& w : b->warps)
      for (const Fragment& f : w.fragments)
        text += "\n  block " + std::to_string(b->index) + ", threads " + hexadecimal(f.lanes) + " of warp " +
                std::to_string(w.index) + " at " + described(machine.kernel.code[f.at]);
  throw Error(text);
}

}  // namespace

void Machine::run() {
  std::vector<uint32_t> order(blocks_total);
  std::iota(order.begin(), order.end(), 0);
  std::shuffle(order.begin(), order.end(), generator);
  const size_t at_a_time = launch.cooperative ? blocks_total : std::max(1.0, options.resident);
  const int64_t start = statistics.warp_instructions;
  for (size_t next = 0; next < order.size() || !resident.empty();) {
    while (resident.size() < at_a_time && next < order.size()) start_block(order[next++]);
    const size_t pick = random() % resident.size();
    const std::vector<Warp*> ready = ready_warps(*resident[pick]);
    if (!ready.empty()) {
      run_warp(*ready[random() % ready.size()], 1 + random() % uint64_t(std::max(1.0, options.quantum)));
    } else if (has_ended(*resident[pick])) {
      end_block(pick);
    } else if (std::all_of(resident.begin(), resident.end(),
                           [](auto& b) { return !has_ended(*b) && ready_warps(*b).empty(); })) {
      deadlock(*this);
    }
    if (statistics.warp_instructions - start > options.limit)
      throw Error("no end after " + std::to_string(int64_t(options.limit)) +
                  " instructions of warps: an endless loop or wait\n  kernel " + short_name(kernel.name));
  }
}

int occupancy(const Kernel& kernel, int threads, int64_t dynamic_shared) {
  const int64_t shared = kernel.shared_bytes + dynamic_shared + kSharedReserved;
  const int whole_warps = (std::max(1, threads) + kLanes - 1) / kLanes * kLanes;
  return std::min<int64_t>({device.threads_multiprocessor / whole_warps, device.blocks_multiprocessor,
                            device.shared_multiprocessor / shared});
}

bool serves(const Module& module) {
  return module.only ? module.architecture == device.architecture
                     : module.architecture <= device.architecture;
}

void launch(const Kernel& k, const Module& module, const Launch& l) {
  const auto refuse = [&](const std::string& why) {
    throw Error("launch refused: " + why + "\n  kernel " + short_name(k.name) + " on " + device.name);
  };
  const auto number = [](auto n) { return std::to_string(n); };
  const uint64_t threads = uint64_t(l.block[0]) * l.block[1] * l.block[2];
  const int64_t shared = k.shared_bytes + l.dynamic_shared;
  if (!serves(module))
    refuse("code for sm_" + number(module.architecture) + ", the device is sm_" +
           number(device.architecture));
  if (threads == 0 || threads > kThreadsBlock || l.block[2] > 64)
    refuse(number(threads) + " threads a block");
  if (k.exact_threads ? threads != uint64_t(k.threads) : threads > uint64_t(k.threads))
    refuse(number(threads) + " threads a block, compiled for " + (k.exact_threads ? "" : "at most ") +
           number(k.threads));
  const uint64_t blocks = uint64_t(l.grid[0]) * l.grid[1] * l.grid[2];
  if (blocks == 0 || l.grid[0] > 2147483647u || l.grid[1] > 65535 || l.grid[2] > 65535 || blocks >> 32)
    refuse("a grid of " + number(l.grid[0]) + " x " + number(l.grid[1]) + " x " + number(l.grid[2]));
  if (l.dynamic_shared && !k.dynamic_shared) refuse("dynamic shared memory for a kernel that has none");
  if (shared > std::min<int64_t>(l.shared_allowed, device.shared_optin))
    refuse(number(shared) + " bytes of shared memory, of the " + number(l.shared_allowed) +
           " asked for and " + number(device.shared_optin) + " there are");
  if (k.parameter_bytes > kParameterBytes) refuse(number(k.parameter_bytes) + " bytes of parameters");
  const int64_t usable = options.partition ? int64_t(options.partition) : device.multiprocessors;
  const int64_t most = usable * occupancy(k, threads, l.dynamic_shared);
  if (l.cooperative && int64_t(blocks) > most)
    refuse("a cooperative grid of " + number(blocks) + " blocks, of which " + number(most) + " fit");
  ++statistics.launches;
  Machine(k, l).run();
}

}  // namespace ptx
