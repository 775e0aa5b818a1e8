// Numbers of one lane: plain C++ for any machine.
#pragma once

#include <stdint.h>

#include "math.h"
#include "storage.h"

namespace rnnkernels {
namespace scalar {

template <class E>
struct Bits;
template <>
struct Bits<float> {
  using type = uint32_t;
  static constexpr int mantissa = 23;
};
template <>
struct Bits<double> {
  using type = uint64_t;
  static constexpr int mantissa = 52;
};

template <class E>
struct Number {
  using element = E;
  static constexpr int lanes = 1;
  struct Mask {
    bool m;
  };
  E v;

  Number() = default;
  RNN_FN Number(E x) : v(x) {}

  template <class S>
  RNN_FN static Number load(const S* p) {
    return Number{widen(*p)};
  }
  template <class S>
  RNN_FN static Number load(const S* p, int n) {
    return n > 0 ? load(p) : Number(0);
  }
  RNN_FN static void load_two(const bf16* p, Number& low, Number& high) {
    low = load(p);
    high = load(p + 1);
  }
  RNN_FN static void store_two(bf16* p, Number low, Number high) {
    low.store(p);
    high.store(p + 1);
  }
  template <class S>
  RNN_FN static Number broadcast(const S* p) {
    return load(p);
  }
  template <class S>
  RNN_FN void store(S* p) const {
    *p = narrow<S>(v);
  }
  template <class S>
  RNN_FN void store(S* p, int n) const {
    if (n > 0) store(p);
  }

  friend RNN_FN Number operator+(Number a, Number b) { return a.v + b.v; }
  friend RNN_FN Number operator-(Number a, Number b) { return a.v - b.v; }
  friend RNN_FN Number operator*(Number a, Number b) { return a.v * b.v; }
  friend RNN_FN Number operator/(Number a, Number b) { return a.v / b.v; }
  friend RNN_FN Number operator-(Number a) { return -a.v; }
  friend RNN_FN Number fma(Number a, Number b, Number c) { return a.v * b.v + c.v; }  // a baseline machine has no fused one
  friend RNN_FN Number min(Number a, Number b) { return a.v < b.v ? a : b; }
  friend RNN_FN Number max(Number a, Number b) { return a.v > b.v ? a : b; }
  friend RNN_FN Mask lt(Number a, Number b) { return {a.v < b.v}; }
  friend RNN_FN Number select(Mask m, Number a, Number b) { return m.m ? a : b; }
  friend RNN_FN Number sqrt(Number a) {
    if constexpr (sizeof(E) == 4)
      return __builtin_sqrtf(a.v);
    else
      return __builtin_sqrt(a.v);
  }
  friend RNN_FN Number abs(Number a) { return of_bits(bits(a) & ~sign); }
  friend RNN_FN Number copysign(Number a, Number s) { return of_bits((bits(a) & ~sign) | (bits(s) & sign)); }
  friend RNN_FN Number power(Number a) { return of_bits(bits(a) << mantissa); }

 private:
  using U = typename Bits<E>::type;
  static constexpr int mantissa = Bits<E>::mantissa;
  static constexpr U sign = U(1) << (8 * sizeof(U) - 1);
  RNN_FN static U bits(Number a) {
    U u;
    __builtin_memcpy(&u, &a.v, sizeof u);
    return u;
  }
  RNN_FN static Number of_bits(U u) {
    E x;
    __builtin_memcpy(&x, &u, sizeof x);
    return x;
  }
};

using F32 = Number<float>;
using F64 = Number<double>;

using math::exp;
using math::relu;
using math::sigmoid;
using math::tanh;

}  // namespace scalar
}  // namespace rnnkernels
