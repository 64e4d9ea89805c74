// How the instructions of a warp run: fragments of lanes, predicates, definedness.
#include <algorithm>
#include <bit>

#include "machine.h"

namespace ptx {

uint64_t Warp::value(const Operand& o, int lane) const {
  switch (o.bytes) {
    case 1:
      return in<uint8_t>(o)[lane];
    case 2:
      return in<uint16_t>(o)[lane];
    case 4:
      return in<uint32_t>(o)[lane];
    default:
      return in<uint64_t>(o)[lane];
  }
}

void Warp::set(const Operand& o, int lane, uint64_t value) {
  switch (o.bytes) {
    case 0:
      return;
    case 1:
      out<uint8_t>(o)[lane] = value;
      return;
    case 2:
      out<uint16_t>(o)[lane] = value;
      return;
    case 4:
      out<uint32_t>(o)[lane] = value;
      return;
    default:
      out<uint64_t>(o)[lane] = value;
      return;
  }
}

uint64_t Warp::address(const Operand& o, int lane) const {
  return o.kind == Operand::Kind::constant ? o.value : value(o, lane) + o.value;
}

uint32_t undefined_lanes(const Warp& w, const Operand& o) {
  return o.kind == Operand::Kind::reg ? ~w.defined[o.reg].both() : 0;
}

void define(Warp& w, const Operand& o, uint32_t lanes, uint32_t bad_low, uint32_t bad_high) {
  if (o.kind != Operand::Kind::reg) return;
  Defined& d = w.defined[o.reg];
  d.low = (d.low | lanes) & ~(lanes & bad_low);
  d.high = (d.high | lanes) & ~(lanes & bad_high);
  if (const auto found = w.partly.find(o.reg); found != w.partly.end())
    for (int l = 0; l < kLanes; ++l)
      if (lanes >> l & 1) found->second[l] = 0;
}

void require_defined(Warp& w, const Instruction& i, size_t operand, uint32_t lanes) {
  const uint32_t undefined = undefined_lanes(w, i.operand[operand]) & lanes;
  if (options.definedness && undefined)
    fault(w, std::countr_zero(undefined),
          "an undefined value is used, operand " + std::to_string(operand + 1));
}

namespace {

enum class Step { next, elsewhere, stopped };  // the same lanes go on; others do; none can

uint32_t lanes_where(const uint8_t* predicate) {
  uint32_t lanes = 0;
  for (int j = 0; j < kLanes / 8; ++j) {
    uint64_t eight;
    memcpy(&eight, predicate + 8 * j, sizeof eight);
    lanes |= uint32_t((eight & 0x0101010101010101) * 0x0102040810204080 >> 56) << (8 * j);
  }
  return lanes;
}

using Parts = Instruction::Parts;

// A bit for each byte of a 32-bit operand.
uint8_t defined_bytes(const Warp& w, const Operand& o, int lane) {
  if (!(undefined_lanes(w, o) >> lane & 1)) return 15;
  const auto found = w.partly.find(o.reg);
  return found == w.partly.end() ? 0 : found->second[lane];
}

// What compilers do to bytes: those that are dropped, or masked by zeros, need not be defined.
uint8_t bytes_that_come_out(const Warp& w, const Instruction& i, int lane) {
  const auto& o = i.operand;
  const uint8_t a = defined_bytes(w, o[1], lane), b = defined_bytes(w, o[2], lane);
  uint8_t bytes = 0;
  if (i.parts == Parts::permute) {
    if (undefined_lanes(w, o[3]) >> lane & 1) return 0;
    const uint32_t selection = w.value(o[3], lane);
    for (int j = 0; j < 4; ++j) bytes |= ((b << 4 | a) >> (selection >> (4 * j) & 7) & 1) << j;
    return bytes;
  }
  const uint32_t x = w.value(o[1], lane), y = w.value(o[2], lane);
  for (int j = 0; j < 4; ++j) {
    const bool in_a = a >> j & 1, in_b = b >> j & 1;
    const bool zero = (in_a && !(x >> (8 * j) & 255)) || (in_b && !(y >> (8 * j) & 255));
    bytes |= ((in_a && in_b) || zero) << j;
  }
  return bytes;
}

void follow_bytes(Warp& w, const Instruction& i, uint32_t lanes) {
  uint32_t bad = 0;
  for (size_t j = 1; j < i.operand.size(); ++j) bad |= undefined_lanes(w, i.operand[j]);
  bad &= lanes;
  std::array<uint8_t, kLanes> bytes = {};
  uint32_t whole = 0;
  for (int l = 0; l < kLanes; ++l)
    if (bad >> l & 1) {
      bytes[l] = bytes_that_come_out(w, i, l);
      whole |= uint32_t(bytes[l] == 15) << l;
    }
  define(w, i.operand[0], lanes, bad & ~whole, bad & ~whole);
  if (bad & ~whole) {
    auto& kept = w.partly[i.operand[0].reg];
    for (int l = 0; l < kLanes; ++l)
      if (bad >> l & 1) kept[l] = bytes[l];
  }
}

void follow_halves(Warp& w, const Instruction& i, uint32_t lanes) {
  const auto& o = i.operand;
  if (i.parts == Parts::pack) {
    define(w, o[0], lanes, undefined_lanes(w, o[1]), undefined_lanes(w, o[2]));
    return;
  }
  uint32_t bad_low = 0, bad_high = 0;
  for (size_t j = i.outputs; j < o.size(); ++j)
    if (o[j].kind == Operand::Kind::reg) {
      bad_low |= ~w.defined[o[j].reg].low;
      bad_high |= ~w.defined[o[j].reg].high;
    }
  if (i.parts == Parts::each) {
    define(w, o[0], lanes, bad_low, bad_high);
  } else if (i.parts == Parts::low) {
    define(w, o[0], lanes, bad_low, bad_low);
  } else {
    define(w, o[0], lanes, bad_low, bad_low);
    define(w, o[1], lanes, bad_high, bad_high);
  }
}

// What is computed from an undefined register is undefined. An address, a value that is stored and a branch
// must not be.
void follow_definedness(Warp& w, const Instruction& i, uint32_t lanes) {
  if (i.parts == Parts::shuffle) return;  // It follows by itself whose value it takes.
  if (i.parts == Parts::permute || i.parts == Parts::mask) return follow_bytes(w, i, lanes);
  if (i.parts != Parts::none) return follow_halves(w, i, lanes);
  uint32_t bad = 0;
  if (options.definedness) {
    if (i.selects) {
      const uint32_t first = lanes_where(w.in<uint8_t>(i.operand[3]));
      bad = undefined_lanes(w, i.operand[3]) | (first & undefined_lanes(w, i.operand[1])) |
            (~first & undefined_lanes(w, i.operand[2]));
    } else {
      for (size_t j = i.outputs; j < i.operand.size(); ++j) {
        if (i.uses || i.role == Role::together) require_defined(w, i, j, lanes);
        bad |= undefined_lanes(w, i.operand[j]);
      }
    }
    bad &= lanes;
  }
  for (int j = 0; j < i.outputs; ++j) define(w, i.operand[j], lanes, bad, bad);
}

uint32_t predicated_lanes(const Warp& w, const Instruction& i, uint32_t lanes) {
  if (!i.predicated) return lanes;
  const uint32_t undefined = undefined_lanes(w, i.predicate) & lanes;
  if (options.definedness && undefined) fault(w, std::countr_zero(undefined), "an undefined predicate");
  const uint32_t where = lanes_where(w.in<uint8_t>(i.predicate));
  return lanes & (i.negated ? ~where : where);
}

// Fragments at one instruction become one. Returns whether this one is gone.
bool merge(Warp& w, size_t f) {
  const Fragment mine = w.fragments[f];
  for (size_t g = 0; g < w.fragments.size(); ++g)
    if (g != f && w.fragments[g].at == mine.at && w.fragments[g].state == mine.state) {
      w.fragments[g].lanes |= mine.lanes;
      w.fragments.erase(w.fragments.begin() + f);
      return true;
    }
  return false;
}

void pass_barrier(Block& b) {
  bool any = false;
  for (const Warp& w : b.warps) {
    if (!w.alive) continue;
    any = true;
    if (w.fragments.size() != 1 || w.fragments[0].state != Fragment::State::at_barrier) return;
  }
  if (!any) return;
  for (Warp& w : b.warps)
    if (w.alive) {
      w.fragments[0].state = Fragment::State::running;
      ++w.fragments[0].at;
      ++w.sync;
    }
  ++b.clock;
  b.seen.resize(std::max(b.seen.size(), b.pending.size()));
  for (size_t j = 0; j < b.pending.size(); ++j) b.seen[j] = std::max(b.seen[j], b.pending[j]);
}

Step arrive(Warp& w, size_t f, uint32_t lanes) {
  if (lanes != w.fragments[f].lanes)
    fault(w, std::countr_zero(w.fragments[f].lanes), "a predicate divides a warp at a barrier");
  w.fragments[f].state = Fragment::State::at_barrier;
  merge(w, f);
  uint32_t there = 0;
  for (const Fragment& g : w.fragments)
    if (g.state == Fragment::State::at_barrier) there |= g.lanes;
  if (there != w.alive) return Step::elsewhere;
  if (w.fragments.size() > 1)
    fault(w, std::countr_zero(w.fragments[0].lanes), "lanes of one warp wait at different barriers");
  pass_barrier(*w.block);
  return Step::stopped;
}

Step branch(Warp& w, size_t f, const Instruction& i, uint32_t lanes) {
  Fragment& fragment = w.fragments[f];
  const uint32_t stay = fragment.lanes & ~lanes;
  if (!stay || !lanes) {
    fragment.at = lanes ? i.target : fragment.at + 1;
    return Step::next;
  }
  fragment.lanes = stay;
  ++fragment.at;
  w.fragments.push_back({i.target, lanes});
  return Step::elsewhere;
}

Step leave(Warp& w, size_t f, uint32_t lanes) {
  w.alive &= ~lanes;
  w.fragments[f].lanes &= ~lanes;
  ++w.fragments[f].at;
  if (w.fragments[f].lanes) return Step::next;
  w.fragments.erase(w.fragments.begin() + f);
  if (w.alive) return Step::elsewhere;
  pass_barrier(*w.block);
  return Step::stopped;
}

// Whether all lanes that an instruction names are at it. If not, those that are wait.
bool assembled(Warp& w, size_t f, const Instruction& i, uint32_t lanes) {
  const int first = std::countr_zero(lanes);
  const uint32_t named = i.mask >= 0 ? w.in<uint32_t>(i.operand[i.mask])[first] : w.alive;
  if (i.mask < 0 && w.alive != ~0u) fault(w, first, "a warp-wide instruction in a warp that is not whole");
  if (named & ~w.alive)
    fault(w, first, "a warp-wide instruction names lanes that have ended or do not exist");
  if (lanes & ~named)
    fault(w, std::countr_zero(lanes & ~named), "a warp-wide instruction does not name this lane");
  if (!(named & ~lanes)) return true;
  if (i.predicated) fault(w, first, "a predicate takes lanes out of a warp-wide instruction that names them");
  if (w.fragments.size() == 1) fault(w, first, "a warp-wide instruction lacks lanes that it names");
  w.fragments[f].state = Fragment::State::waiting;
  merge(w, f);
  const int at = &i - w.kernel->code.data();
  for (Fragment& g : w.fragments)
    if (g.at == at && g.state == Fragment::State::waiting && !(named & ~g.lanes))
      g.state = Fragment::State::running;
  return false;
}

Step step(Warp& w, size_t f) {
  const Instruction& i = w.kernel->code[w.fragments[f].at];
  w.now = &i;
  ++i.runs;
  ++statistics.warp_instructions;
  const uint32_t lanes = predicated_lanes(w, i, w.fragments[f].lanes);
  statistics.lane_instructions += std::popcount(lanes);
  switch (i.role) {
    case Role::branch:
      return branch(w, f, i, lanes);
    case Role::exit:
      return leave(w, f, lanes);
    case Role::barrier:
      return arrive(w, f, lanes);
    case Role::together:
      if (lanes && !assembled(w, f, i, lanes)) return Step::elsewhere;
      break;
    case Role::plain:
      break;
  }
  if (lanes) {
    follow_definedness(w, i, lanes);
    i.run(w, i, lanes);
  }
  ++w.fragments[f].at;
  return Step::next;
}

constexpr size_t kNone = -1;

// The hindmost lanes, so that those ahead are caught up with; or any, to show that no one may rely on it.
size_t choose(Warp& w) {
  Machine& machine = *w.block->machine;
  size_t chosen = kNone;
  for (size_t g = 0; g < w.fragments.size(); ++g)
    if (w.fragments[g].state == Fragment::State::running &&
        (chosen == kNone || w.fragments[g].at < w.fragments[chosen].at))
      chosen = g;
  if (w.fragments.size() > 1 && machine.chance(options.divergence)) {
    const size_t any = machine.random() % w.fragments.size();
    if (w.fragments[any].state == Fragment::State::running) chosen = any;
  }
  return chosen;
}

bool others_first(Warp& w, size_t f) {
  const int at = w.fragments[f].at;
  if (merge(w, f)) return true;
  for (const Fragment& g : w.fragments)
    if (g.state == Fragment::State::running && g.at < at)
      return !w.block->machine->chance(options.divergence);
  return false;
}

}  // namespace

bool is_ready(const Warp& w) {
  for (const Fragment& f : w.fragments)
    if (f.state == Fragment::State::running) return true;
  return false;
}

void run_warp(Warp& w, int most) {
  while (most > 0) {
    const size_t f = choose(w);
    if (f == kNone) return;
    Step next = Step::next;
    while (next == Step::next && most-- > 0) {
      next = step(w, f);
      if (next == Step::next && w.fragments.size() > 1 && others_first(w, f)) next = Step::elsewhere;
    }
    if (next == Step::stopped) return;
  }
}

}  // namespace ptx
