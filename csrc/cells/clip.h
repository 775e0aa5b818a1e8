// What is kept within [−v, v] at each step; v is a number a unit that the caller gives and nothing learns.
#pragma once

#include "cells/bound.h"

namespace rnnkernels {

// The cell state, before it goes into the output (TensorFlow's cell_clip, cuDNN's cudnnRNNSetClip):  c' = clip(f c + i g).
template <class Page>
using CellClip = typename Page::Clipped;

// The projected output (TensorFlow's proj_clip):  h' = clip(W_hr q).
template <class Page>
struct ProjClip : Page {
  static constexpr CellInfo inner = InfoOf<Page>::value;
  static_assert(inner.projected(), "there is no projection to clip");
  static constexpr CellInfo info = with_vector(inner, {"proj_clip", 0, Factor::Fixed});
  static constexpr int limit = inner.vectors, last = inner.stages - 1, p = inner.stage[last].first;

  template <int S, class V, class... Sums>
  RNN_FN static void forward(const V* a, const V* w, const V* s, V* s1, V* k, Sums... sums_of_rows) {
    Page::template forward<S>(a, w, s, s1, k, sums_of_rows...);
    if constexpr (S == last) s1[0] = clip(s1[0], w[limit]);
  }

  // The projection keeps its sum; the state may by now be another's, kept by zoneout.
  template <int S, class V, class... Sums>
  RNN_FN static void backward(V d1, const V* w, const V* s, const V* s1, V* k, V* d, Sums... sums_of_rows) {
    if constexpr (S == last) d1 = clip_back(d1, k[p], w[limit]);
    Page::template backward<S>(d1, w, s, s1, k, d, sums_of_rows...);
  }
};

// The gradient of h' at every step of backward, all that others ask of it together, in the loop (after Graves 2013, "Generating sequences
// with recurrent neural networks", who clips that of the pre-activations). Forward is the page's.
template <class Page>
struct GradClip : Page {
  static constexpr CellInfo inner = InfoOf<Page>::value;
  static constexpr CellInfo info = with_vector(inner, {"grad_clip", 0, Factor::Fixed});
  static constexpr int limit = inner.vectors;

  template <int S, class V, class... Sums>
  RNN_FN static void backward(V d1, const V* w, const V* s, const V* s1, V* k, V* d, Sums... sums_of_rows) {
    if constexpr (S == inner.stages - 1) d1 = clip(d1, w[limit]);
    Page::template backward<S>(d1, w, s, s1, k, d, sums_of_rows...);
  }
};

}  // namespace rnnkernels
