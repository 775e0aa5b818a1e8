// An LSTM with a layer norm on its cell state.
#pragma once

#include "cells/layer_norm.h"
#include "cells/lstm.h"

namespace rnnkernels {

// LSTM whose cell state is normalised on its way out (Ba, Kiros & Hinton 2016).
//   i, f, g, o, c' as an LSTM's        h' = o tanh(γ N(c') + β)
template <class Drop = Whole>
struct CellNormLstmOf {
  using Dropping = CellNormLstmOf<Dropped>;
  using Gates = ForgetGates;
  struct Plain : TwoStates {
    static constexpr Slot slots[] = {{"i", X | H}, {"f", X | H}, {"g", X | H}, {"o", X | H}, {"gain_c", 0}, {"shift_c", 0}};
    static constexpr Stage stages[] = {{0, 4, kPreviousState, Width::Hidden, 1, 0}, {4, 2, kPreviousState, Width::Hidden, 0, 2}};
    static constexpr PerUnit vectors[] = {{"gain_c", 4, Factor::Itself}, {"shift_c", 5, Factor::Itself}};
    static constexpr int kept = 4;
    static constexpr unsigned changes[] = {0b000111, 0b111000};
  };
  static constexpr CellInfo info = Drop::on(describe<Plain>(""), 0);
  static constexpr int mask = 4, gain = 4 + Drop::slots, shift = gain + 1;

  template <int S, class V>
  RNN_FN static void forward(const V* a, const V* w, const V* s, V* s1, V* k, const V* r, V* e) {
    if constexpr (S == 0) {
      Gates::open(a, w, s[1], k);
      Drop::keep(a, k, mask);
      const V g = k[2] = tanh(a[2]);
      k[3] = sigmoid(a[3]);
      s1[1] = e[0] = Gates::cell(k, s[1], Drop::of(g, k, mask));
    } else {
      s1[0] = k[3] * tanh(fma(w[0], Normal<V>(r[0], r[1]).of(s[1]), w[1]));
    }
  }

  template <int S, class V>
  RNN_FN static void backward(V d1, const V* w, const V* s, const V* s1, V* k, V* d, const V* r, const V* q, V* e) {
    const Normal<V> normal(r[0], r[1]);
    if constexpr (S == 1) {
      const V o = k[3], normed = normal.of(s1[1]), t = tanh(fma(w[0], normed, w[1]));
      k[3] = d1 * t * o * (V(1) - o);
      k[shift] = d1 * o * (V(1) - t * t);
      k[gain] = k[shift] * normed;
      e[0] = k[shift] * w[0];
      e[1] = e[0] * normed;
      d[0] = V(0);
    } else {
      const V i = k[0], g = k[2];
      const V dc = d[1] + normal.back(s1[1], k[shift] * w[0], q[0], q[1]);
      d[1] = Gates::back(dc, s[1], Drop::of(g, k, mask), w, k);
      k[2] = Drop::of(dc * i, k, mask) * (V(1) - g * g);
      Drop::done(k, mask);
    }
  }
};

using CellNormLstm = CellNormLstmOf<>;

}  // namespace rnnkernels
