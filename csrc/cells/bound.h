// Clipping to [−v, v], and what an LSTM's cell state is kept within.
#pragma once

#include "cells/contract.h"

namespace rnnkernels {

template <class V>
RNN_FN V clip(V x, V v) {
  return select(lt(v, x), v, select(lt(x, -v), -v, x));  // NaN passes, as in torch
}

// The gradient of x from that of clip(x, v), which serves for x as well: where it was clipped it is ±v.
template <class V>
RNN_FN V clip_back(V d, V x, V v) {
  return select(lt(abs(x), v), d, V(0));
}

struct Unbounded {
  static constexpr CellInfo on(const CellInfo& info) { return info; }
  template <class V>
  RNN_FN static V of(V c, const V*) {
    return c;
  }
  template <class V>
  RNN_FN static V back(V d, V, const V*) {
    return d;
  }
};

// By a vector after the page's own.
struct Bounded {
  static constexpr CellInfo on(const CellInfo& info) { return with_vector(info, {"cell_clip", 0, Factor::Fixed}); }
  template <class V>
  RNN_FN static V of(V c, const V* v) {
    return clip(c, v[0]);
  }
  template <class V>
  RNN_FN static V back(V d, V c, const V* v) {
    return clip_back(d, c, v[0]);
  }
};

}  // namespace rnnkernels
