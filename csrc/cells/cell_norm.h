// An LSTM with a layer norm on its cell state.
#pragma once

#include "cells/layer_norm.h"

namespace rnnkernels {

// LSTM whose cell state is normalised on its way out (Ba, Kiros & Hinton 2016).
//   i, f, g, o, c' as an LSTM's        h' = o tanh(γ N(c') + β)
struct CellNormLstm {
  static constexpr int gain = 4, shift = 5;

  static constexpr Slot slots[] = {{"i", X | H}, {"f", X | H}, {"g", X | H}, {"o", X | H}, {"gain_c", 0}, {"shift_c", 0}};
  static constexpr Stage stages[] = {{0, 4, kPreviousState, Width::Hidden, 1, 0}, {4, 2, kPreviousState, Width::Hidden, 0, 2}};
  static constexpr const char* states[] = {"h", "c"};
  static constexpr PerUnit vectors[] = {{"gain_c", gain, Factor::Itself}, {"shift_c", shift, Factor::Itself}};
  static constexpr int kept = 4;
  static constexpr unsigned changes[] = {0b000111, 0b111000};

  template <int S, class V>
  RNN_FN static void forward(const V* a, const V* w, const V* s, V* s1, V* k, const V* r, V* e) {
    if constexpr (S == 0) {
      const V i = k[0] = sigmoid(a[0]), f = k[1] = sigmoid(a[1]), g = k[2] = tanh(a[2]);
      k[3] = sigmoid(a[3]);
      s1[1] = e[0] = fma(f, s[1], i * g);
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
      const V i = k[0], f = k[1], g = k[2];
      const V dc = d[1] + normal.back(s1[1], k[shift] * w[0], q[0], q[1]);
      k[0] = dc * g * i * (V(1) - i);
      k[1] = dc * s[1] * f * (V(1) - f);
      k[2] = dc * i * (V(1) - g * g);
      d[1] = dc * f;
    }
  }
};

}  // namespace rnnkernels
