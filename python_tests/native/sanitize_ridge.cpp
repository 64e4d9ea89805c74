// Drives the ridge memory over odd shapes and ragged sequences against a plain loop in double. Every array is
// an allocation of its exact size, so that AddressSanitizer sees a single element read or written too far.
#include <vector>

#include "cpu/isa.h"
#include "engram/ridge.h"
#include "formats.h"

using engram::RidgeShape;

namespace {

using Doubles = std::vector<double>;
using Ends = std::vector<int64_t>;

Doubles read(Array& array, const Format& format) {
  Doubles values(array.count());
  for (int64_t i = 0; i < array.count(); ++i) values[i] = get(array.data(), i, format);
  return values;
}

// One token of one head: P and M in place, and what its query reads.
void write_and_read(const RidgeShape& s, double* p, double* m, const double* q, const double* k,
                    const double* v, double beta, double* out) {
  Doubles u(s.keys), error(v, v + s.values);
  double gain = 0;
  for (int64_t i = 0; i < s.keys; ++i) {
    for (int64_t j = 0; j < s.keys; ++j) u[i] += p[i * s.keys + j] * k[j];
    for (int64_t c = 0; c < s.values; ++c) error[c] -= k[i] * m[i * s.values + c];
    gain += k[i] * u[i];
  }
  const double share = beta / (1 + beta * gain);
  for (int64_t i = 0; i < s.keys; ++i) {
    for (int64_t j = 0; j < s.keys; ++j) p[i * s.keys + j] -= share * u[i] * u[j];
    for (int64_t c = 0; c < s.values; ++c) m[i * s.values + c] += share * u[i] * error[c];
  }
  std::fill_n(out, s.values, 0.0);
  for (int64_t i = 0; i < s.keys; ++i) {
    for (int64_t c = 0; c < s.values; ++c) out[c] += q[i] * m[i * s.values + c];
  }
}

void check_array(const Doubles& got, const Doubles& exact, double bound, const char* name) {
  double largest = 1;
  for (const double value : exact) largest = std::fmax(largest, std::fabs(value));
  for (size_t i = 0; i < exact.size(); ++i) {
    expect(std::fabs(got[i] - exact[i]) <= bound * largest, name, got[i], exact[i]);
  }
}

void check_memory(const Format& format, const RidgeShape& s, const Ends& ends, int threads) {
  const int64_t tokens = ends.back() * s.heads, states = s.sequences * s.heads;
  Array q(tokens * s.keys, format.bytes), k(tokens * s.keys, format.bytes);
  Array v(tokens * s.values, format.bytes), out(tokens * s.values, format.bytes);
  fill(q, format), fill(k, format), fill(v, format);
  Doubles beta(tokens), p(states * s.keys * s.keys), m(states * s.keys * s.values);
  for (double& b : beta) b = std::fabs(random_value());
  for (double& x : m) x = random_value();
  for (size_t at = 0; at < p.size(); ++at) p[at] = at / s.keys % s.keys == at % s.keys ? 3 : 0;
  const Doubles wide_q = read(q, format), wide_k = read(k, format), wide_v = read(v, format);
  Doubles exact_p = p, exact_m = m, exact_out(v.count());
  for (int64_t n = 0; n < s.sequences; ++n) {
    for (int64_t t = ends[n]; t < ends[n + 1]; ++t) {
      for (int64_t h = 0; h < s.heads; ++h) {
        const int64_t row = t * s.heads + h, state = n * s.heads + h;
        write_and_read(s, &exact_p[state * s.keys * s.keys], exact_m.data() + state * s.keys * s.values,
                       &wide_q[row * s.keys], &wide_k[row * s.keys], wide_v.data() + row * s.values,
                       beta[row], exact_out.data() + row * s.values);
      }
    }
  }
  engram::cpu::ridge_memory(q.data(), k.data(), v.data(), format.dtype, beta.data(), ends.data(), s, p.data(),
                            m.data(), out.data(), threads);
  const double steps = 32.0 * (ends.back() + 1) * (s.keys + 1);
  check_array(p, exact_p, std::ldexp(steps, -52), "P");
  check_array(m, exact_m, std::ldexp(steps, -52), "M");
  check_array(read(out, format), exact_out, std::ldexp(steps, -52) + std::ldexp(1.0, -format.mantissa),
              "readout");
}

}  // namespace

// The argument is the instruction set to test; 77 says that this machine does not have it.
int main(int, char** arguments) {
  if (std::strcmp(engram::cpu::isa_name(engram::cpu::isa()), arguments[1]) != 0) return 77;
  for (const Format& format : {kFormats[0], kFormats[3]}) {
    for (const int64_t keys : {1, 5, 16, 33, 70}) {
      for (const int64_t values : {1, 7, 64, 131}) {
        check_memory(format, {1, 1, keys, values}, {0, 9}, 1);
        check_memory(format, {4, 3, keys, values}, {0, 3, 3, 4, 11}, 2);
      }
    }
    check_memory(format, {2, 5, 33, 20}, {0, 40, 41}, 4);
    check_memory(format, {0, 3, 4, 2}, {0}, 2);
  }
  std::printf("%d failures\n", failures);
  return failures != 0;
}
