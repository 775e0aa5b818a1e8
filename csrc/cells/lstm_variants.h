// LSTMs with other gates; t = tanh(c') below.
#pragma once

#include "cells/contract.h"

namespace rnnkernels {

// With peepholes, a number a unit each (Gers, Schraudolph & Schmidhuber 2002).
//   i = σ(î + p_i c)   f = σ(f̂ + p_f c)   g = tanh(ĝ)        c' = f c + i g        o = σ(ô + p_o c')        h' = o t
struct PeepholeLstm {
  static constexpr Slot slots[] = {{"i", X | H}, {"f", X | H}, {"g", X | H}, {"o", X | H}};
  static constexpr const char* states[] = {"h", "c"};
  static constexpr int kept = 4;
  static constexpr PerUnit vectors[] = {{"p_i", 0, Factor::OldState, 1}, {"p_f", 1, Factor::OldState, 1}, {"p_o", 3, Factor::NewState, 1}};

  template <int S, class V>
  RNN_FN static void forward(const V* a, const V* w, const V* s, V* s1, V* k) {
    const V i = k[0] = sigmoid(fma(w[0], s[1], a[0])), f = k[1] = sigmoid(fma(w[1], s[1], a[1])), g = k[2] = tanh(a[2]);
    s1[1] = fma(f, s[1], i * g);
    k[3] = sigmoid(fma(w[2], s1[1], a[3]));
    s1[0] = k[3] * tanh(s1[1]);
  }

  template <int S, class V>
  RNN_FN static void backward(V d1, const V* w, const V* s, const V* s1, V* k, V* d) {
    const V i = k[0], f = k[1], g = k[2], o = k[3], t = tanh(s1[1]);
    k[3] = d1 * t * o * (V(1) - o);
    const V dc = fma(k[3], w[2], fma(d1 * o, V(1) - t * t, d[1]));
    k[0] = dc * g * i * (V(1) - i);
    k[1] = dc * s[1] * f * (V(1) - f);
    k[2] = dc * i * (V(1) - g * g);
    d[1] = fma(k[1], w[1], fma(k[0], w[0], dc * f));
    d[0] = V(0);
  }
};

// With input and forget gate coupled, f = 1 − i (Greff et al. 2017, "CIFG").
//   i = σ(î)   g = tanh(ĝ)   o = σ(ô)        c' = c + i (g − c)        h' = o t
struct CoupledLstm {
  static constexpr Slot slots[] = {{"i", X | H}, {"g", X | H}, {"o", X | H}};
  static constexpr const char* states[] = {"h", "c"};
  static constexpr int kept = 3;

  template <int S, class V>
  RNN_FN static void forward(const V* a, const V*, const V* s, V* s1, V* k) {
    const V i = k[0] = sigmoid(a[0]), g = k[1] = tanh(a[1]), o = k[2] = sigmoid(a[2]);
    s1[1] = fma(i, g - s[1], s[1]);
    s1[0] = o * tanh(s1[1]);
  }

  template <int S, class V>
  RNN_FN static void backward(V d1, const V*, const V* s, const V* s1, V* k, V* d) {
    const V i = k[0], g = k[1], o = k[2], t = tanh(s1[1]);
    const V dc = fma(d1 * o, V(1) - t * t, d[1]);
    k[0] = dc * (g - s[1]) * i * (V(1) - i);
    k[1] = dc * i * (V(1) - g * g);
    k[2] = d1 * t * o * (V(1) - o);
    d[1] = dc * (V(1) - i);
    d[0] = V(0);
  }
};

// Without a forget gate (Hochreiter & Schmidhuber 1997).
//   i = σ(î)   g = tanh(ĝ)   o = σ(ô)        c' = c + i g        h' = o t
struct NoForgetLstm {
  static constexpr Slot slots[] = {{"i", X | H}, {"g", X | H}, {"o", X | H}};
  static constexpr const char* states[] = {"h", "c"};
  static constexpr int kept = 3;

  template <int S, class V>
  RNN_FN static void forward(const V* a, const V*, const V* s, V* s1, V* k) {
    const V i = k[0] = sigmoid(a[0]), g = k[1] = tanh(a[1]), o = k[2] = sigmoid(a[2]);
    s1[1] = fma(i, g, s[1]);
    s1[0] = o * tanh(s1[1]);
  }

  template <int S, class V>
  RNN_FN static void backward(V d1, const V*, const V*, const V* s1, V* k, V* d) {
    const V i = k[0], g = k[1], o = k[2], t = tanh(s1[1]);
    const V dc = fma(d1 * o, V(1) - t * t, d[1]);
    k[0] = dc * g * i * (V(1) - i);
    k[1] = dc * i * (V(1) - g * g);
    k[2] = d1 * t * o * (V(1) - o);
    d[1] = dc;
    d[0] = V(0);
  }
};

}  // namespace rnnkernels
