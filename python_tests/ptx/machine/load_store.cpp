// Loads, stores, atomics, asynchronous copies, fences.
#include <algorithm>

#include "opcode.h"

namespace ptx {

namespace {

uint64_t extended(Type type, const unsigned char* from) {
  uint64_t value = 0;
  switch (bytes_of(type)) {
    case 1:
      return is_signed(type) ? int64_t(int8_t(*from)) : *from;
    case 2:
      memcpy(&value, from, 2);
      return is_signed(type) ? int64_t(int16_t(value)) : value;
    case 4:
      memcpy(&value, from, 4);
      return is_signed(type) ? int64_t(int32_t(value)) : value;
    default:
      memcpy(&value, from, 8);
      return value;
  }
}

void load(Warp& w, const Instruction& i, uint32_t lanes) {
  const int size = bytes_of(i.type);
  const Operand& from = i.operand[i.vector];
  uint64_t result[4][kLanes];
  each_lane(lanes, [&](int l) {
    const uint64_t address = w.address(from, l);
    const unsigned char* p = access(w, l, address, size * i.vector, i.space, false);
    if (i.atomic) acquire(w, l, address);
    if (i.acquires) order_after(w, l);
    for (int j = 0; j < i.vector; ++j) result[j][l] = extended(i.type, p + j * size);
  });
  // Only now: the address may be in a register that is written.
  for (int j = 0; j < i.vector; ++j) each_lane(lanes, [&](int l) { w.set(i.operand[j], l, result[j][l]); });
}

void store(Warp& w, const Instruction& i, uint32_t lanes) {
  const int size = bytes_of(i.type);
  each_lane(lanes, [&](int l) {
    unsigned char value[32];
    for (int j = 0; j < i.vector; ++j) {
      const uint64_t part = w.value(i.operand[1 + j], l);
      memcpy(value + j * size, &part, sizeof part);
    }
    bool wins = true;
    const uint64_t address = w.address(i.operand[0], l);
    unsigned char* p = access(w, l, address, size * i.vector, i.space, true, value, &wins);
    if (i.atomic) release(w, l, address, true);
    if (wins) memcpy(p, value, size * i.vector);
  });
}

// Lanes take turns in a random order.
template <class T>
void atomic_add(Warp& w, const Instruction& i, uint32_t lanes) {
  int order[kLanes], count = 0;
  each_lane(lanes, [&](int l) { order[count++] = l; });
  std::shuffle(order, order + count, w.block->machine->generator);
  const Operand &to = i.operand[i.outputs], &with = i.operand[i.outputs + 1];
  for (int j = 0; j < count; ++j) {
    const int l = order[j];
    const uint64_t address = w.address(to, l);
    access(w, l, address, sizeof(T), i.space, false);
    unsigned char* p = access(w, l, address, sizeof(T), i.space, true);
    const auto fenced = w.fenced[l];
    if (i.releases) w.fenced[l] = w.block->clock;
    release(w, l, address, false);
    w.fenced[l] = fenced;
    acquire(w, l, address);
    if (i.acquires) order_after(w, l);
    T old;
    memcpy(&old, p, sizeof old);
    const T sum = canonical(T(old + w.in<T>(with)[l]));
    memcpy(p, &sum, sizeof sum);
    if (i.outputs) w.out<T>(i.operand[0])[l] = old;
  }
}

void fence_lanes(Warp& w, const Instruction&, uint32_t lanes) {
  each_lane(lanes, [&](int l) { fence(w, l); });
}
void fence_block(Warp&, const Instruction&, uint32_t) {}

// cp.async [to], [from], size{, bytes}: what is not read is zeros.
void copy(Warp& w, const Instruction& i, uint32_t lanes) {
  each_lane(lanes, [&](int l) {
    AsyncCopy c{w.address(i.operand[1], l), w.address(i.operand[0], l), 0, int(w.value(i.operand[2], l)), &i};
    const bool partly = i.operand.size() > 3;
    c.bytes = partly ? int(w.value(i.operand[3], l)) : c.size;
    auto& groups = w.copies[l];
    if (groups.empty()) groups.emplace_back();
    start_copy(w, l, c);
    groups.back().push_back(c);
  });
}
void commit(Warp& w, const Instruction&, uint32_t lanes) {
  each_lane(lanes, [&](int l) { w.copies[l].resize(std::max<size_t>(w.copies[l].size(), 1) + 1); });
}
// Groups arrive as late as they may, so that who reads before the wait is seen.
void wait_group(Warp& w, const Instruction& i, uint32_t lanes) {
  each_lane(lanes, [&](int l) {
    auto& groups = w.copies[l];
    const size_t keep = w.value(i.operand[0], l);
    for (; groups.size() > keep + 1; groups.pop_front())
      for (const AsyncCopy& c : groups.front()) finish_copy(w, l, c);
  });
}

void take_space(Instruction& i, Opcode& opcode) {
  const std::string space = opcode.take_one_of({"global", "shared", "param"});
  i.space = space == "global"   ? Space::global
            : space == "shared" ? Space::shared
            : space == "param"  ? Space::parameter
                                : Space::generic;
}

void take_vector(Instruction& i, Opcode& opcode) {
  i.vector = opcode.take("v2") ? 2 : opcode.take("v4") ? 4 : 1;
  if (i.vector * bytes_of(i.type) > 16) throw Error("more than 16 bytes");
}

void bind_load(Kernel& kernel, Instruction& i, Opcode& opcode) {
  const std::string order = opcode.take_one_of({"volatile", "relaxed", "acquire"});
  i.atomic = !order.empty();
  i.acquires = order == "acquire";
  if (opcode.take_one_of({"gpu", "sys", "weak", "cta"}) == "cta") throw Error("an order within a block");
  opcode.take_one_of({"ca", "cg", "cs", "cv", "lu"});
  opcode.take("nc");
  take_space(i, opcode);
  take_vector(i, opcode);
  std::vector<int> widths(i.vector + 1, 0);
  i.outputs = i.vector;
  shape(kernel, i, widths);
  i.run = load;
}

void bind_store(Kernel& kernel, Instruction& i, Opcode& opcode) {
  i.atomic = !opcode.take_one_of({"volatile", "relaxed"}).empty();
  opcode.take_one_of({"gpu", "sys", "weak"});
  opcode.take_one_of({"wb", "cg", "cs", "wt"});
  take_space(i, opcode);
  take_vector(i, opcode);
  std::vector<int> widths(i.vector + 1, 0);
  i.outputs = 0;
  shape(kernel, i, widths);
  i.run = store;
}

void bind_atomic(Kernel& kernel, Instruction& i, Opcode& opcode) {
  i.atomic = true;
  const std::string order = opcode.take_one_of({"relaxed", "acquire", "release", "acq_rel"});
  i.acquires = order == "acquire" || order == "acq_rel";
  i.releases = order == "release" || order == "acq_rel";
  opcode.take_one_of({"gpu", "sys"});
  take_space(i, opcode);
  if (!opcode.take("add")) throw Error("an operation that is not known");
  const int bytes = bytes_of(i.type);
  std::vector<int> widths = {0, bytes};
  if (opcode.name == "red")
    i.outputs = 0;
  else
    widths.insert(widths.begin(), bytes);
  shape(kernel, i, widths);
  if (bytes >= 4)
    with_integer(i.type, [&]<class T>(T) { i.run = atomic_add<T>; }) ||
        with_float(i.type, [&]<class T>(T) { i.run = atomic_add<T>; });
}

void bind_copy(Kernel& kernel, Instruction& i, Opcode& opcode) {
  if (!opcode.take("async")) throw Error("a copy that is not known");
  i.outputs = 0;
  if (opcode.take("commit_group")) {
    shape(kernel, i, {});
    i.run = commit;
  } else if (opcode.take("wait_group")) {
    shape(kernel, i, {4});
    i.run = wait_group;
  } else {
    opcode.take_one_of({"ca", "cg"});
    if (!opcode.take("shared") || !opcode.take("global")) throw Error("between other spaces");
    i.operand.size() > 3 ? shape(kernel, i, {0, 0, 4, 4}) : shape(kernel, i, {0, 0, 4});
    i.run = copy;
  }
}

}  // namespace

bool bind_memory(Kernel& kernel, Instruction& i, Opcode& opcode) {
  const std::string& op = opcode.name;
  if (op == "membar" || op == "fence") {
    i.outputs = 0;
    opcode.take_one_of({"acq_rel", "sc"});
    const std::string scope = opcode.take_one_of({"gl", "sys", "gpu", "cta"});
    i.run = scope.empty() ? nullptr : scope == "cta" ? fence_block : fence_lanes;
    return true;
  }
  i.uses = true;
  if (op == "ld")
    bind_load(kernel, i, opcode);
  else if (op == "st")
    bind_store(kernel, i, opcode);
  else if (op == "atom" || op == "red")
    bind_atomic(kernel, i, opcode);
  else if (op == "cp")
    bind_copy(kernel, i, opcode);
  else
    return i.uses = false;
  return true;
}

}  // namespace ptx
