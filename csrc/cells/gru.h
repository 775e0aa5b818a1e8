// Gated recurrent units (Cho et al. 2014); p = m n is the candidate, m a mask or absent.
#pragma once

#include "cells/candidate.h"

namespace rnnkernels {

// Reset after the matrix product: cuDNN's form; torch.nn.GRU.
//   r = σ(r̂)   z = σ(ẑ)   u = û + b_hn   n = tanh(n̂ + r u)        h' = p + z (h − p)
template <class Drop = Whole>
struct GruOf {
  using Dropping = GruOf<Dropped>;
  struct Plain {
    static constexpr Slot slots[] = {{"r", X | H}, {"z", X | H}, {"n", X}, {"m", H}};
    static constexpr const char* states[] = {"h"};
    static constexpr PerUnit vectors[] = {{"b_hn", 3}};
  };
  static constexpr CellInfo info = Drop::on(describe<Plain>(""), 0);
  static constexpr int mask = 4;

  template <int S, class V>
  RNN_FN static void forward(const V* a, const V* w, const V* s, V* s1, V* k) {
    const V r = k[0] = sigmoid(a[0]), z = k[1] = sigmoid(a[1]), u = k[3] = a[3] + w[0], n = k[2] = tanh(fma(r, u, a[2]));
    Drop::keep(a, k, mask);
    const V p = Drop::of(n, k, mask);
    s1[0] = fma(z, s[0] - p, p);
  }

  template <int S, class V>
  RNN_FN static void backward(V d1, const V*, const V* s, const V*, V* k, V* d) {
    const V r = k[0], z = k[1], n = k[2], u = k[3];
    const V dn = Drop::of(d1 * (V(1) - z), k, mask) * (V(1) - n * n);
    k[0] = dn * u * r * (V(1) - r);
    k[1] = d1 * (s[0] - Drop::of(n, k, mask)) * z * (V(1) - z);
    k[2] = dn;
    k[3] = dn * r;
    Drop::done(k, mask);
    d[0] = d1 * z;
  }
};

// Reset before the matrix product: the paper's form. Two products a step, the second of v.
//   r = σ(r̂)   z = σ(ẑ)   v = r h   n = tanh(n̂ + U_n v)        h' = p + z (h − p)
template <class Drop = Whole>
struct GruResetBeforeOf {
  using Dropping = GruResetBeforeOf<Dropped>;
  struct Plain {
    static constexpr Slot slots[] = {{"r", X | H}, {"z", X | H}, {"n", X | H}};
    static constexpr Stage stages[] = {{0, 2}, {2, 1, 3}};
    static constexpr const char* states[] = {"h"};
    static constexpr int kept = 4;
  };
  static constexpr CellInfo info = Drop::on(describe<Plain>(""), 1);
  static constexpr int mask = 3, v = 3 + Drop::slots;

  template <int S, class V>
  RNN_FN static void forward(const V* a, const V*, const V* s, V* s1, V* k) {
    if constexpr (S == 0) {
      k[0] = sigmoid(a[0]);
      k[1] = sigmoid(a[1]);
      k[v] = k[0] * s[0];
    } else {
      const V z = k[1], n = k[2] = tanh(a[2]);
      Drop::keep(a, k, mask);
      const V p = Drop::of(n, k, mask);
      s1[0] = fma(z, s[0] - p, p);
    }
  }

  template <int S, class V>
  RNN_FN static void backward(V d1, const V*, const V* s, const V*, V* k, V* d) {
    if constexpr (S == 1) {
      const V z = k[1], n = k[2];
      k[1] = d1 * (s[0] - Drop::of(n, k, mask)) * z * (V(1) - z);
      k[2] = Drop::of(d1 * (V(1) - z), k, mask) * (V(1) - n * n);
      Drop::done(k, mask);
      d[0] = d1 * z;
    } else {
      const V r = k[0];
      k[0] = d1 * s[0] * r * (V(1) - r);
      d[0] = fma(d1, r, d[0]);
    }
  }
};

using Gru = GruOf<>;
using GruResetBefore = GruResetBeforeOf<>;

}  // namespace rnnkernels
