// How a warp multiplies its panels of a matrix by the rows of a batch: what a lane holds of an item of weights, what it adds to its sums
// and which sums these are. Operands are rows of 4-byte words in shared memory, a float or two halves each.
#pragma once

#include <type_traits>

#include "core/tiling.h"

namespace rnnkernels::cuda {

struct alignas(16) Word {
  uint32_t x[4];
};

RNN_FN Word load_word(const uint32_t* from) { return *reinterpret_cast<const Word*>(from); }

struct Place {
  int row, word;  // of the panel; of the item's part of the operand
};

// Scalar multiply-adds, exact float32: a lane has one row of the panel, an item is four numbers of it.
struct Exact {
  static constexpr ProductShape shape = kExactShape;
  struct Sum {
    float x[shape.group];
  };
  RNN_FN explicit Exact(const Problem&) {}

  RNN_FN static Place place(int lane, int panel_rows, int, int e) { return {lane % panel_rows, e}; }

  template <class Cta>
  RNN_FN void add(Cta&, Sum& sum, const Word* item, const uint32_t* operand, int row_words, int rows) const {
    RNN_UNROLL
    for (int n = 0; n < shape.group; ++n) {
      if (n >= rows) continue;
      const Word a = load_word(operand + n * row_words);
      RNN_UNROLL
      for (int e = 0; e < 4; ++e) sum.x[n] = multiply_add(float_of_bits(item->x[e]), float_of_bits(a.x[e]), sum.x[n]);
    }
  }
  template <class To>
  RNN_FN static void give(int lane, int panel_rows, const Sum& sum, int rows, const To& to) {
    RNN_UNROLL
    for (int n = 0; n < shape.group; ++n)
      if (n < rows) to(n, lane % panel_rows, sum.x[n]);
  }

  RNN_FN static float multiply_add(float a, float b, float c) {
#ifdef __CUDA_ARCH__
    return __fmaf_rn(a, b, c);
#else
    return a * b + c;
#endif
  }
};

enum class Fragment { Bf16, F16, Tf32 };  // mma.m16n8k16, m16n8k16, m16n8k8

// Tensor cores: the matrix is the operand of 16 rows, the batch that of 8 columns. Lane l holds rows l/4 and l/4 + 8 of a fragment; the
// depth's order is free as long as both operands agree, so it takes its depth from 16 consecutive bytes: words 4 (l % 4) … + 3, two for
// each of the item's fragments.
template <Fragment kind>
struct Tensor {
  static constexpr ProductShape shape = kind == Fragment::Tf32 ? kTf32Shape : kHalfShape;
  static constexpr int kColumns = 8, kTiles = shape.group / kColumns;
  struct Sum {
    float x[kTiles][4];
  };
  const bool thrice;
  RNN_FN explicit Tensor(const Problem& p) : thrice(p.products == Products::ThreeTf32) {}

  RNN_FN static Place place(int lane, int, int w, int e) { return {lane / 4 + 8 * (e % 2), lane % 4 * 4 + 2 * w + e / 2}; }

  template <class Cta>
  RNN_FN void add(Cta& cta, Sum& sum, const Word* item, const uint32_t* operand, int row_words, int rows) const {
    const int lane = cta.thread() % 32;
    RNN_UNROLL
    for (int n = 0; n < kTiles; ++n) {
      if (n * kColumns >= rows) continue;
      const Word b = load_word(operand + (n * kColumns + lane / 4) * row_words + lane % 4 * 4);
      RNN_UNROLL
      for (int w = 0; w < shape.item_words; ++w) {
        if constexpr (kind == Fragment::Tf32)
          add_tf32(cta, sum.x[n], item[w].x, b.x + 2 * w);
        else
          cta.template mma<kind>(sum.x[n], item[w].x, b.x + 2 * w);
      }
    }
  }
  template <class To>
  RNN_FN static void give(int lane, int, const Sum& sum, int rows, const To& to) {
    RNN_UNROLL
    for (int n = 0; n < kTiles; ++n) {
      if (n * kColumns >= rows) continue;
      RNN_UNROLL
      for (int e = 0; e < 4; ++e) to(n * kColumns + lane % 4 * 2 + e % 2, lane / 4 + 8 * (e / 2), sum.x[n][e]);
    }
  }

 private:
  // Each number as the sum of two of 11 bits; the product of both small parts is left away.
  template <class Cta>
  RNN_FN void add_tf32(Cta& cta, float (&sum)[4], const uint32_t (&a)[4], const uint32_t* b) const {
    uint32_t high[4], high_b[2];
    RNN_UNROLL
    for (int e = 0; e < 4; ++e) high[e] = rounded(a[e]);
    RNN_UNROLL
    for (int e = 0; e < 2; ++e) high_b[e] = rounded(b[e]);
    if (thrice) {
      uint32_t low[4], low_b[2];
      RNN_UNROLL
      for (int e = 0; e < 4; ++e) low[e] = rounded(float_bits(float_of_bits(a[e]) - float_of_bits(high[e])));
      RNN_UNROLL
      for (int e = 0; e < 2; ++e) low_b[e] = rounded(float_bits(float_of_bits(b[e]) - float_of_bits(high_b[e])));
      cta.template mma<kind>(sum, low, high_b);
      cta.template mma<kind>(sum, high, low_b);
    }
    cta.template mma<kind>(sum, high, high_b);
  }
  RNN_FN static uint32_t rounded(uint32_t bits) {
#ifdef __CUDA_ARCH__
    uint32_t r;  // volatile: split ahead of the loop, the weights would take twice the registers
    asm volatile("cvt.rna.tf32.f32 %0, %1;" : "=r"(r) : "f"(float_of_bits(bits)));
    return r;
#else
    return (bits & 0x7f800000) == 0x7f800000 ? bits : (bits + 0x1000) & ~0x1fffu;
#endif
  }
};

}  // namespace rnnkernels::cuda
