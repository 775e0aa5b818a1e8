// Kernels of the CPU engine over any number type: the product of rows and a panel, the pages between memory and registers, packing.
// Every function here is a template over a number type of its instruction set, so that none is shared between instruction sets.
#pragma once

#include <string.h>

#include "engines/cpu/table.h"

namespace rnnkernels::cpu {

// All columns of a unit lie in one lane; the tile's sums stay in registers while the panel, of elements W, streams by once. Meanwhile a
// tile that is tall enough to have time for it asks for memory that will be wanted next, a line for each k.
template <class V, class W, int vectors, int rows>
void product(const void* const* operand, const void* panel, int64_t depth, void* sums, const Soon* soon) {
  using T = typename V::element;
  const T* a[rows];
  for (int r = 0; r < rows; ++r) a[r] = static_cast<const T*>(operand[r]);
  constexpr bool scaled = sizeof(W) == 1;
  const T* const factors = static_cast<const T*>(panel);
  const W* w = scaled ? reinterpret_cast<const W*>(factors + vectors * V::lanes) : static_cast<const W*>(panel);
  V sum[rows][vectors];
#pragma GCC unroll 8
  for (int r = 0; r < rows; ++r)
#pragma GCC unroll 8
    for (int v = 0; v < vectors; ++v) sum[r][v] = V(0);
  const auto add = [&](int64_t k) __attribute__((always_inline)) {
    V column[vectors];
    if constexpr (sizeof(W) == 2) {
#pragma GCC unroll 8
      for (int v = 0; v + 1 < vectors; v += 2) V::load_two(w + v * V::lanes, column[v], column[v + 1]);
      if constexpr (vectors % 2) column[vectors - 1] = V::load(w + (vectors - 1) * V::lanes);
    } else {
#pragma GCC unroll 8
      for (int v = 0; v < vectors; ++v) column[v] = V::load(w + v * V::lanes);
    }
#pragma GCC unroll 8
    for (int r = 0; r < rows; ++r) {
      const V x = V::broadcast(a[r] + k);
#pragma GCC unroll 8
      for (int v = 0; v < vectors; ++v) sum[r][v] = fma(x, column[v], sum[r][v]);
    }
    w += vectors * V::lanes;
  };
  int64_t k = 0;
  if constexpr (asks_ahead(rows, vectors, V::lanes)) {
    const auto ask = [&](const Ahead& pieces, auto write) __attribute__((always_inline)) {
      const Ahead ahead = pieces;
      const int64_t first = k, end = depth - k < ahead.lines() ? depth : k + ahead.lines();
#pragma GCC unroll 2
      for (; k < end; ++k) {
        __builtin_prefetch(ahead.line(k - first), write.value, write.value ? 3 : 2);
        add(k);
      }
    };
    if (soon) {
      for (const Ahead& pieces : soon->reads) ask(pieces, Index<0>());
      ask(soon->writes, Index<1>());
    }
  }
#pragma GCC unroll 2
  for (; k < depth; ++k) add(k);
  T* out = static_cast<T*>(sums);
#pragma GCC unroll 8
  for (int r = 0; r < rows; ++r)
#pragma GCC unroll 8
    for (int v = 0; v < vectors; ++v)
      (scaled ? sum[r][v] * V::load(factors + v * V::lanes) : sum[r][v]).store(out + (r * vectors + v) * V::lanes);
}

// Of each k two vectors and two, as the product takes them.
template <class V>
void narrow_bf16(const void* numbers, int64_t depth, int64_t width, void* packed) {
  constexpr int L = V::lanes;
  const auto* from = static_cast<const typename V::element*>(numbers);
  auto* to = static_cast<bf16*>(packed);
  for (int64_t k = 0; k < depth; ++k, from += width, to += width) {
    int64_t i = 0;
    for (; i + 2 * L <= width; i += 2 * L) V::store_two(to + i, V::load(from + i), V::load(from + i + L));
    if (i < width) V::load(from + i).store(to + i);
  }
}

// A column's largest magnitude becomes 127. What is not finite makes all of its column's results NaN.
template <class V>
void narrow_int8(const void* numbers, int64_t depth, int64_t width, void* packed) {
  using T = typename V::element;
  const T* const from = static_cast<const T*>(numbers);
  T* const factors = static_cast<T*>(packed);
  int8_t* const to = reinterpret_cast<int8_t*>(factors + width);
  for (int64_t c = 0; c < width; ++c) {
    T most = 0;
    for (int64_t k = 0; k < depth; ++k) {
      const T x = from[k * width + c], magnitude = x < 0 ? -x : x;
      if (magnitude > most || x != x) most = magnitude;
    }
    const bool finite = most - most == 0;
    const T factor = finite ? most / 127 : most - most;
    factors[c] = factor;
    for (int64_t k = 0; k < depth; ++k) {
      const T steps = finite && factor > 0 ? from[k * width + c] / factor : T(0);
      // The factor of the smallest numbers is rounded itself.
      const T bounded = steps > 127 ? T(127) : steps < -127 ? T(-127) : steps;
      to[k * width + c] = int8_t(bounded < 0 ? bounded - T(0.5) : bounded + T(0.5));
    }
  }
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

// Rows of a square of numbers become its columns: each round interleaves the first half with the second.
template <class V>
RNN_FN void transpose(V (&square)[V::lanes]) {
  constexpr int L = V::lanes;
  if constexpr (L > 1) {
    V other[L];
#pragma GCC unroll 8
    for (int round = 1; round < L; round *= 2) {
#pragma GCC unroll 16
      for (int i = 0; i < L / 2; ++i) {
        other[2 * i] = interleave_low(square[i], square[i + L / 2]);
        other[2 * i + 1] = interleave_high(square[i], square[i + L / 2]);
      }
#pragma GCC unroll 16
      for (int i = 0; i < L; ++i) square[i] = other[i];
    }
  }
}

template <class V, class S>
void pack(const void* weights, const Product& p, int blocks, int64_t begin, int64_t end, int64_t first, void* packed) {
  using T = typename V::element;
  constexpr int L = V::lanes;
  const S* w = static_cast<const S*>(weights);
  const int64_t vectors = int64_t(blocks) * p.columns;
  for (int64_t panel = begin; panel < end; ++panel) {
    T* out = static_cast<T*>(packed) + panel * p.depth * vectors * L;
    for (int64_t v = 0; v < vectors; ++v) {
      const int64_t column = v % p.columns, unit = (panel * blocks + v / p.columns) * L;
      const int64_t left = p.units - unit;
      const S* rows = w + (column * p.units + (left > 0 ? unit : 0)) * p.depth;
      for (int64_t k = first; k < p.depth; k += L) {
        const int n = int(p.depth - k < L ? p.depth - k : L);
        V square[L];
        for (int lane = 0; lane < L; ++lane) square[lane] = lane < left ? V::load(rows + lane * p.depth + k, n) : V(0);
        transpose(square);
        for (int i = 0; i < n; ++i) square[i].store(out + ((k + i) * vectors + v) * L);
      }
    }
  }
}

template <int bytes>
struct Words {
  typedef uint32_t Vector __attribute__((vector_size(bytes)));
};

// Each word of a stripe has two chains of its own, so that this is nearly as fast as memory. A chain's step is a bijection both of what it
// has and of what it takes in: one changed word is never lost, and of changes that fall into one word of their stripes one case in 2^64.
template <class V>
Fingerprint fingerprint(const void* const* stretches, int count, int64_t bytes) {
  constexpr int size = V::lanes > 4 ? V::lanes * 4 : 16, words = size / 4, parts = 4;
  using Vector = typename Words<size>::Vector;
  Vector one[parts], other[parts];
  for (int c = 0; c < parts; ++c)
    for (int i = 0; i < words; ++i) {
      one[c][i] = uint32_t(c * words + i + 1) * 0x85ebca6bu;
      other[c][i] = uint32_t(c * words + i + 1) * 0xc2b2ae35u;
    }
  const auto take = [&](const char* from) {
    for (int c = 0; c < parts; ++c) {
      Vector x;
      memcpy(&x, from + c * size, size);
      const Vector a = one[c] ^ x, b = other[c] + x;
      one[c] = (a << 13 | a >> 19) * 0x9e3779b1u;
      other[c] = (b << 15 | b >> 17) * 0xcc9e2d51u;
    }
  };
  for (int s = 0; s < count; ++s) {
    const char* const from = static_cast<const char*>(stretches[s]);
    int64_t at = 0;
    for (; at + size * parts <= bytes; at += size * parts) take(from + at);
    char last[size * parts] = {};
    memcpy(last, from + at, size_t(bytes - at));
    if (at < bytes) take(last);
  }
  Fingerprint found{{uint64_t(bytes), ~uint64_t(bytes)}};
  for (int c = 0; c < parts; ++c)
    for (int i = 0; i < words; ++i) {
      const uint64_t both = uint64_t(one[c][i]) << 32 | other[c][i];
      found.bits[0] = (found.bits[0] ^ both) * 0x9e3779b97f4a7c15u;
      found.bits[0] ^= found.bits[0] >> 29;
      found.bits[1] = (found.bits[1] + both) * 0xc2b2ae3d27d4eb4fu;
      found.bits[1] ^= found.bits[1] >> 32;
    }
  return found;
}

template <class V, class S>
void spread(const void* const* rows, const Product& p, int blocks, int64_t begin, int64_t end, int64_t first, int64_t last, void* packed) {
  using T = typename V::element;
  const int64_t width = int64_t(blocks) * V::lanes;
  for (int64_t panel = begin; panel < end; ++panel) {
    T* out = static_cast<T*>(packed) + (panel * p.depth + first) * width;
    for (int64_t k = first; k < last; ++k, out += width)
      for (int b = 0; b < blocks; ++b) {
        const int64_t unit = panel * width + b * V::lanes, left = rows[k] ? p.units - unit : 0;
        const V x = left > 0 ? V::load(static_cast<const S*>(rows[k]) + unit, int(left < V::lanes ? left : V::lanes)) : V(0);
        x.store(out + b * V::lanes);
      }
  }
}

template <class V, class S>
void turn(const void* const* tokens, int64_t first, int64_t width, int64_t count, void* turned, int64_t turned_row) {
  using T = typename V::element;
  constexpr int L = V::lanes;
  const auto at = [&](int64_t k, int64_t c) { return static_cast<const S*>(tokens[k]) + first + c; };
  for (int64_t k = 0; k < count; k += L)
    for (int64_t c = 0; c < width; c += L) {
      const int rows = int(count - k < L ? count - k : L), columns = int(width - c < L ? width - c : L);
      V square[L];
      for (int i = 0; i < L; ++i) square[i] = i < rows ? V::load(at(k + i, c), columns) : V(0);
      // Half of these rows are another core's, and no stream that hardware would foresee.
      for (int i = 0; i < L && k + L + i < count; ++i) __builtin_prefetch(at(k + L + i, c));
      transpose(square);
      for (int i = 0; i < columns; ++i) square[i].store(static_cast<T*>(turned) + (c + i) * turned_row + k, rows);
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
void put(const void* sums, const int64_t* tokens, int count, int64_t unit, int blocks, int columns, int64_t hidden, const void* bias,
         void* gates, int64_t gates_row, int64_t gates_slot) {
  using T = typename V::element;
  constexpr int L = V::lanes;
  const T* sum = static_cast<const T*>(sums);
  for (int r = 0; r < count; ++r)
    for (int b = 0; b < blocks && unit + b * L < hidden; ++b)
      for (int c = 0; c < columns; ++c) {
        const int64_t u = unit + b * L;
        const int n = int(hidden - unit - b * L < L ? hidden - unit - b * L : L);
        V x = V::load(sum + ((r * blocks + b) * columns + c) * L);
        if (bias) x = x + V::load(static_cast<const T*>(bias) + c * hidden + u, n);
        x.store(static_cast<S*>(gates) + tokens[r] * gates_row + c * gates_slot + u, n);
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

template <class Cell, int stage, class V, class S>
void forward(const ForwardStep& step, const RowSet& rows, int64_t unit, int64_t end, int blocks, const void* sums) {
  constexpr int L = V::lanes, columns = InfoOf<Cell>::value.hidden_slots(stage), vectors = InfoOf<Cell>::value.vectors;
  constexpr int count = InfoOf<Cell>::value.stage[stage].sums;
  for (int b = 0; b < blocks && unit + b * L < end; ++b) {
    const int64_t u = unit + b * L;
    const int n = int(end - u < L ? end - u : L);
    V w[vectors ? vectors : 1];
    load_vectors<Cell, V, S>(step.vectors, u, n, w);
    for (int r = 0; r < rows.count; ++r) {
      V e[count ? count : 1];
      forward_units<Cell, stage, V, S>(
          step, w, rows[r], u, n, sums ? static_cast<const typename V::element*>(sums) + (r * blocks + b) * columns * L : nullptr, L, e);
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
template <class V, class W, int registers, int vectors = 1, int rows = 1>
constexpr void add_products(NumberOps& ops, WeightType type) {
  if constexpr (rows == 1 || vectors * rows <= registers) ops.product[int(type)][vectors - 1][rows - 1] = product<V, W, vectors, rows>;
  if constexpr (rows < kMaxTileRows) {
    add_products<V, W, registers, vectors, rows + 1>(ops, type);
  } else if constexpr (vectors < kMaxVectorsPerPanel) {
    add_products<V, W, registers, vectors + 1>(ops, type);
  }
}

template <class V, int registers>
constexpr NumberOps number_ops() {
  using T = typename V::element;
  NumberOps ops{V::lanes, registers, {}, {}, add<V, T>, multiply_add<V>, merge<V>};
  add_products<V, T, registers>(ops, WeightType::Numbers);
  if constexpr (sizeof(T) == 4) {
    add_products<V, bf16, registers>(ops, WeightType::BF16);
    add_products<V, int8_t, registers>(ops, WeightType::Int8);
    ops.narrow[int(WeightType::BF16)] = narrow_bf16<V>;
    ops.narrow[int(WeightType::Int8)] = narrow_int8<V>;
  }
  return ops;
}

template <class V, class S>
constexpr StorageOps storage_ops() {
  return {pack<V, S>, spread<V, S>, turn<V, S>, put<V, S>, load<V, S>, add<V, S>, store<V, S>};
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
          fingerprint<F32>,
          {number_ops<F32, registers>(), number_ops<F64, registers>()},
          {storage_ops<F32, float>(), storage_ops<F64, double>(), storage_ops<F32, bf16>(), storage_ops<F32, f16>()},
          {
#define RNN_CELL(cell, heat, ...) make_page<Complete<__VA_ARGS__>, F32, F64>(#cell, #__VA_ARGS__),
#include "cells/cells.def"
#undef RNN_CELL
          }};
}

}  // namespace rnnkernels::cpu
