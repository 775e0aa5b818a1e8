// A GRU with one layer norm over all gates (Hafner et al. 2020, Dreamer).
#pragma once

#include "cells/candidate.h"
#include "cells/layer_norm.h"

namespace rnnkernels {

// Dreamer's GRU (Hafner et al. 2020): one norm over all that feeds the gates.
//   r̂, n̂, û = γ N(W x + U h + b) + β        r = σ(r̂)   n = tanh(r n̂)   u = σ(û − 1)        h' = h + u (m n − h)
// m: a mask, or absent.
template <class Drop = Whole>
struct DreamerGruOf {
  using Dropping = DreamerGruOf<Dropped>;
  static constexpr int gain = 6, shift = 3, mask = 9;
  static constexpr double epsilon = 1e-3;

  struct Plain {
    static constexpr Slot slots[] = {{"r", X | H},   {"n", X | H},  {"u", X | H},  {"shift_r", 0}, {"shift_n", 0},
                                     {"shift_u", 0}, {"gain_r", 0}, {"gain_n", 0}, {"gain_u", 0}};
    static constexpr Stage stages[] = {{0, 3, kPreviousState, Width::Hidden, 3, 0}, {3, 6, kPreviousState, Width::Hidden, 0, 2}};
    static constexpr const char* states[] = {"h"};
    static constexpr PerUnit vectors[] = {{"gain_r", gain, Factor::Itself},       {"gain_n", gain + 1, Factor::Itself},
                                          {"gain_u", gain + 2, Factor::Itself},   {"shift_r", shift, Factor::Itself},
                                          {"shift_n", shift + 1, Factor::Itself}, {"shift_u", shift + 2, Factor::Itself}};
    static constexpr int kept = 6;
    static constexpr unsigned changes[] = {0b000000111, 0b111111000};
  };
  static constexpr CellInfo info = Drop::on(describe<Plain>(""), 1);

  // The gates are kept where the gradients of what they are made of will be.
  template <int S, class V>
  RNN_FN static void forward(const V* a, const V* w, const V* s, V* s1, V* k, const V* r, V* e) {
    if constexpr (S == 0) {
      each<3>([&](auto j) { k[j.value] = e[j.value] = a[j.value]; });
    } else {
      const Normal<V> normal = together<3>(r, epsilon);
      V y[3];
      each<3>([&](auto j) { y[j.value] = fma(w[j.value], normal.of(k[j.value]), w[3 + j.value]); });
      const V gate = k[shift] = sigmoid(y[0]), n = k[shift + 1] = tanh(gate * y[1]), u = k[shift + 2] = sigmoid(y[2] - V(1));
      Drop::keep(a, k, mask);
      s1[0] = fma(u, Drop::of(n, k, mask) - s[0], s[0]);
    }
  }

  template <int S, class V>
  RNN_FN static void backward(V d1, const V* w, const V* s, const V*, V* k, V* d, const V* r, const V* q, V* e) {
    const Normal<V> normal = together<3>(r, epsilon);
    if constexpr (S == 1) {
      const V gate = k[shift], n = k[shift + 1], u = k[shift + 2];
      const V y1 = fma(w[1], normal.of(k[1]), w[4]), dn = Drop::of(d1 * u, k, mask) * (V(1) - n * n);
      k[shift] = dn * y1 * gate * (V(1) - gate);
      k[shift + 1] = dn * gate;
      k[shift + 2] = d1 * (Drop::of(n, k, mask) - s[0]) * u * (V(1) - u);
      Drop::done(k, mask);
      d[0] = d1 * (V(1) - u);
      e[0] = e[1] = V(0);
      each<3>([&](auto j) {
        const V normed = normal.of(k[j.value]), g = w[j.value] * k[shift + j.value];
        k[gain + j.value] = k[shift + j.value] * normed;
        e[0] = e[0] + g;
        e[1] = fma(g, normed, e[1]);
      });
    } else {
      const V third(typename V::element(1.0 / 3));
      each<3>([&](auto j) { k[j.value] = normal.back(k[j.value], w[j.value] * k[shift + j.value], third * q[0], third * q[1]); });
    }
  }
};

using DreamerGru = DreamerGruOf<>;

}  // namespace rnnkernels
