// Recurrent dropout without memory loss (Semeniuta, Severyn & Barth 2016): a mask on the candidate alone, g of an LSTM and n of a GRU, so
// that what a cell remembers is never dropped. Pages whose candidate may be dropped take Whole or Dropped.
#pragma once

#include "cells/contract.h"

namespace rnnkernels {

struct Whole {
  static constexpr int slots = 0;
  static constexpr CellInfo on(const CellInfo& info, int) { return info; }
  template <class V>
  RNN_FN static void keep(const V*, V*, int) {}
  template <class V>
  RNN_FN static V of(V v, const V*, int) {
    return v;
  }
  template <class V>
  RNN_FN static void done(V*, int) {}
};

// The mask is the last slot of the stage that makes the candidate.
struct Dropped {
  static constexpr int slots = 1;
  static constexpr CellInfo on(const CellInfo& info, int stage) { return with_slot(info, stage, {"candidate", G | M}); }
  template <class V>
  RNN_FN static void keep(const V* a, V* k, int mask) {
    k[mask] = a[mask];
  }
  // The candidate or its gradient.
  template <class V>
  RNN_FN static V of(V v, const V* k, int mask) {
    return v * k[mask];
  }
  template <class V>
  RNN_FN static void done(V* k, int mask) {
    k[mask] = V(0);
  }
};

template <class Page>
using CandidateDropout = typename Page::Dropping;

}  // namespace rnnkernels
