// Drives the streaming write over odd and unaligned shapes against a plain loop in double. Every array is an
// allocation of its exact size, so that AddressSanitizer sees a single element read or written too far.
#include <vector>

#include "cpu/isa.h"
#include "engram/memory.h"
#include "formats.h"

using engram::StreamShape;

namespace {

using Doubles = std::vector<double>;

Doubles read(Array& array, const Format& format) {
  Doubles values(array.count());
  for (int64_t i = 0; i < array.count(); ++i) values[i] = get(array.data(), i, format);
  return values;
}

// The writes to one memory, one after the other: P, M, readouts and leverages in place.
void write_rows(const StreamShape& s, double* p, double* m, const double* w, const double* z,
                double* readouts, double* leverages) {
  for (int64_t t = 0; t < s.count; ++t, w += s.slots, z += s.width, readouts += s.width, ++leverages) {
    Doubles u(s.slots), error(z, z + s.width);
    double g = 0;
    for (int64_t i = 0; i < s.slots; ++i) {
      for (int64_t j = 0; j < s.slots; ++j) u[i] += p[i * s.slots + j] * w[j];
      for (int64_t c = 0; c < s.width; ++c) error[c] -= w[i] * m[i * s.width + c];
      g += w[i] * u[i];
    }
    for (int64_t i = 0; i < s.slots; ++i) {
      for (int64_t j = 0; j < s.slots; ++j) p[i * s.slots + j] -= u[i] * u[j] / (1 + g);
      for (int64_t c = 0; c < s.width; ++c) m[i * s.width + c] += u[i] * error[c] / (1 + g);
    }
    std::fill_n(readouts, s.width, 0.0);
    *leverages = 0;
    for (int64_t i = 0; i < s.slots; ++i) {
      for (int64_t c = 0; c < s.width; ++c) readouts[c] += w[i] * m[i * s.width + c];
      for (int64_t j = 0; j < s.slots; ++j) *leverages += w[i] * p[i * s.slots + j] * w[j];
    }
  }
}

void check_array(Array& got, const Doubles& exact, const Format& format, double bound, const char* name) {
  double largest = 1;
  for (const double value : exact) largest = std::fmax(largest, std::fabs(value));
  for (int64_t i = 0; i < got.count(); ++i) {
    const double value = get(got.data(), i, format);
    expect(std::fabs(value - exact[i]) <= bound * largest, name, value, exact[i]);
  }
}

void check_stream(const Format& format, StreamShape shape, size_t offset, int threads) {
  const auto [batch, slots, width, count] = shape;
  const size_t skip = offset * format.bytes;
  Array p(batch * slots * slots, format.bytes, skip), m(batch * slots * width, format.bytes, skip);
  Array w(batch * count * slots, format.bytes, skip), z(batch * count * width, format.bytes, skip);
  Array new_p(p.count(), format.bytes, skip), new_m(m.count(), format.bytes, skip);
  Array readouts(z.count(), format.bytes, skip), leverages(batch * count, format.bytes, skip);
  fill(m, format), fill(w, format), fill(z, format);
  for (int64_t at = 0; at < p.count(); ++at) {
    const int64_t i = at / slots % slots, j = at % slots;
    // Symmetric, and positive definite by its diagonal.
    const double value = i == j ? 2 : 1.0 / (2 * slots + i + j);
    if (format.bytes == 8) std::memcpy(p.data() + at * 8, &value, 8);
    const float narrow = static_cast<float>(value);
    if (format.bytes == 4) std::memcpy(p.data() + at * 4, &narrow, 4);
  }
  Doubles exact_p = read(p, format), exact_m = read(m, format), exact_readouts(z.count()),
          exact_leverages(batch * count);
  const Doubles wide_w = read(w, format), wide_z = read(z, format);
  for (int64_t b = 0; b < batch; ++b) {
    write_rows(shape, exact_p.data() + b * slots * slots, exact_m.data() + b * slots * width,
               wide_w.data() + b * count * slots, wide_z.data() + b * count * width,
               exact_readouts.data() + b * count * width, exact_leverages.data() + b * count);
  }
  engram::cpu::memory_stream(p.data(), m.data(), w.data(), z.data(), format.dtype, shape, new_p.data(),
                             new_m.data(), readouts.data(), leverages.data(), threads);
  // Each write adds rounding of sums over the slots, of products with the norm of a row.
  const double bound = std::ldexp(32.0 * (count + 1) * (slots + 1), -format.mantissa);
  check_array(new_p, exact_p, format, bound, "P");
  check_array(new_m, exact_m, format, bound, "M");
  check_array(readouts, exact_readouts, format, bound, "readout");
  check_array(leverages, exact_leverages, format, bound, "leverage");
}

}  // namespace

// The argument is the instruction set to test; 77 says that this machine does not have it.
int main(int, char** arguments) {
  if (std::strcmp(engram::cpu::isa_name(engram::cpu::isa()), arguments[1]) != 0) return 77;
  for (const Format& format : {kFormats[0], kFormats[3]}) {
    for (const int64_t slots : {1, 5, 16, 33, 70}) {
      for (const int64_t width : {0, 1, 7, 64, 131}) {
        for (const int64_t count : {1, 2, 9}) {
          check_stream(format, {1, slots, width, count}, 0, 1);
          check_stream(format, {3, slots, width, count}, 1, 2);
        }
      }
    }
    check_stream(format, {1, 171, 251, 3}, 1, 4);  // all threads on one memory
    check_stream(format, {2, 171, 251, 2}, 0, 3);
    check_stream(format, {9, 33, 20, 40}, 1, 4);
    check_stream(format, {0, 3, 4, 2}, 0, 2);
  }
  std::printf("%d failures\n", failures);
  return failures != 0;
}
