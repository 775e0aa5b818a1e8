// Long short-term memory (Hochreiter & Schmidhuber 1997; forget gate: Gers, Schmidhuber & Cummins 2000; torch.nn.LSTM).
//   i = σ(î)   f = σ(f̂)   g = tanh(ĝ)   o = σ(ô)        c' = f c + i g        h' = o tanh(c')
#pragma once

#include "cells/contract.h"

namespace rnnkernels {

struct Lstm {
  static constexpr Slot slots[] = {{"i", X | H}, {"f", X | H}, {"g", X | H}, {"o", X | H}};
  static constexpr const char* states[] = {"h", "c"};
  static constexpr int kept = 4;

  template <int S, class V>
  RNN_FN static void forward(const V* a, const V*, const V* s, V* s1, V* k) {
    const V i = k[0] = sigmoid(a[0]), f = k[1] = sigmoid(a[1]), g = k[2] = tanh(a[2]), o = k[3] = sigmoid(a[3]);
    s1[1] = fma(f, s[1], i * g);
    s1[0] = o * tanh(s1[1]);
  }

  template <int S, class V>
  RNN_FN static void backward(V d1, const V*, const V* s, const V* s1, V* k, V* d) {
    const V i = k[0], f = k[1], g = k[2], o = k[3], t = tanh(s1[1]);
    const V dc = fma(d1 * o, V(1) - t * t, d[1]);
    k[0] = dc * g * i * (V(1) - i);
    k[1] = dc * s[1] * f * (V(1) - f);
    k[2] = dc * i * (V(1) - g * g);
    k[3] = d1 * t * o * (V(1) - o);
    d[1] = dc * f;
    d[0] = V(0);
  }
};

}  // namespace rnnkernels
