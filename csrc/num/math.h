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

  // 1 + r + r^2 P4(r), minimax for relative error on |r| <= ln(2)/2 (own Remez fit): 3.1e-9.
  template <class V>
  RNN_FN static V exp_of_rest(V r) {
    return horner(r, 1.f, 1.f, 0.49999993448458665f, 0.16666520629635382f, 0.041668387855390142f, 0.0083687170812417160f,
                  0.0013814610145257281f);
  }

  // Below 5/8, x + x^3 P4(x^2), minimax for relative error of tanh (own fit by reweighted least squares): 4.1e-09.
  template <class V>
  RNN_FN static V tanh_over(V a, V z) {
    return a * z * horner(z, -0.333332837f, 0.133314908f, -0.0537434965f, 0.0206505861f, -0.0057170447f);
  }
  template <class V>
  RNN_FN static V tanh_under(V) {
    return V(1.f);
  }
};

// e^x in two factors: p * power(t).
template <class V>
struct Split {
  V t, p;
};

template <class V>
RNN_FN Split<V> split(V x) {
  using F = Format<typename V::element>;
  const V t = fma(x, V(F::log2e), V(F::magic)), n = t - F::magic;
  return {t, F::exp_of_rest(fma(n, V(-F::ln2_lo), fma(n, V(-F::ln2_hi), x)))};
}

template <>
struct Format<double> {
  static constexpr double magic = 0x1.8p52 + 1023;
  static constexpr double log2e = 1.44269504088896340736, ln2_hi = 0.693145751953125, ln2_lo = 1.42860682030941723212e-6;
  static constexpr double overflow = 710, underflow = -746, power_underflow = -709;

  // 1 + r + r^2 P9(r), minimax for relative error on |r| <= ln(2)/2 (own Remez fit): 3.6e-18.
  template <class V>
  RNN_FN static V exp_of_rest(V r) {
    return horner(r, 1., 1., 0.5000000000000010627, 0.16666666666666412519, 0.041666666666530159166, 0.0083333333334944646906,
                  0.0013888888943630048241, 1.984126950657132925e-4, 2.480149309892917966e-5, 2.7557586380882426294e-6,
                  2.7630248379742434988e-7, 2.5000059256054841584e-8);
  }

  // Below 5/8, x + x^3 P2(x^2) / Q3(x^2), minimax for relative error of tanh (own Remez fit): 6.1e-19.
  template <class V>
  RNN_FN static V tanh_over(V a, V z) {
    return a * z * horner(z, -0.33333333333333323362, -0.020496734832758733398, -1.9908663957613674936e-4);
  }
  template <class V>
  RNN_FN static V tanh_under(V z) {
    return horner(z, 1., 0.46149020449826088337, 0.023288579813533121429, 2.0643585112113797478e-4);
  }
};

// 2^n in two halves, so that n may lie outside the exponents of normal numbers: right up to overflow, gradual in underflow.
template <class V>
RNN_FN V exp(V x) {
  using F = Format<typename V::element>;
  x = max(V(F::underflow), min(V(F::overflow), x));
  const Split<V> e = split(x);
  const V n = e.t - F::magic, half = fma(n, V(0.5f), V(F::magic)), rest = n - (half - F::magic);
  return e.p * power(half) * power(rest + F::magic);
}

template <class V>
RNN_FN V sigmoid(V x) {
  using F = Format<typename V::element>;
  const Split<V> e = split(-max(V(-F::overflow), min(V(-F::power_underflow), x)));
  return V(1.f) / fma(power(e.t), e.p, V(1.f));
}

// Above 5/8, 1 - 2 / (e^2x + 1), which would cancel near 0; below, a polynomial or a quotient of two. Both are base + over / under, so that
// one division serves. A rational function over the whole range would be quicker and lose five units in the last place, which a recurrence
// magnifies.
template <class V>
RNN_FN V tanh(V x) {
  using F = Format<typename V::element>;
  const V a = abs(x), z = a * a;
  const Split<V> e = split(min(V(40.f), a + a));
  const auto small = lt(a, V(0.625f));
  const V base = select(small, a, V(1.f)), over = select(small, F::tanh_over(a, z), V(-2.f));
  const V under = select(small, F::tanh_under(z), fma(power(e.t), e.p, V(1.f)));
  return copysign(base + over / under, x);
}

template <class V>
RNN_FN V relu(V x) {
  return max(V(0.f), x);
}

}  // namespace math
}  // namespace rnnkernels
