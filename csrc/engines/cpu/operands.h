// How matrices come to lie as products take them, over any number type: packed, spread, turned, made narrower, and told from others.
// Templates for the same reason as in kernels.h.
#pragma once

#include <string.h>

#include "engines/cpu/table.h"

namespace rnnkernels::cpu {

// How many numbers of a depth an element holds.
template <class E>
constexpr int kNumbersIn = 1;
template <>
inline constexpr int kNumbersIn<Pair> = 2;

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

template <class P>
void narrow_pairs(const void* numbers, int64_t n, void* pairs) {
  for (int64_t i = 0; i < n; i += 2 * P::lanes) {
    const int m = int(n - i < 2 * P::lanes ? n - i : 2 * P::lanes);
    P::narrow(static_cast<const float*>(numbers) + i, m).store(static_cast<Pair*>(pairs) + i / 2, int(ceil_div(m, 2)));
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
  constexpr int L = V::lanes, in = kNumbersIn<T>;
  const S* w = static_cast<const S*>(weights);
  const int64_t vectors = int64_t(blocks) * p.columns;
  for (int64_t panel = begin; panel < end; ++panel) {
    T* out = static_cast<T*>(packed) + panel * ceil_div(p.depth, in) * vectors * L;
    for (int64_t v = 0; v < vectors; ++v) {
      const int64_t column = v % p.columns, unit = (panel * blocks + v / p.columns) * L;
      const int64_t left = p.units - unit;
      const S* rows = w + (column * p.units + (left > 0 ? unit : 0)) * p.depth;
      for (int64_t k = first; k < p.depth; k += L * in) {
        const int n = int(p.depth - k < L * in ? p.depth - k : L * in);
        V square[L];
        for (int lane = 0; lane < L; ++lane) square[lane] = lane < left ? V::load(rows + lane * p.depth + k, n) : V(0);
        transpose(square);
        for (int i = 0; i < ceil_div(n, in); ++i) square[i].store(out + ((k / in + i) * vectors + v) * L);
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

// Of row k, or of rows k and k + 1, as far as there are so many, n elements; null is zeros.
template <class V, class S>
RNN_FN V load_rows(const void* const* rows, int64_t k, int64_t count, int64_t unit, int n) {
  const auto row = [&](int64_t i) __attribute__((always_inline)) {
    return i < count && n > 0 && rows[i] ? static_cast<const S*>(rows[i]) + unit : nullptr;
  };
  if constexpr (kNumbersIn<typename V::element> == 2)
    return V::zip(row(k), row(k + 1), n);
  else
    return row(k) ? V::load(row(k), n) : V(0);
}

template <class V, class S>
void spread(const void* const* rows, const Product& p, int blocks, int64_t begin, int64_t end, int64_t first, int64_t last, void* packed) {
  using T = typename V::element;
  constexpr int L = V::lanes, in = kNumbersIn<T>;
  const int64_t width = int64_t(blocks) * L;
  for (int64_t panel = begin; panel < end; ++panel) {
    T* out = static_cast<T*>(packed) + (panel * ceil_div(p.depth, in) + first / in) * width;
    for (int64_t k = first; k < last; k += in, out += width)
      for (int b = 0; b < blocks; ++b) {
        const int64_t unit = panel * width + b * L, left = p.units - unit;
        load_rows<V, S>(rows, k, last, unit, int(left < L ? left : L)).store(out + b * L);
      }
  }
}

template <class V, class S>
void turn(const void* const* tokens, int64_t first, int64_t width, int64_t count, void* turned, int64_t turned_row) {
  using T = typename V::element;
  constexpr int L = V::lanes, in = kNumbersIn<T>;
  for (int64_t k = 0; k < count; k += L * in)
    for (int64_t c = 0; c < width; c += L) {
      const int elements = int(ceil_div(count - k < L * in ? count - k : L * in, in)), columns = int(width - c < L ? width - c : L);
      V square[L];
      for (int i = 0; i < L; ++i) square[i] = load_rows<V, S>(tokens, k + i * in, count, first + c, columns);
      // Half of these rows are another core's, and no stream that hardware would foresee.
      for (int64_t i = k + L * in; i < k + 2 * L * in && i < count; ++i) __builtin_prefetch(static_cast<const S*>(tokens[i]) + first + c);
      transpose(square);
      for (int i = 0; i < columns; ++i) square[i].store(static_cast<T*>(turned) + (c + i) * turned_row + k / in, elements);
    }
}

}  // namespace rnnkernels::cpu
