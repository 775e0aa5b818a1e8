// A throw-away cell that uses what the contract offers beyond the first pages: two stages, the second reading a kept value, a per-unit
// vector that multiplies a state, and a slot in the second stage that no matrix feeds.
//   r = σ(r̂ + p h)   z = σ(ẑ)   v = r h   n = tanh(n̂ + U_n v)   y = tanh(ŷ)   h' = (n + z (h − n)) y
#pragma once

#include "cells/contract.h"

namespace rnnkernels {

struct ResetBefore {
  static constexpr Slot slots[] = {{"r", X | H}, {"z", X | H}, {"n", X | H}, {"y", X}};
  static constexpr Stage stages[] = {{0, 2}, {2, 2, 4}};
  static constexpr const char* states[] = {"h"};
  static constexpr int kept = 5;  // r z n y and v
  static constexpr PerUnit vectors[] = {{"p", 0, Factor::OldState, 0}};

  template <int S, class V>
  RNN_FN static void forward(const V* a, const V* w, const V* s, V* s1, V* k) {
    if constexpr (S == 0) {
      k[0] = sigmoid(fma(w[0], s[0], a[0]));
      k[1] = sigmoid(a[1]);
      k[4] = k[0] * s[0];
    } else {
      k[2] = tanh(a[2]);
      k[3] = tanh(a[3]);
      s1[0] = fma(k[1], s[0] - k[2], k[2]) * k[3];
    }
  }

  template <int S, class V>
  RNN_FN static void backward(V d1, const V* w, const V* s, const V*, V* k, V* d) {
    if constexpr (S == 1) {
      const V z = k[1], n = k[2], y = k[3];
      const V dh = d1 * y;
      k[3] = d1 * fma(z, s[0] - n, n) * (V(1) - y * y);
      k[2] = dh * (V(1) - z) * (V(1) - n * n);
      k[1] = dh * (s[0] - n) * z * (V(1) - z);
      d[0] = dh * z;
    } else {
      const V r = k[0];
      k[0] = d1 * s[0] * r * (V(1) - r);
      d[0] = d[0] + d1 * r + k[0] * w[0];
    }
  }
};

}  // namespace rnnkernels
