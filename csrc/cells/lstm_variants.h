// LSTMs with other gates.
#pragma once

#include "cells/lstm.h"

namespace rnnkernels {

// With peepholes, a number a unit each (Gers, Schraudolph & Schmidhuber 2002).
//   i = σ(î + p_i c)   f = σ(f̂ + p_f c)        c' = f c + i g        o = σ(ô + p_o c')
struct PeepholeGates : ForgetGates {
  static constexpr PerUnit vectors[] = {{"p_i", 0, Factor::OldState, 1}, {"p_f", 1, Factor::OldState, 1}, {"p_o", 3, Factor::NewState, 1}};

  template <class V>
  RNN_FN static void open(const V* a, const V* w, V c, V* k) {
    k[0] = sigmoid(fma(w[0], c, a[0]));
    k[1] = sigmoid(fma(w[1], c, a[1]));
  }
  template <class V>
  RNN_FN static V seen(V o, V c, const V* w) {
    return fma(w[2], c, o);
  }
  template <class V>
  RNN_FN static V seen_back(V dc, V d_out, const V* w) {
    return fma(d_out, w[2], dc);
  }
  template <class V>
  RNN_FN static V back(V dc, V c, V g, const V* w, V* k) {
    const V kept = ForgetGates::back(dc, c, g, w, k);
    return fma(k[1], w[1], fma(k[0], w[0], kept));
  }
};

// Without a forget gate (Hochreiter & Schmidhuber 1997).
//   i = σ(î)        c' = c + i g
struct NoForgetGates : TwoStates {
  static constexpr Slot slots[] = {{"i", X | H}, {"g", X | H}, {"o", X | H}};
  static constexpr int candidate = 1, output = 2;

  template <class V>
  RNN_FN static void open(const V* a, const V*, V, V* k) {
    k[0] = sigmoid(a[0]);
  }
  template <class V>
  RNN_FN static V cell(const V* k, V c, V g) {
    return fma(k[0], g, c);
  }
  template <class V>
  RNN_FN static V seen(V o, V, const V*) {
    return o;
  }
  template <class V>
  RNN_FN static V seen_back(V dc, V, const V*) {
    return dc;
  }
  template <class V>
  RNN_FN static V back(V dc, V, V g, const V*, V* k) {
    const V i = k[0];
    k[0] = dc * g * i * (V(1) - i);
    return dc;
  }
};

// With input and forget gate coupled, f = 1 − i (Greff et al. 2017, "CIFG").
//   i = σ(î)        c' = c + i (g − c)
struct CoupledGates : NoForgetGates {
  template <class V>
  RNN_FN static V cell(const V* k, V c, V g) {
    return fma(k[0], g - c, c);
  }
  template <class V>
  RNN_FN static V back(V dc, V c, V g, const V*, V* k) {
    const V i = k[0];
    k[0] = dc * (g - c) * i * (V(1) - i);
    return dc * (V(1) - i);
  }
};

using PeepholeLstm = LstmOf<PeepholeGates>;
using CoupledLstm = LstmOf<CoupledGates>;
using NoForgetLstm = LstmOf<NoForgetGates>;

}  // namespace rnnkernels
