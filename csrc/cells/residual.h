// Recurrences around an activation f of srn.h.
#pragma once

#include "cells/srn.h"

namespace rnnkernels {

// Residual SRN: h' = h + f(ẑ). Without a matrix (feeds = X) ẑ is the input's part alone, and the recurrence a sum.
template <class F, unsigned feeds = X | H>
struct Residual {
  static constexpr Slot slots[] = {{"z", feeds}};
  static constexpr const char* states[] = {"h"};
  static constexpr int kept = 1;

  template <int S, class V>
  RNN_FN static void forward(const V* a, const V*, const V* s, V* s1, V* k) {
    k[0] = F::value(a[0]);
    s1[0] = s[0] + k[0];
  }

  template <int S, class V>
  RNN_FN static void backward(V d1, const V*, const V*, const V*, V* k, V* d) {
    k[0] = d1 * F::slope(k[0]);
    d[0] = d1;
  }
};

// Independently recurrent network (Li et al. 2018): h' = f(ẑ + u h), u a number a unit.
template <class F>
struct Independent {
  static constexpr Slot slots[] = {{"z", X}};
  static constexpr const char* states[] = {"h"};
  static constexpr int kept = 1;
  static constexpr PerUnit vectors[] = {{"u", 0, Factor::OldState, 0}};

  template <int S, class V>
  RNN_FN static void forward(const V* a, const V* w, const V* s, V* s1, V* k) {
    s1[0] = k[0] = F::value(fma(w[0], s[0], a[0]));
  }

  template <int S, class V>
  RNN_FN static void backward(V d1, const V* w, const V*, const V*, V* k, V* d) {
    k[0] = d1 * F::slope(k[0]);
    d[0] = k[0] * w[0];
  }
};

}  // namespace rnnkernels
