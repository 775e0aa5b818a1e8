// exp, sigmoid and tanh, written once over any number V. V brings + - * /, fma, min, max, abs, lt, select, copysign and power
// (the float whose exponent bits are the low mantissa bits of the argument).
//
// NaN: min(a, b) and max(a, b) give b when either is NaN, as the x86 instructions do, so a bound stands first and the argument second.
#pragma once

#include "fn.h"

namespace rnnkernels {
namespace math {

template <class V>
RNN_FN V horner(V, typename V::element c) {
  return V(c);
}
template <class V, class... More>
RNN_FN V horner(V x, typename V::element c, More... more) {
  return fma(horner(x, more...), x, V(c));
}

// e^x = e^r 2^n with |r| <= ln(2)/2. Adding `magic` rounds to an integer n and leaves n + bias in the low mantissa bits, from which power()
// makes 2^n: 0 for n = -bias, infinity for n = bias + 1. ln2_hi is short enough for n ln2_hi to be exact. e^x is infinite from `overflow`
// up and 0 from `underflow` down; at `power_underflow` n has reached -bias.
template <class E>
struct Format;

template <>
struct Format<float> {
  static constexpr float magic = 0x1.8p23f + 127;
  static constexpr float log2e = 1.44269504f, ln2_hi = 0.693359375f, ln2_lo = -2.12194440e-4f;
  static constexpr float overflow = 89, underflow = -105, power_underflow = -88;

  // P4 of e^r = 1 + (r + r^2 P4(r)), minimax for relative error of e^r on |r| <= ln(2)/2 (own Remez fit): 3.1e-9.
  template <class V>
  RNN_FN static V rest(V r) {
    return horner(r, 0.49999993448458665f, 0.16666520629635382f, 0.041668387855390142f, 0.0083687170812417160f, 0.0013814610145257281f);
  }
};

template <>
struct Format<double> {
  static constexpr double magic = 0x1.8p52 + 1023;
  static constexpr double log2e = 1.44269504088896340736, ln2_hi = 0.693145751953125, ln2_lo = 1.42860682030941723212e-6;
  static constexpr double overflow = 710, underflow = -746, power_underflow = -709;

  // P9 of e^r = 1 + (r + r^2 P9(r)), minimax for relative error of e^r on |r| <= ln(2)/2 (own Remez fit): 3.6e-18.
  template <class V>
  RNN_FN static V rest(V r) {
    return horner(r, 0.5000000000000010627, 0.16666666666666412519, 0.041666666666530159166, 0.0083333333334944646906,
                  0.0013888888943630048241, 1.984126950657132925e-4, 2.480149309892917966e-5, 2.7557586380882426294e-6,
                  2.7630248379742434988e-7, 2.5000059256054841584e-8);
  }
};

// e^x = power(t) (1 + m).
template <class V>
struct Split {
  V t, m;
};

template <class V>
RNN_FN Split<V> split(V x) {
  using F = Format<typename V::element>;
  const V t = fma(x, V(F::log2e), V(F::magic)), n = t - F::magic, r = fma(n, V(-F::ln2_lo), fma(n, V(-F::ln2_hi), x));
  return {t, fma(r * r, F::rest(r), r)};
}

// 2^n in two halves, so that n may lie outside the exponents of normal numbers: right up to overflow, gradual in underflow.
template <class V>
RNN_FN V exp(V x) {
  using F = Format<typename V::element>;
  x = max(V(F::underflow), min(V(F::overflow), x));
  const Split<V> e = split(x);
  const V n = e.t - F::magic, half = fma(n, V(0.5f), V(F::magic)), rest = n - (half - F::magic);
  return (V(1.f) + e.m) * power(half) * power(rest + F::magic);
}

template <class V>
RNN_FN V sigmoid(V x) {
  using F = Format<typename V::element>;
  const Split<V> e = split(-max(V(-F::overflow), min(V(-F::power_underflow), x)));
  return V(1.f) / fma(power(e.t), V(1.f) + e.m, V(1.f));  // power may be infinite, so m does not stand alone
}

// E / (E + 2) with E = e^2|x| - 1 = 2^n m + (2^n - 1), which loses nothing near 0, where n is 0.
template <class V>
RNN_FN V tanh(V x) {
  const V a = abs(x);
  const Split<V> e = split(min(V(40.f), a + a));
  const V p = power(e.t), E = fma(p, e.m, p - V(1.f));
  return copysign(E / (E + V(2.f)), x);
}

template <class V>
RNN_FN V relu(V x) {
  return max(V(0.f), x);
}

}  // namespace math
}  // namespace rnnkernels
