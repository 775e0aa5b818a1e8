// The numbers of avx512.h, which become bfloat16 by one operation here, and pairs of bfloat16, multiplied two at once and added up in
// float: exact products, rounded sums. Whatever is bfloat16 below the normal numbers is zero to both. For files compiled with -mavx512bf16
// besides what avx512.h asks for.
#pragma once

#define RNN_AVX512 avx512bf16
#include "avx512.h"

namespace rnnkernels {
namespace avx512bf16 {

// No numbers for pages.
struct Pairs {
  using element = Pair;
  static constexpr int lanes = 16;
  __m512i v;

  Pairs() = default;
  RNN_FN explicit Pairs(int word) : v(_mm512_set1_epi32(word)) {}
  RNN_FN explicit Pairs(__m512i x) : v(x) {}

  RNN_FN static Pairs load(const Pair* p) { return Pairs(_mm512_loadu_si512(p)); }
  RNN_FN static Pairs broadcast(const Pair* p) {
    int word;
    __builtin_memcpy(&word, p, sizeof word);
    return Pairs(word);
  }
  // Of a row in memory so many numbers, the rest zeros.
  RNN_FN static Pairs load(const bf16* p, int n) {
    return Pairs(n >= 2 * lanes ? _mm512_loadu_si512(p) : _mm512_maskz_loadu_epi16((uint32_t(1) << n) - 1, p));
  }
  // So many pairs of what lies in two rows, null for zeros.
  RNN_FN static Pairs zip(const bf16* low, const bf16* high, int n) {
    const auto row = [n](const bf16* p) __attribute__((always_inline)) {
      return p ? _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(first16(n), p)) : _mm512_setzero_si512();
    };
    return Pairs(_mm512_or_si512(row(low), _mm512_slli_epi32(row(high), 16)));
  }
  // So many numbers, rounded, the rest zeros.
  RNN_FN static Pairs narrow(const float* p, int n) {
    const int first = n < lanes ? n : lanes;
    return Pairs(__m512i(_mm512_cvtne2ps_pbh(F32::load(p + first, n - first).v, F32::load(p, first).v)));
  }
  RNN_FN void store(Pair* p) const { _mm512_storeu_si512(p, v); }
  RNN_FN void store(Pair* p, int n) const { _mm512_mask_storeu_epi32(p, first16(n), v); }
};

RNN_FN Pairs interleave_low(Pairs a, Pairs b) {
  return Pairs(_mm512_permutex2var_epi32(a.v, _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23), b.v));
}
RNN_FN Pairs interleave_high(Pairs a, Pairs b) {
  return Pairs(_mm512_permutex2var_epi32(a.v, _mm512_setr_epi32(8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31), b.v));
}

RNN_FN F32 fma(Pairs a, Pairs b, F32 c) { return F32(_mm512_dpbf16_ps(c.v, __m512bh(b.v), __m512bh(a.v))); }

}  // namespace avx512bf16
}  // namespace rnnkernels
