// Forward-mode numbers: a value and its tangent along one direction, in the vocabulary of V. A page run on them yields a Jacobian-vector
// product.
#pragma once

#include "fn.h"

namespace rnnkernels {

template <class V>
struct Dual {
  using element = typename V::element;
  using Mask = typename V::Mask;
  static constexpr int lanes = V::lanes;
  V v, d;

  Dual() = default;
  RNN_FN Dual(element c) : v(c), d(element(0)) {}
  RNN_FN Dual(V value) : v(value), d(element(0)) {}
  RNN_FN Dual(V value, V tangent) : v(value), d(tangent) {}

  friend RNN_FN Dual operator+(Dual a, Dual b) { return {a.v + b.v, a.d + b.d}; }
  friend RNN_FN Dual operator-(Dual a, Dual b) { return {a.v - b.v, a.d - b.d}; }
  friend RNN_FN Dual operator*(Dual a, Dual b) { return {a.v * b.v, fma(a.v, b.d, a.d * b.v)}; }
  friend RNN_FN Dual operator/(Dual a, Dual b) {
    const V q = a.v / b.v;
    return {q, (a.d - q * b.d) / b.v};
  }
  friend RNN_FN Dual operator-(Dual a) { return {-a.v, -a.d}; }
  friend RNN_FN Dual fma(Dual a, Dual b, Dual c) { return {fma(a.v, b.v, c.v), fma(a.v, b.d, fma(a.d, b.v, c.d))}; }

  friend RNN_FN Mask lt(Dual a, Dual b) { return lt(a.v, b.v); }
  friend RNN_FN Dual select(Mask m, Dual a, Dual b) { return {select(m, a.v, b.v), select(m, a.d, b.d)}; }
  friend RNN_FN Dual min(Dual a, Dual b) { return select(lt(a, b), a, b); }
  friend RNN_FN Dual max(Dual a, Dual b) { return select(lt(b, a), a, b); }
  friend RNN_FN Dual abs(Dual a) { return select(lt(a.v, V(element(0))), -a, a); }

  friend RNN_FN Dual sqrt(Dual a) {
    const V r = sqrt(a.v);
    return {r, a.d / (r + r)};
  }
  friend RNN_FN Dual exp(Dual a) {
    const V e = exp(a.v);
    return {e, e * a.d};
  }
  friend RNN_FN Dual sigmoid(Dual a) {
    const V s = sigmoid(a.v);
    return {s, s * (V(element(1)) - s) * a.d};
  }
  friend RNN_FN Dual tanh(Dual a) {
    const V t = tanh(a.v);
    return {t, (V(element(1)) - t * t) * a.d};
  }
  friend RNN_FN Dual relu(Dual a) {
    return {relu(a.v), select(lt(V(element(0)), a.v), a.d, V(element(0)))};
  }  // slope 0 at 0, as torch has it
};

}  // namespace rnnkernels
