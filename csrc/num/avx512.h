// Numbers of 512 bits. For files compiled with -mavx512f -mavx512dq -mavx512bw -mavx512vl -mavx2 -mfma -mf16c.
#pragma once

// gcc 12 takes the "undefined" operand inside its own intrinsics for a mistake (its bug 105593).
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#include <immintrin.h>
#pragma GCC diagnostic pop
#include <stdint.h>

#include "math.h"
#include "storage.h"

// avx512bf16.h has the same numbers, with conversions of its own.
#ifndef RNN_AVX512
#define RNN_AVX512 avx512
#endif

namespace rnnkernels {
namespace RNN_AVX512 {

RNN_FN __mmask16 first16(int n) {
  return _mm512_cmplt_epi32_mask(_mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15), _mm512_set1_epi32(n));
}

RNN_FN __m512 widen(bf16, __m256i x) { return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(x), 16)); }
RNN_FN __m512 widen(f16, __m256i x) { return _mm512_cvtph_ps(x); }
RNN_FN __m256i narrow(f16, __m512 x) { return _mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
#ifdef __AVX512BF16__
RNN_FN __m256i narrow(bf16, __m512 x) { return __m256i(_mm512_cvtneps_pbh(x)); }
#else
RNN_FN __m256i narrow(bf16, __m512 x) {
  const __m512i u = _mm512_castps_si512(x), odd = _mm512_and_si512(_mm512_srli_epi32(u, 16), _mm512_set1_epi32(1));
  const __m512i rounded = _mm512_add_epi32(u, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
  const __mmask16 nan = _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q);  // rounding could carry a NaN into infinity
  return _mm512_cvtepi32_epi16(_mm512_srli_epi32(_mm512_mask_or_epi32(rounded, nan, u, _mm512_set1_epi32(0x00400000)), 16));
}
#endif

struct F32 {
  using element = float;
  static constexpr int lanes = 16;
  struct Mask {
    __mmask16 m;
  };
  __m512 v;

  F32() = default;
  RNN_FN F32(float x) : v(_mm512_set1_ps(x)) {}
  RNN_FN explicit F32(__m512 x) : v(x) {}

  RNN_FN static F32 load(const float* p) { return F32(_mm512_loadu_ps(p)); }
  RNN_FN static F32 load(const int8_t* p) {
    return F32(_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)))));
  }
  // Two vectors whose lanes lie in one word each, the first's below: one operation widens each.
  RNN_FN static void load_two(const bf16* p, F32& low, F32& high) {
    const __m512i both = _mm512_loadu_si512(p);
    low.v = _mm512_castsi512_ps(_mm512_slli_epi32(both, 16));
    high.v = _mm512_castsi512_ps(_mm512_and_si512(both, _mm512_set1_epi32(int(0xffff0000u))));
  }
  RNN_FN static void store_two(bf16* p, F32 low, F32 high) {
    const __m512i below = _mm512_cvtepu16_epi32(narrow(bf16{}, low.v)), above = _mm512_cvtepu16_epi32(narrow(bf16{}, high.v));
    _mm512_storeu_si512(p, _mm512_or_si512(below, _mm512_slli_epi32(above, 16)));
  }
  // Full vectors go unmasked: a masked store cannot be forwarded to the load that follows it.
  RNN_FN static F32 load(const float* p, int n) { return n >= lanes ? load(p) : F32(_mm512_maskz_loadu_ps(first16(n), p)); }
  template <class S>
  RNN_FN static F32 load(const S* p) {
    return F32(widen(S{}, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))));
  }
  template <class S>
  RNN_FN static F32 load(const S* p, int n) {
    return F32(widen(S{}, _mm256_maskz_loadu_epi16(first16(n), p)));
  }
  template <class S>
  RNN_FN static F32 broadcast(const S* p) {
    return rnnkernels::widen(*p);
  }
  RNN_FN void store(float* p) const { _mm512_storeu_ps(p, v); }
  RNN_FN void store(float* p, int n) const { n >= lanes ? store(p) : _mm512_mask_storeu_ps(p, first16(n), v); }
  template <class S>
  RNN_FN void store(S* p) const {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), narrow(S{}, v));
  }
  template <class S>
  RNN_FN void store(S* p, int n) const {
    _mm256_mask_storeu_epi16(p, first16(n), narrow(S{}, v));
  }
};

