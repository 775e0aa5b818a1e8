// A cell without a matrix: h' = tanh(x̂ + u h), u a number a unit (IndRNN, Li et al. 2018, with tanh). For tests of what engines do without
// a product, hence without an exchange.
#pragma once

#include "cells/contract.h"

namespace rnnkernels {

struct Independent {
  static constexpr Slot slots[] = {{"a", X}};
  static constexpr const char* states[] = {"h"};
  static constexpr int kept = 1;
  static constexpr PerUnit vectors[] = {{"u", 0, Factor::OldState, 0}};

  template <int S, class V>
  RNN_FN static void forward(const V* a, const V* w, const V* s, V* s1, V* k) {
    s1[0] = k[0] = tanh(fma(w[0], s[0], a[0]));
  }

  template <int S, class V>
  RNN_FN static void backward(V d1, const V* w, const V*, const V*, V* k, V* d) {
    k[0] = d1 * (V(1) - k[0] * k[0]);
    d[0] = k[0] * w[0];
  }
};

}  // namespace rnnkernels
