// Simple recurrent network (Elman, "Finding structure in time", 1990; torch.nn.RNN).
//   h' = f(ẑ)
#pragma once

#include "cells/contract.h"

namespace rnnkernels {

// Each activation gives its derivative from its value, so that a token keeps one number.
struct Tanh {
  template <class V>
  RNN_FN static V value(V z) {
    return tanh(z);
  }
  template <class V>
  RNN_FN static V slope(V f) {
    return V(1) - f * f;
  }
};

struct Relu {
  template <class V>
  RNN_FN static V value(V z) {
    return relu(z);
  }
  template <class V>
  RNN_FN static V slope(V f) {
    return select(lt(V(0), f), V(1), select(lt(f, V(1)), V(0), V(1)));  // NaN passes, as in torch
  }
};

struct Logistic {
  template <class V>
  RNN_FN static V value(V z) {
    return sigmoid(z);
  }
  template <class V>
  RNN_FN static V slope(V f) {
    return f * (V(1) - f);
  }
};

struct Identity {
  template <class V>
  RNN_FN static V value(V z) {
    return z;
  }
  template <class V>
  RNN_FN static V slope(V) {
    return V(1);
  }
};

template <class F>
struct Srn {
  static constexpr Slot slots[] = {{"z", X | H}};
  static constexpr const char* states[] = {"h"};
  static constexpr int kept = 1;

  template <int S, class V>
  RNN_FN static void forward(const V* a, const V*, const V*, V* s1, V* k) {
    s1[0] = k[0] = F::value(a[0]);
  }

  template <int S, class V>
  RNN_FN static void backward(V d1, const V*, const V*, const V*, V* k, V* d) {
    k[0] = d1 * F::slope(k[0]);
    d[0] = V(0);
  }
};

}  // namespace rnnkernels