RNN_FN F32 operator+(F32 a, F32 b) { return F32(_mm512_add_ps(a.v, b.v)); }
RNN_FN F32 operator-(F32 a, F32 b) { return F32(_mm512_sub_ps(a.v, b.v)); }
RNN_FN F32 operator*(F32 a, F32 b) { return F32(_mm512_mul_ps(a.v, b.v)); }
RNN_FN F32 operator/(F32 a, F32 b) { return F32(_mm512_div_ps(a.v, b.v)); }
RNN_FN F32 operator-(F32 a) { return F32(-a.v); }
RNN_FN F32 fma(F32 a, F32 b, F32 c) { return F32(_mm512_fmadd_ps(a.v, b.v, c.v)); }
RNN_FN F32 min(F32 a, F32 b) { return F32(_mm512_min_ps(a.v, b.v)); }
RNN_FN F32 max(F32 a, F32 b) { return F32(_mm512_max_ps(a.v, b.v)); }
RNN_FN F32::Mask lt(F32 a, F32 b) { return {_mm512_cmp_ps_mask(a.v, b.v, _CMP_LT_OQ)}; }
RNN_FN F32 select(F32::Mask m, F32 a, F32 b) { return F32(_mm512_mask_blend_ps(m.m, b.v, a.v)); }
RNN_FN F32 sqrt(F32 a) { return F32(_mm512_sqrt_ps(a.v)); }
RNN_FN F32 abs(F32 a) { return F32(_mm512_andnot_ps(_mm512_set1_ps(-0.f), a.v)); }
RNN_FN F32 copysign(F32 a, F32 s) {
  const __m512 sign = _mm512_set1_ps(-0.f);
  return F32(_mm512_or_ps(_mm512_andnot_ps(sign, a.v), _mm512_and_ps(sign, s.v)));
}
RNN_FN F32 interleave_low(F32 a, F32 b) {
  return F32(_mm512_permutex2var_ps(a.v, _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23), b.v));
}
RNN_FN F32 interleave_high(F32 a, F32 b) {
  return F32(_mm512_permutex2var_ps(a.v, _mm512_setr_epi32(8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31), b.v));
}
RNN_FN F32 power(F32 t) { return F32(_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_castps_si512(t.v), 23))); }

struct F64 {
  using element = double;
  static constexpr int lanes = 8;
  struct Mask {
    __mmask8 m;
  };
  __m512d v;

  F64() = default;
  RNN_FN F64(double x) : v(_mm512_set1_pd(x)) {}
  RNN_FN explicit F64(__m512d x) : v(x) {}

  RNN_FN static F64 load(const double* p) { return F64(_mm512_loadu_pd(p)); }
  RNN_FN static F64 load(const double* p, int n) { return n >= lanes ? load(p) : F64(_mm512_maskz_loadu_pd(__mmask8(first16(n)), p)); }
  RNN_FN static F64 broadcast(const double* p) { return *p; }
  RNN_FN void store(double* p) const { _mm512_storeu_pd(p, v); }
  RNN_FN void store(double* p, int n) const { n >= lanes ? store(p) : _mm512_mask_storeu_pd(p, __mmask8(first16(n)), v); }
};

RNN_FN F64 operator+(F64 a, F64 b) { return F64(_mm512_add_pd(a.v, b.v)); }
RNN_FN F64 operator-(F64 a, F64 b) { return F64(_mm512_sub_pd(a.v, b.v)); }
RNN_FN F64 operator*(F64 a, F64 b) { return F64(_mm512_mul_pd(a.v, b.v)); }
RNN_FN F64 operator/(F64 a, F64 b) { return F64(_mm512_div_pd(a.v, b.v)); }
RNN_FN F64 operator-(F64 a) { return F64(-a.v); }
RNN_FN F64 fma(F64 a, F64 b, F64 c) { return F64(_mm512_fmadd_pd(a.v, b.v, c.v)); }
RNN_FN F64 min(F64 a, F64 b) { return F64(_mm512_min_pd(a.v, b.v)); }
RNN_FN F64 max(F64 a, F64 b) { return F64(_mm512_max_pd(a.v, b.v)); }
RNN_FN F64::Mask lt(F64 a, F64 b) { return {_mm512_cmp_pd_mask(a.v, b.v, _CMP_LT_OQ)}; }
RNN_FN F64 select(F64::Mask m, F64 a, F64 b) { return F64(_mm512_mask_blend_pd(m.m, b.v, a.v)); }
RNN_FN F64 sqrt(F64 a) { return F64(_mm512_sqrt_pd(a.v)); }
RNN_FN F64 abs(F64 a) { return F64(_mm512_andnot_pd(_mm512_set1_pd(-0.), a.v)); }
RNN_FN F64 copysign(F64 a, F64 s) {
  const __m512d sign = _mm512_set1_pd(-0.);
  return F64(_mm512_or_pd(_mm512_andnot_pd(sign, a.v), _mm512_and_pd(sign, s.v)));
}
RNN_FN F64 interleave_low(F64 a, F64 b) { return F64(_mm512_permutex2var_pd(a.v, _mm512_setr_epi64(0, 8, 1, 9, 2, 10, 3, 11), b.v)); }
RNN_FN F64 interleave_high(F64 a, F64 b) { return F64(_mm512_permutex2var_pd(a.v, _mm512_setr_epi64(4, 12, 5, 13, 6, 14, 7, 15), b.v)); }
RNN_FN F64 power(F64 t) { return F64(_mm512_castsi512_pd(_mm512_slli_epi64(_mm512_castpd_si512(t.v), 52))); }

using math::exp;
using math::relu;
using math::sigmoid;
using math::tanh;

}  // namespace RNN_AVX512
}  // namespace rnnkernels
