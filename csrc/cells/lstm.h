// Long short-term memory (Hochreiter & Schmidhuber 1997): one page, whose gates, bound of the cell state and dropout are others' to say.
//   i, f as the gates have them   g = tanh(ĝ)        c' = B(the gates' sum of c and m g)   o = σ(ô)        h' = o tanh(c')
#pragma once

#include "cells/bound.h"
#include "cells/candidate.h"

namespace rnnkernels {

struct TwoStates {
  static constexpr const char* states[] = {"h", "c"};
};

// A forget gate (Gers, Schmidhuber & Cummins 2000; torch.nn.LSTM).
//   i = σ(î)   f = σ(f̂)        c' = f c + i g
struct ForgetGates : TwoStates {
  static constexpr Slot slots[] = {{"i", X | H}, {"f", X | H}, {"g", X | H}, {"o", X | H}};
  static constexpr int candidate = 2, output = 3;

  template <class V>
  RNN_FN static void open(const V* a, const V*, V, V* k) {
    k[0] = sigmoid(a[0]);
    k[1] = sigmoid(a[1]);
  }
  template <class V>
  RNN_FN static V cell(const V* k, V c, V g) {
    return fma(k[1], c, k[0] * g);
  }
  // What the output gate sees of c', and what that adds to the gradient of c'.
  template <class V>
  RNN_FN static V seen(V o, V, const V*) {
    return o;
  }
  template <class V>
  RNN_FN static V seen_back(V dc, V, const V*) {
    return dc;
  }
  // Turns the gates into their gradients; returns that of c.
  template <class V>
  RNN_FN static V back(V dc, V c, V g, const V*, V* k) {
    const V i = k[0], f = k[1];
    k[0] = dc * g * i * (V(1) - i);
    k[1] = dc * c * f * (V(1) - f);
    return dc * f;
  }
};

template <class Gates, class Bound = Unbounded, class Drop = Whole>
struct LstmOf {
  using Clipped = LstmOf<Gates, Bounded, Drop>;
  using Dropping = LstmOf<Gates, Bound, Dropped>;
  static constexpr CellInfo gates = describe<Gates>("");
  static constexpr CellInfo info = Bound::on(Drop::on(gates, 0));
  static constexpr int candidate = Gates::candidate, output = Gates::output, mask = gates.slots, bound = gates.vectors;

  template <int S, class V>
  RNN_FN static void forward(const V* a, const V* w, const V* s, V* s1, V* k) {
    Gates::open(a, w, s[1], k);
    Drop::keep(a, k, mask);
    const V g = k[candidate] = tanh(a[candidate]);
    s1[1] = Bound::of(Gates::cell(k, s[1], Drop::of(g, k, mask)), w + bound);
    const V o = k[output] = sigmoid(Gates::seen(a[output], s1[1], w));
    s1[0] = o * tanh(s1[1]);
  }

  template <int S, class V>
  RNN_FN static void backward(V d1, const V* w, const V* s, const V* s1, V* k, V* d) {
    const V i = k[0], g = k[candidate], o = k[output], t = tanh(s1[1]);
    k[output] = d1 * t * o * (V(1) - o);
    const V dc = Bound::back(Gates::seen_back(fma(d1 * o, V(1) - t * t, d[1]), k[output], w), s1[1], w + bound);
    d[1] = Gates::back(dc, s[1], Drop::of(g, k, mask), w, k);
    k[candidate] = Drop::of(dc * i, k, mask) * (V(1) - g * g);
    Drop::done(k, mask);
    d[0] = V(0);
  }
};

using Lstm = LstmOf<ForgetGates>;

}  // namespace rnnkernels
