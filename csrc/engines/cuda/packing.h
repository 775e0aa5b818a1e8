// Where each number of a matrix goes: the order of the wire, and the items of each thread. Pure functions of the tiling.
#pragma once

#include "engines/cuda/products.h"

namespace rnnkernels::cuda {

// Which number of the operand of stage s is number v of word `word` on the wire; -1: none.
template <class Arithmetic>
RNN_FN int64_t on_wire(const Tiling& t, int s, int word, int v) {
  const StageTiling& from = t.stage[t.stage[s].source];
  const int words = from.send_columns * from.column_words, block = word / words, c = word % words / from.column_words;
  const int u = word % from.column_words * Arithmetic::shape.word_values + v;
  const int64_t unit = int64_t(block) * from.block_units + u;
  return block < t.unit_ctas && u < from.block_units && unit < from.units ? c * from.units + unit : -1;
}

// A word of the storage type's numbers number(0), number(1).
template <class S, class Get>
RNN_FN uint32_t join(const Get& number) {
  if constexpr (sizeof(S) == 4)
    return float_bits(number(0));
  else
    return uint32_t(number(1).bits) << 16 | number(0).bits;
}

// Which panels and which part of the depth are a thread's.
template <class Arithmetic>
struct Lane {
  int across, slice;
  RNN_FN Lane(const StageTiling& g, int thread) : across(thread / 32 % g.across), slice(thread / 32 / g.across) {
    if (!Arithmetic::shape.tensor) slice = slice * (32 / g.panel_rows) + thread % 32 / g.panel_rows;
  }
  RNN_FN int panel(const StageTiling& g, int pass) const { return across + pass * g.across; }
  // The first operand word of the thread's k-th item of a panel.
  RNN_FN int depth(const StageTiling& g, int k) const { return (slice * g.per_slice + k) * Arithmetic::shape.item_depth; }
};

template <class Arithmetic, class Memory>
RNN_FN auto packed_item(const Tiling& t, int s, Memory* workspace, int block, int item) {
  using Words = std::conditional_t<std::is_const_v<Memory>, const Word, Word>;
  const StageTiling& g = t.stage[s];
  return reinterpret_cast<Words*>(static_cast<std::conditional_t<std::is_const_v<Memory>, const char, char>*>(workspace) + g.packed) +
         (int64_t(block) * g.items() + item) * Arithmetic::shape.item_words * kThreads;
}

// A matrix as a stage's product reads it: result c of a unit, depth k.
struct Matrix {
  const void* weights;
  int64_t column, unit, depth;  // strides
};

// The matrix of stage s; null weights: none.
inline Matrix matrix_of(const CellInfo& cell, const Problem& p, const void* const* weights, bool backward, int s) {
  const int reader = !backward ? s : s + 1 < cell.stages ? s + 1 : 0;
  const Product f = forward_product(cell, p, reader);
  if (!f.depth) return {};
  if (backward) return {weights[reader], 0, 1, f.depth};
  return {weights[reader], f.units * f.depth, f.depth, 1};
}

// The 16 bytes that `thread` of `block` has as word w of its item i.
template <class Arithmetic, class S>
RNN_FN Word pack(const Tiling& t, int s, const Matrix& m, int block, int i, int w, int thread) {
  const StageTiling& g = t.stage[s];
  const Lane<Arithmetic> lane(g, thread);
  const int panel = lane.panel(g, i / g.per_slice), k = lane.depth(g, i % g.per_slice);
  Word word;
  RNN_UNROLL
  for (int e = 0; e < 4; ++e) {
    const Place at = Arithmetic::place(thread % 32, g.panel_rows, w, e);
    const int row = panel * g.panel_rows + at.row, c = row / g.block_units;
    const int64_t unit = int64_t(block) * g.block_units + row % g.block_units;
    word.x[e] = join<S>([&](int v) {
      const int64_t depth = on_wire<Arithmetic>(t, s, k + at.word, v);
      return c < g.columns && unit < g.units && depth >= 0
                 ? static_cast<const S*>(m.weights)[c * m.column + unit * m.unit + depth * m.depth]
                 : narrow<S>(0.0f);
    });
  }
  return word;
}

}  // namespace rnnkernels::cuda
