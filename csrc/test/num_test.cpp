// The numbers of num/, on every instruction set this machine has, against long double libm: a table of functions with their largest errors
// in units in the last place, then special values, the vocabulary, storage conversions, partial loads and stores, and slopes by dual
// numbers. RNNKERNELS_ISA=scalar|avx2|avx512 tests that one alone.

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <random>
#include <string>
#include <type_traits>
#include <vector>

#include "check.h"
#include "num_cases.h"

namespace num_test {
namespace {

constexpr double kInf = std::numeric_limits<double>::infinity(), kNan = std::numeric_limits<double>::quiet_NaN();
constexpr const char* kNames[kFunctions] = {"exp", "sigmoid", "tanh", "relu", "mix"};

template <class E>
constexpr const char* kType = std::is_same_v<E, float> ? "f32" : "f64";
template <class E>
const Number<E>& number_of(const Isa& isa) {
  if constexpr (std::is_same_v<E, float>)
    return isa.f32;
  else
    return isa.f64;
}

bool same(double a, double b) { return std::isnan(a) ? std::isnan(b) : a == b && std::signbit(a) == std::signbit(b); }

long double sigmoid_oracle(long double x) { return 1 / (1 + std::exp(-x)); }
long double relu_oracle(long double x) { return x > 0 ? x : 0; }
long double exp_oracle(long double x) { return std::exp(x); }
long double tanh_oracle(long double x) { return std::tanh(x); }

struct Case {
  Function function;
  long double (*oracle)(long double);
  double low, high, limit;  // limit in ULP
};

template <class E>
const std::vector<Case> kCases;
template <>
const std::vector<Case> kCases<float> = {
    {kExp, exp_oracle, -87.3, 88.72, 2},       {kExp, exp_oracle, -104, -87.3, 1},  // subnormal results
    {kSigmoid, sigmoid_oracle, -87.3, 100, 3}, {kTanh, tanh_oracle, -1, 1, 3},
    {kTanh, tanh_oracle, -20, 20, 3},          {kRelu, relu_oracle, -1e30, 1e30, 0},
};
template <>
const std::vector<Case> kCases<double> = {
    {kExp, exp_oracle, -708.3, 709.78, 2}, {kExp, exp_oracle, -745.1, -708.3, 1}, {kSigmoid, sigmoid_oracle, -708.3, 1000, 3},
    {kTanh, tanh_oracle, -1, 1, 3},        {kTanh, tanh_oracle, -40, 40, 3},      {kRelu, relu_oracle, -1e300, 1e300, 0},
};

// Half of the points are spread evenly over the range, half over the exponents, down to subnormals.
template <class E>
std::vector<E> points(double low, double high, int count) {
  std::mt19937_64 random(1);
  std::uniform_real_distribution<double> line(low, high),
      exponent(std::log2(std::numeric_limits<E>::denorm_min()), std::log2(std::max(-low, high)));
  std::vector<E> x = {E(low), E(high)};
  while (int(x.size()) < count) {
    const E even = E(line(random)), spread = E(std::copysign(std::exp2(exponent(random)), random() & 1 ? -1. : 1.));
    x.push_back(even);
    if (spread >= low && spread <= high) x.push_back(spread);
  }
  return x;
}

template <class E>
long double error_in_ulp(E y, long double exact) {
  const int exponent = exact == 0 ? std::numeric_limits<E>::min_exponent : std::ilogb(exact) + 1;
  return std::fabs(y - exact) / std::ldexp(1.L, std::max(exponent, std::numeric_limits<E>::min_exponent) - std::numeric_limits<E>::digits);
}

template <class E>
void accuracy(const std::vector<const Isa*>& isas) {
  for (const Case& c : kCases<E>) {
    const std::vector<E> x = points<E>(c.low, c.high, 500000);
    std::vector<long double> exact(x.size());
    std::transform(x.begin(), x.end(), exact.begin(), [&](E v) { return c.oracle(v); });
    for (const Isa* isa : isas) {
      std::vector<E> y(x.size());
      number_of<E>(*isa).apply[c.function](x.data(), y.data(), int(x.size()));
      long double worst = 0, worst_relative = 0;
      E at = 0;
      for (size_t i = 0; i < x.size(); ++i) {
        const long double error = error_in_ulp(y[i], exact[i]);
        if (!(error <= worst)) worst = error, at = x[i];
        if (std::fabs(exact[i]) >= std::numeric_limits<E>::min()) worst_relative = std::max(worst_relative, std::fabs(y[i] / exact[i] - 1));
      }
      const bool ok = worst <= c.limit && worst_relative <= 1e-6L;
      std::printf("%-8s %-7s %s  [%8.5g, %8.5g]  %6.3Lf  %14.7g  %5.2g  %s\n", kNames[c.function], isa->name, kType<E>, c.low, c.high,
                  worst, double(at), c.limit, check(ok, "%s %s %s", kNames[c.function], isa->name, kType<E>) ? "ok" : "FAILED");
    }
  }
}

struct Special {
  Function function;
  double x, y;
};

template <class E>
void special_values(const Isa& isa) {
  using Limits = std::numeric_limits<E>;
  const double tiny = Limits::denorm_min(), small = Limits::min(), big = Limits::max();
  const double over = std::log(big) * (1 + 2 * Limits::epsilon()), under = std::log(tiny) - 1;
  const Special table[] = {
      {kExp, 0, 1},          {kExp, -0., 1},        {kExp, tiny, 1},
      {kExp, -small, 1},     {kExp, kInf, kInf},    {kExp, -kInf, 0},
      {kExp, big, kInf},     {kExp, -big, 0},       {kExp, over, kInf},
      {kExp, under, 0},      {kExp, kNan, kNan},    {kSigmoid, 0, .5},
      {kSigmoid, -0., .5},   {kSigmoid, tiny, .5},  {kSigmoid, kInf, 1},
      {kSigmoid, -kInf, 0},  {kSigmoid, big, 1},    {kSigmoid, -big, 0},
      {kSigmoid, 1000, 1},   {kSigmoid, -1000, 0},  {kSigmoid, kNan, kNan},
      {kTanh, 0, 0},         {kTanh, -0., -0.},     {kTanh, tiny, tiny},
      {kTanh, -tiny, -tiny}, {kTanh, small, small}, {kTanh, 3 * tiny, 3 * tiny},
      {kTanh, kInf, 1},      {kTanh, -kInf, -1},    {kTanh, big, 1},
      {kTanh, -big, -1},     {kTanh, kNan, kNan},   {kRelu, 0, 0},
      {kRelu, tiny, tiny},   {kRelu, -tiny, 0},     {kRelu, kInf, kInf},
      {kRelu, -kInf, 0},     {kRelu, big, big},     {kRelu, -big, 0},
      {kRelu, kNan, kNan},   {kRelu, -kNan, kNan},  {kTanh, -kNan, kNan},
  };
  for (const Special& s : table) {
    std::vector<E> x(kMaxLanes, E(s.x)), y(kMaxLanes);
    number_of<E>(isa).apply[s.function](x.data(), y.data(), kMaxLanes);
    for (E v : y) check(same(v, E(s.y)), "%s(%g) on %s %s is %g, not %g", kNames[s.function], s.x, isa.name, kType<E>, double(v), s.y);
  }
}

// tanh stays within [-1, 1] and sigmoid within [0, 1]; both are exactly at their ends from some point on, and the tail of sigmoid below the
// smallest normal number may be flushed but never rises.
template <class E>
void saturation(const Isa& isa) {
  using Limits = std::numeric_limits<E>;
  const bool single = std::is_same_v<E, float>;
  const double tanh_end = single ? 9.3 : 19.1, sigmoid_end = single ? 17.4 : 37.5, tail = std::log(Limits::min());
  std::vector<E> x, y(200001);
  for (int i = 0; i < int(y.size()); ++i) x.push_back(E((i - 100000) * 0.0075));
  number_of<E>(isa).apply[kTanh](x.data(), y.data(), int(y.size()));
  for (size_t i = 0; i < y.size(); ++i) {
    const bool ends = std::fabs(x[i]) < tanh_end || y[i] == std::copysign(E(1), x[i]);
    check(std::fabs(y[i]) <= 1 && ends, "tanh(%.9g) on %s %s is %.17g", double(x[i]), isa.name, kType<E>, double(y[i]));
  }
  number_of<E>(isa).apply[kSigmoid](x.data(), y.data(), int(y.size()));
  for (size_t i = 0; i < y.size(); ++i) {
    const bool ends = x[i] < sigmoid_end || y[i] == 1, falls = x[i] > tail || (y[i] <= Limits::min() && (i == 0 || y[i] >= y[i - 1]));
    check(y[i] >= 0 && y[i] <= 1 && ends && falls, "sigmoid(%.9g) on %s %s is %.17g", double(x[i]), isa.name, kType<E>, double(y[i]));
  }
}

template <class E>
void vocabulary(const Isa& isa) {
  const Number<E>& number = number_of<E>(isa);
  const E values[] = {0,       E(-0.),   1,      E(-2.5), E(1e-3), std::numeric_limits<E>::max(), std::numeric_limits<E>::denorm_min(),
                      E(kInf), E(-kInf), E(kNan)};
  for (E a : values) {
    for (E b : values) {
      for (E c : {E(-1), E(kNan)}) {
        const E expected[kOperations] = {a + b,
                                         a - b,
                                         a * b,
                                         a / b,
                                         -a,
                                         std::fma(a, b, c),
                                         a < b ? a : b,
                                         a > b ? a : b,
                                         std::fabs(a),
                                         E(a < b ? 1 : 2),
                                         std::copysign(a, b)};
        const std::vector<E> va(kMaxLanes, a), vb(kMaxLanes, b), vc(kMaxLanes, c);
        E out[kOperations][kMaxLanes];
        number.operate(va.data(), vb.data(), vc.data(), out);
        for (int k = 0; k < kOperations; ++k) {
          for (int i = 0; i < number.lanes; ++i) {
            const bool ok = same(out[k][i], expected[k]) || (k == kFma && same(out[k][i], a * b + c));
            check(ok, "operation %d of (%g, %g, %g) on %s %s lane %d is %g, not %g", k, double(a), double(b), double(c), isa.name, kType<E>,
                  i, double(out[k][i]), double(expected[k]));
          }
        }
      }
    }
  }
}

// A 16-bit format, decoded and rounded the slow way.
struct Format {
  int fraction, bias;
  int top() const { return (1 << (15 - fraction)) - 1; }
  double decode(uint16_t bits) const {
    const int exponent = (bits >> fraction) & top(), digits = bits & ((1 << fraction) - 1);
    const double sign = bits & 0x8000 ? -1 : 1;
    if (exponent == top()) return digits ? kNan : sign * kInf;
    return sign * (exponent ? std::ldexp((1 << fraction) + digits, exponent - bias - fraction) : std::ldexp(digits, 1 - bias - fraction));
  }
  double round(double x) const {
    if (std::isnan(x) || std::isinf(x) || x == 0) return x;
    const int quantum = std::max(std::ilogb(x), 1 - bias) - fraction;
    const double y = std::ldexp(std::nearbyint(std::ldexp(x, -quantum)), quantum);
    return std::fabs(y) >= std::ldexp(1., top() - bias) ? std::copysign(kInf, x) : y;
  }
};

// flushes: what is below the format's normal numbers may be stored as zero.
template <class S>
void conversions(const Isa& isa, const Memory<S, float>& memory, Format format, bool flushes, const char* name) {
  std::vector<S> stored(65536);
  std::vector<float> x(65536);
  const int lanes = isa.f32.lanes;
  for (int i = 0; i < 65536; ++i) stored[i].bits = uint16_t(i);
  for (int i = 0; i < 65536; i += lanes) memory.load(&stored[i], &x[i]);
  for (int i = 0; i < 65536; ++i) {
    float spread[kMaxLanes];
    memory.broadcast(&stored[i], spread);
    check(same(x[i], format.decode(uint16_t(i))) && std::all_of(spread, spread + lanes, [&](float v) { return same(v, x[i]); }),
          "%s %04x loads on %s as %g, not %g", name, i, isa.name, double(x[i]), format.decode(uint16_t(i)));
  }

  // Every representable value, the middle to its neighbour, the floats beside both, and arbitrary bits.
  std::vector<float> wide;
  for (int i = 0; i < 65535; ++i) {
    const float middle = float((double(x[i]) + double(x[i + 1])) / 2);
    for (float v : {x[i], middle}) wide.insert(wide.end(), {v, std::nextafter(v, -INFINITY), std::nextafter(v, INFINITY)});
  }
  const float beyond = float(std::ldexp(2 - std::ldexp(1., -format.fraction - 1), format.top() - 1 - format.bias));
  for (float v : {beyond, std::nextafter(beyond, 0.f), std::nextafter(beyond, INFINITY)}) wide.insert(wide.end(), {v, -v});
  std::mt19937 random(1);
  while (wide.size() < 600000 || wide.size() % kMaxLanes) wide.push_back(rnnkernels::float_of_bits(uint32_t(random())));
  for (uint32_t nan : {0x7f800001u, 0x7fffffffu, 0xff800001u, 0xffffffffu})
    wide.insert(wide.end(), kMaxLanes, rnnkernels::float_of_bits(nan));
  for (size_t i = 0; i < wide.size(); i += lanes) {
    S narrowed[kMaxLanes];
    memory.store(&wide[i], narrowed);
    for (int k = 0; k < lanes; ++k) {
      const double got = format.decode(narrowed[k].bits), expected = format.round(wide[i + k]);
      const bool flushed = flushes && std::fabs(wide[i + k]) < std::ldexp(1., 1 - format.bias) && got == 0;
      check(same(got, expected) || flushed, "%.9g stored as %s on %s is %g, not %g", double(wide[i + k]), name, isa.name, got, expected);
    }
  }
}

// Parts of n lanes end where readable memory ends and begin where it begins.
template <class S, class E>
void parts(const Isa& isa, const Memory<S, E>& memory, int lanes, const char* name) {
  const size_t page = size_t(sysconf(_SC_PAGESIZE));
  char* base = static_cast<char*>(mmap(nullptr, 3 * page, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
  if (!check(base != MAP_FAILED && mprotect(base + page, page, PROT_READ | PROT_WRITE) == 0, "no guarded page")) return;
  char *begin = base + page, *end = begin + page;
  S unit[kMaxLanes];
  E one_to_lanes[kMaxLanes];
  for (int i = 0; i < lanes; ++i) one_to_lanes[i] = E(i + 1);
  memory.store(one_to_lanes, unit);

  for (int n = -2; n <= lanes + 1; ++n) {
    const int count = std::clamp(n, 0, lanes);
    const size_t bytes = count * sizeof(S);
    for (char* at : {begin, end - bytes}) {
      std::memcpy(at, unit, bytes);
      E loaded[kMaxLanes];
      memory.load_part(reinterpret_cast<S*>(at), n, loaded);
      for (int i = 0; i < lanes; ++i) {
        check(loaded[i] == (i < count ? i + 1 : 0), "%s %s: lane %d of a load of %d is %g", isa.name, name, i, n, double(loaded[i]));
      }
      std::memset(begin, 0x5a, page);
      memory.store_part(one_to_lanes, reinterpret_cast<S*>(at), n);
      check(std::memcmp(at, unit, bytes) == 0, "%s %s: a store of %d wrote other values", isa.name, name, n);
      const auto untouched = [](char c) { return c == 0x5a; };
      check(std::all_of(begin, at, untouched) && std::all_of(at + bytes, end, untouched), "%s %s: a store of %d wrote outside", isa.name,
            name, n);
    }
  }
  munmap(base, 3 * page);
}

void slopes(const Isa& isa) {
  std::vector<double> x;
  for (double v = -6.01; v < 6; v += 0.037) x.push_back(v);
  const double step = 1e-5;
  const int count = int(x.size());
  std::vector<double> left(x), right(x), below(count), above(count), slope(count);
  for (double& v : left) v -= step;
  for (double& v : right) v += step;
  for (int f = 0; f < kFunctions; ++f) {
    isa.f64.apply[f](left.data(), below.data(), count);
    isa.f64.apply[f](right.data(), above.data(), count);
    isa.f64.slope[f](x.data(), slope.data(), count);
    for (int i = 0; i < count; ++i) {
      const double difference = (above[i] - below[i]) / (2 * step), tolerance = 1e-8 * std::max(1., std::fabs(difference));
      check(std::fabs(slope[i] - difference) <= tolerance, "slope of %s at %g on %s is %.12g, by difference %.12g", kNames[f], x[i],
            isa.name, slope[i], difference);
    }
  }
}

std::vector<const Isa*> available() {
  std::vector<const Isa*> isas = {scalar()};
#if RNNKERNELS_X86
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c")) isas.push_back(avx2());
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512vl")) {
    isas.push_back(avx512());
    if (__builtin_cpu_supports("avx512bf16")) isas.push_back(avx512bf16());
  }
#endif
  if (const char* wanted = std::getenv("RNNKERNELS_ISA")) {
    isas.erase(std::remove_if(isas.begin(), isas.end(), [&](const Isa* isa) { return std::string(wanted) != isa->name; }), isas.end());
    check(!isas.empty(), "RNNKERNELS_ISA=%s: not on this machine", wanted);
  }
  return isas;
}

}  // namespace
}  // namespace num_test

int main() {
  using namespace num_test;
  const std::vector<const Isa*> isas = available();
  std::printf("function isa     type range                 max_ulp            at_x  limit\n");
  accuracy<float>(isas);
  accuracy<double>(isas);
  for (const Isa* isa : isas) {
    special_values<float>(*isa);
    special_values<double>(*isa);
    saturation<float>(*isa);
    saturation<double>(*isa);
    vocabulary<float>(*isa);
    vocabulary<double>(*isa);
    conversions(*isa, isa->as_bf16, Format{7, 127}, std::string(isa->name) == "avx512bf16", "bf16");
    conversions(*isa, isa->as_f16, Format{10, 15}, false, "f16");
    parts(*isa, isa->as_float, isa->f32.lanes, "float");
    parts(*isa, isa->as_bf16, isa->f32.lanes, "bf16");
    parts(*isa, isa->as_f16, isa->f32.lanes, "f16");
    parts(*isa, isa->as_double, isa->f64.lanes, "double");
    slopes(*isa);
  }
  std::printf(check_failures ? "%d checks failed\n" : "all checks passed\n", check_failures);
  return check_failures != 0;
}
