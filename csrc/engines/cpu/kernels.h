// Kernels of the CPU engine over any number type: the product of rows and a panel, the pages between memory and registers.
// Every function here is a template over a number type of its instruction set, so that none is shared between instruction sets.
#pragma once

#include "engines/cpu/operands.h"

namespace rnnkernels::cpu {

// All columns of a unit lie in one lane; a chain's sums stay in registers while the panel, of elements W, streams by once, multiplied as
// vectors C. Meanwhile a tile that is tall enough to have time for it asks for memory that will be wanted next, a line for each k.
template <class V, class C, class W, int vectors, int rows>
void product(const void* const* operand, const void* panel, int64_t depth, const Sums& sums, const Soon* soon) {
  using T = typename V::element;
  using A = typename C::element;
  const A* a[rows];
  for (int r = 0; r < rows; ++r) a[r] = static_cast<const A*>(operand[r]);
  constexpr bool scaled = sizeof(W) == 1;
  const T* const factors = static_cast<const T*>(panel);
  const W* w = scaled ? reinterpret_cast<const W*>(factors + vectors * V::lanes) : static_cast<const W*>(panel);
  V sum[rows][vectors];
  const auto load = [&](C* column, int v, int count) __attribute__((always_inline)) {
    if constexpr (sizeof(W) == 2) {
      if (count == 2) return V::load_two(w + v * V::lanes, column[0], column[1]);
    }
    column[0] = C::load(w + v * V::lanes);
  };
  constexpr int together = sizeof(W) == 2 ? 2 : 1;  // vectors loaded at once
  const auto add = [&](int64_t k) __attribute__((always_inline)) {
    // Beside the sums few registers are left: what there is less of stays in them.
    if constexpr (rows < vectors) {
      C x[rows];
#pragma GCC unroll 8
      for (int r = 0; r < rows; ++r) x[r] = C::broadcast(a[r] + k);
#pragma GCC unroll 8
      for (int v = 0; v < vectors; v += together) {
        C column[together];
        const int count = vectors - v < together ? vectors - v : together;
        load(column, v, count);
#pragma GCC unroll 8
        for (int i = 0; i < count; ++i)
#pragma GCC unroll 8
          for (int r = 0; r < rows; ++r) sum[r][v + i] = fma(x[r], column[i], sum[r][v + i]);
      }
    } else {
      C column[vectors];
#pragma GCC unroll 8
      for (int v = 0; v < vectors; v += together) load(column + v, v, vectors - v < together ? vectors - v : together);
#pragma GCC unroll 8
      for (int r = 0; r < rows; ++r) {
        const C x = C::broadcast(a[r] + k);
#pragma GCC unroll 8
        for (int v = 0; v < vectors; ++v) sum[r][v] = fma(x, column[v], sum[r][v]);
      }
    }
    w += vectors * V::lanes;
  };
  T* const to = static_cast<T*>(sums.to);
  const T* const also = static_cast<const T*>(sums.also);
  int64_t k = 0;
  do {
    const bool begins = k == 0;
    const int64_t end = depth - k < kWordsInAChain ? depth : k + kWordsInAChain;
#pragma GCC unroll 8
    for (int r = 0; r < rows; ++r)
#pragma GCC unroll 8
      for (int v = 0; v < vectors; ++v) sum[r][v] = V(0);
    if constexpr (asks_ahead(rows, vectors, V::lanes)) {
      int64_t first = 0;  // of the k at which the pieces are asked for
      const auto ask = [&](const Ahead& pieces, auto write) __attribute__((always_inline)) {
        const Ahead ahead = pieces;
        const int64_t last = first + ahead.lines() < end ? first + ahead.lines() : end;
#pragma GCC unroll 2
        for (; k < last; ++k) {
          __builtin_prefetch(ahead.line(k - first), write.value, write.value ? 3 : 2);
          add(k);
        }
        first += ahead.lines();
      };
      if (soon) {
        for (const Ahead& pieces : soon->reads) ask(pieces, Index<0>());
        ask(soon->writes, Index<1>());
      }
    }
#pragma GCC unroll 2
    for (; k < end; ++k) add(k);
#pragma GCC unroll 8
    for (int r = 0; r < rows; ++r)
#pragma GCC unroll 8
      for (int v = 0; v < vectors; ++v) {
        V& all = sum[r][v];
        if (!begins) all = V::load(to + r * sums.to_row + v * V::lanes) + all;
        if (end == depth) {
          if constexpr (scaled) all = all * V::load(factors + v * V::lanes);
          if (also) all = V::load(also + r * sums.also_row + v * V::lanes) + all;
        }
        all.store(to + r * sums.to_row + v * V::lanes);
      }
  } while (k < depth);
}

template <class V>
void multiply_add(const void* a, const void* b, int64_t n, void* to) {
  using T = typename V::element;
  for (int64_t i = 0; i < n; i += V::lanes) {
    const int m = int(n - i < V::lanes ? n - i : V::lanes);
    T* t = static_cast<T*>(to) + i;
    fma(V::load(static_cast<const T*>(a) + i, m), V::load(static_cast<const T*>(b) + i, m), V::load(t, m)).store(t, m);
  }
}

template <class V, class S>
void load(const void* storage, int64_t n, void* numbers) {
  for (int64_t i = 0; i < n; i += V::lanes) {
    const int m = int(n - i < V::lanes ? n - i : V::lanes);
    V::load(static_cast<const S*>(storage) + i, m).store(static_cast<typename V::element*>(numbers) + i, m);
  }
}

template <class V, class S>
void add(const void* storage, int64_t n, void* numbers) {
  using T = typename V::element;
  for (int64_t i = 0; i < n; i += V::lanes) {
    const int m = int(n - i < V::lanes ? n - i : V::lanes);
    T* t = static_cast<T*>(numbers) + i;
    (V::load(t, m) + V::load(static_cast<const S*>(storage) + i, m)).store(t, m);
  }
}

template <class V, class S>
void store(const void* numbers, int64_t n, void* storage) {
  for (int64_t i = 0; i < n; i += V::lanes) {
    const int m = int(n - i < V::lanes ? n - i : V::lanes);
    V::load(static_cast<const typename V::element*>(numbers) + i, m).store(static_cast<S*>(storage) + i, m);
  }
}

template <class V>
void merge(const void* sums, void* const* rows, int count, int64_t unit, int blocks, int64_t width, bool onto) {
  using T = typename V::element;
  constexpr int L = V::lanes;
  for (int r = 0; r < count; ++r)
    for (int b = 0; b < blocks && unit + b * L < width; ++b) {
      const int n = int(width - unit - b * L < L ? width - unit - b * L : L);
      T* const to = static_cast<T*>(rows[r]) + unit + b * L;
      const V x = V::load(static_cast<const T*>(sums) + (r * blocks + b) * L);
      (onto ? V::load(to, n) + x : x).store(to, n);
    }
}

template <class V, class S>
void put(const void* sums, const int64_t* tokens, int count, int64_t unit, int blocks, int64_t width, void* to) {
  constexpr int L = V::lanes;
  for (int r = 0; r < count; ++r)
    for (int b = 0; b < blocks && unit + b * L < width; ++b) {
      const int64_t u = unit + b * L;
      V::load(static_cast<const typename V::element*>(sums) + (r * blocks + b) * L)
          .store(static_cast<S*>(to) + tokens[r] * width + u, int(width - u < L ? width - u : L));
    }
}

// A vector's part of the sums over its row: of each value and of its square, in double, so that neither loses digits.
template <int count, class V>
RNN_FN void put_sums(const V* e, int n, double* to) {
  for (int j = 0; j < count; ++j) {
    typename V::element lane[V::lanes];
    e[j].store(lane, V::lanes);
    double sum = 0, squares = 0;
    for (int i = 0; i < n; ++i) {
      sum += lane[i];
      squares += double(lane[i]) * lane[i];
    }
    to[2 * j] = sum;
    to[2 * j + 1] = squares;
  }
}

// The gates of a vector of units of one row, of slot 0 and so many elements to the next: as a step has them or, if it has none, as a tile
// does, whose vectors are whole.
template <class V, class S>
struct StepOrTileGates {
  const S* of_step;
  const typename V::element* of_tile;
  int64_t slot;
  int n;
  template <int i>
  RNN_FN V get(Index<i>) const {
    return of_step ? V::load(of_step + i * slot, n) : V::load(of_tile + i * slot);
  }
};

template <class Cell, int stage, class V, class S>
void forward(const ForwardStep& step, const RowSet& rows, int64_t unit, int64_t end, int blocks, const void* input, const void* sums) {
  using T = typename V::element;
  constexpr CellInfo cell = InfoOf<Cell>::value;
  constexpr int L = V::lanes, columns = cell.hidden_slots(stage), vectors = cell.vectors, count = cell.stage[stage].sums;
  constexpr int inputs = cell.input_slots(stage), first = cell.first_input_slot(stage);
  for (int b = 0; b < blocks && unit + b * L < end; ++b) {
    const int64_t u = unit + b * L;
    const int n = int(end - u < L ? end - u : L);
    V w[vectors ? vectors : 1];
    load_vectors<Cell, V, S>(step.vectors, u, n, w);
    for (int r = 0; r < rows.count; ++r) {
      V e[count ? count : 1];
      const int place = r * blocks + b;
      const T* const sum = sums ? static_cast<const T*>(sums) + place * columns * L : nullptr;
      StepOrTileGates<V, S> gates{nullptr, nullptr, L, n};
      if (step.gates)
        gates.of_step = static_cast<const S*>(step.gates) + rows[r] * step.gates_row + u, gates.slot = step.gates_slot;
      else if (inputs)
        gates.of_tile = (cell.fed_alike(stage) ? sum : static_cast<const T*>(input) + place * inputs * L) - first * L;
      forward_units<Cell, stage, V, S>(step, w, rows[r], u, n, cell.fed_alike(stage) && !step.gates ? nullptr : sum, L, gates, e);
      if constexpr (count > 0) put_sums<count>(e, n, step.partial + rows[r] * step.partial_row + u / L * 2 * count);
    }
  }
}

template <class Cell, int stage, class V, class S>
void backward(const BackwardStep& step, const RowSet& rows, int64_t unit, int64_t end, int blocks, const void* sums) {
  constexpr int L = V::lanes, vectors = InfoOf<Cell>::value.vectors, count = InfoOf<Cell>::value.stage[stage].back_sums;
  for (int b = 0; b < blocks && unit + b * L < end; ++b) {
    const int64_t u = unit + b * L;
    const int n = int(end - u < L ? end - u : L);
    V w[vectors ? vectors : 1];
    load_vectors<Cell, V, S>(step.vectors, u, n, w);
    for (int r = 0; r < rows.count; ++r) {
      V e[count ? count : 1];
      backward_units<Cell, stage, V, S>(step, w, rows[r], u, n,
                                        sums ? static_cast<const typename V::element*>(sums) + (r * blocks + b) * L : nullptr, e);
      if constexpr (count > 0) put_sums<count>(e, n, step.partial + rows[r] * step.partial_row + u / L * 2 * count);
    }
  }
}

// Every tile that fits the registers, from `vectors` × `rows` on.
template <class V, class C, class W, int registers, int vectors = 1, int rows = 1>
constexpr void add_products(Tiles& tiles) {
  if constexpr (rows == 1 || vectors * rows <= registers) tiles.tile[vectors - 1][rows - 1] = product<V, C, W, vectors, rows>;
  if constexpr (rows < kMaxFmaRows) {
    add_products<V, C, W, registers, vectors, rows + 1>(tiles);
  } else if constexpr (vectors < kMaxVectorsPerPanel) {
    add_products<V, C, W, registers, vectors + 1>(tiles);
  }
}

template <class V, int registers>
constexpr NumberOps number_ops() {
  using T = typename V::element;
  NumberOps ops{V::lanes, registers, {}, {}, add<V, T>, multiply_add<V>, merge<V>};
  add_products<V, V, T, registers>(ops.products[int(WeightType::Numbers)]);
  if constexpr (sizeof(T) == 4) {
    add_products<V, V, bf16, registers>(ops.products[int(WeightType::BF16)]);
    add_products<V, V, int8_t, registers>(ops.products[int(WeightType::Int8)]);
    ops.narrow[int(WeightType::BF16)] = narrow_bf16<V>;
    ops.narrow[int(WeightType::Int8)] = narrow_int8<V>;
  }
  return ops;
}

template <class V, class S>
constexpr StorageOps storage_ops() {
  return {{pack<V, S>, spread<V, S>, turn<V, S>}, put<V, S>, load<V, S>, add<V, S>, store<V, S>};
}

// V: their sums.
template <class V, class P, int registers>
constexpr PairOps pair_ops() {
  PairOps ops{{}, nullptr, nullptr, {pack<P, bf16>, spread<P, bf16>, turn<P, bf16>}, narrow_pairs<P>};
  add_products<V, P, Pair, registers>(ops.products);
  return ops;
}

template <class Cell, class V, class S>
constexpr PageOps page_ops() {
  constexpr int stages = InfoOf<Cell>::value.stages;
  PageOps ops{};
  ops.forward[0] = forward<Cell, 0, V, S>;
  ops.backward[0] = backward<Cell, 0, V, S>;
  if constexpr (stages > 1) ops.forward[1] = forward<Cell, 1, V, S>, ops.backward[1] = backward<Cell, 1, V, S>;
  if constexpr (stages > 2) ops.forward[2] = forward<Cell, 2, V, S>, ops.backward[2] = backward<Cell, 2, V, S>;
  if constexpr (stages > 3) ops.forward[3] = forward<Cell, 3, V, S>, ops.backward[3] = backward<Cell, 3, V, S>;
  return ops;
}

// In the order of Storage.
template <class Cell, class F32, class F64>
constexpr Page make_page(const char* name, const char* page = "") {
#if RNNKERNELS_SANITIZED  // for whose tests these are enough: each type takes minutes
  return {describe<Cell>(name, page), {page_ops<Cell, F32, float>(), page_ops<Cell, F64, double>()}};
#else
  return {describe<Cell>(name, page),
          {page_ops<Cell, F32, float>(), page_ops<Cell, F64, double>(), page_ops<Cell, F32, bf16>(), page_ops<Cell, F32, f16>()}};
#endif
}

template <class F32, class F64, int registers>
constexpr Isa make_isa(const char* name) {
  return {name,
          name,
          fingerprint<F32>,
          {number_ops<F32, registers>(), number_ops<F64, registers>()},
          {storage_ops<F32, float>(), storage_ops<F64, double>(), storage_ops<F32, bf16>(), storage_ops<F32, f16>()},
          {
#define RNN_CELL(cell, heat, ...) make_page<Complete<__VA_ARGS__>, F32, F64>(#cell, #__VA_ARGS__),
#include "cells/cells.def"
#undef RNN_CELL
          },
          nullptr};
}

template <class F32, class Pairs, int registers>
constexpr Bfloat16 make_bfloat16() {
  return {pair_ops<F32, Pairs, registers>(),
          storage_ops<F32, bf16>(),
          {
#if !RNNKERNELS_SANITIZED
#define RNN_CELL(cell, heat, ...) page_ops<Complete<__VA_ARGS__>, F32, bf16>(),
#include "cells/cells.def"
#undef RNN_CELL
#endif
          }};
}

}  // namespace rnnkernels::cpu
