// Numbers of 256 bits. For files compiled with -mavx2 -mfma -mf16c.
#pragma once

#include <immintrin.h>
#include <stdint.h>

#include "math.h"
#include "storage.h"

namespace rnnkernels {
namespace avx2 {

// 16-bit types have no masked moves here: the first n < 8 of them go through a buffer in at most three moves of constant size.
RNN_FN void copy_part(void* to, const void* from, int n) {
  char* t = static_cast<char*>(to);
  const char* f = static_cast<const char*>(from);
  if (n & 4) __builtin_memcpy(t, f, 8);
  if (n & 2) __builtin_memcpy(t + 2 * (n & 4), f + 2 * (n & 4), 4);
  if (n & 1) __builtin_memcpy(t + 2 * (n & 6), f + 2 * (n & 6), 2);
}
RNN_FN __m128i load16(const void* p) { return _mm_loadu_si128(static_cast<const __m128i*>(p)); }
RNN_FN __m128i load16(const void* p, int n) {
  if (n >= 8) return load16(p);
  __m128i part = _mm_setzero_si128();
  if (n > 0) copy_part(&part, p, n);
  return part;
}
RNN_FN void store16(void* p, __m128i x) { _mm_storeu_si128(static_cast<__m128i*>(p), x); }
RNN_FN void store16(void* p, __m128i x, int n) {
  if (n >= 8) return store16(p, x);
  if (n > 0) copy_part(p, &x, n);
}

RNN_FN __m256 widen(bf16, __m128i x) { return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(x), 16)); }
RNN_FN __m256 widen(f16, __m128i x) { return _mm256_cvtph_ps(x); }
RNN_FN __m128i narrow(f16, __m256 x) { return _mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
RNN_FN __m128i narrow(bf16, __m256 x) {
  const __m256i u = _mm256_castps_si256(x), odd = _mm256_and_si256(_mm256_srli_epi32(u, 16), _mm256_set1_epi32(1));
  const __m256i rounded = _mm256_add_epi32(u, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
  const __m256i quiet = _mm256_or_si256(u, _mm256_set1_epi32(0x00400000));  // rounding could carry a NaN into infinity
  const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(x, x, _CMP_UNORD_Q));
  const __m256i high = _mm256_srli_epi32(_mm256_blendv_epi8(rounded, quiet, nan), 16);
  return _mm_packus_epi32(_mm256_castsi256_si128(high), _mm256_extracti128_si256(high, 1));
}

struct F32 {
  using element = float;
  static constexpr int lanes = 8;
  struct Mask {
    __m256 m;
  };
  __m256 v;

  F32() = default;
  RNN_FN F32(float x) : v(_mm256_set1_ps(x)) {}
  RNN_FN explicit F32(__m256 x) : v(x) {}

  RNN_FN static F32 load(const float* p) { return F32(_mm256_loadu_ps(p)); }
  RNN_FN static F32 load(const int8_t* p) {
    return F32(_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)))));
  }
  RNN_FN static void load_two(const bf16* p, F32& low, F32& high) {
    const __m256i both = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    low.v = _mm256_castsi256_ps(_mm256_slli_epi32(both, 16));
    high.v = _mm256_castsi256_ps(_mm256_and_si256(both, _mm256_set1_epi32(int(0xffff0000u))));
  }
  RNN_FN static void store_two(bf16* p, F32 low, F32 high) {
    const __m256i below = _mm256_cvtepu16_epi32(narrow(bf16{}, low.v)), above = _mm256_cvtepu16_epi32(narrow(bf16{}, high.v));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm256_or_si256(below, _mm256_slli_epi32(above, 16)));
  }
  RNN_FN static F32 load(const float* p, int n) { return n >= lanes ? load(p) : F32(_mm256_maskload_ps(p, first(n))); }
  template <class S>
  RNN_FN static F32 load(const S* p) {
    return F32(widen(S{}, load16(p)));
  }
  template <class S>
  RNN_FN static F32 load(const S* p, int n) {
    return F32(widen(S{}, load16(p, n)));
  }
  template <class S>
  RNN_FN static F32 broadcast(const S* p) {
    return rnnkernels::widen(*p);
  }
  RNN_FN void store(float* p) const { _mm256_storeu_ps(p, v); }
  RNN_FN void store(float* p, int n) const {
    if (n >= lanes) return store(p);
    _mm256_maskstore_ps(p, first(n), v);
  }
  template <class S>
  RNN_FN void store(S* p) const {
    store16(p, narrow(S{}, v));
  }
  template <class S>
  RNN_FN void store(S* p, int n) const {
    store16(p, narrow(S{}, v), n);
  }

 private:
  RNN_FN static __m256i first(int n) { return _mm256_cmpgt_epi32(_mm256_set1_epi32(n), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7)); }
};

RNN_FN F32 operator+(F32 a, F32 b) { return F32(_mm256_add_ps(a.v, b.v)); }
RNN_FN F32 operator-(F32 a, F32 b) { return F32(_mm256_sub_ps(a.v, b.v)); }
RNN_FN F32 operator*(F32 a, F32 b) { return F32(_mm256_mul_ps(a.v, b.v)); }
RNN_FN F32 operator/(F32 a, F32 b) { return F32(_mm256_div_ps(a.v, b.v)); }
RNN_FN F32 operator-(F32 a) { return F32(-a.v); }
RNN_FN F32 fma(F32 a, F32 b, F32 c) { return F32(_mm256_fmadd_ps(a.v, b.v, c.v)); }
RNN_FN F32 min(F32 a, F32 b) { return F32(_mm256_min_ps(a.v, b.v)); }
RNN_FN F32 max(F32 a, F32 b) { return F32(_mm256_max_ps(a.v, b.v)); }
RNN_FN F32::Mask lt(F32 a, F32 b) { return {_mm256_cmp_ps(a.v, b.v, _CMP_LT_OQ)}; }
RNN_FN F32 select(F32::Mask m, F32 a, F32 b) { return F32(_mm256_blendv_ps(b.v, a.v, m.m)); }
RNN_FN F32 sqrt(F32 a) { return F32(_mm256_sqrt_ps(a.v)); }
RNN_FN F32 abs(F32 a) { return F32(_mm256_andnot_ps(_mm256_set1_ps(-0.f), a.v)); }
RNN_FN F32 copysign(F32 a, F32 s) {
  const __m256 sign = _mm256_set1_ps(-0.f);
  return F32(_mm256_or_ps(_mm256_andnot_ps(sign, a.v), _mm256_and_ps(sign, s.v)));
}
RNN_FN F32 interleave_low(F32 a, F32 b) {
  return F32(_mm256_permute2f128_ps(_mm256_unpacklo_ps(a.v, b.v), _mm256_unpackhi_ps(a.v, b.v), 0x20));
}
RNN_FN F32 interleave_high(F32 a, F32 b) {
  return F32(_mm256_permute2f128_ps(_mm256_unpacklo_ps(a.v, b.v), _mm256_unpackhi_ps(a.v, b.v), 0x31));
}
RNN_FN F32 power(F32 t) { return F32(_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_castps_si256(t.v), 23))); }

struct F64 {
  using element = double;
  static constexpr int lanes = 4;
  struct Mask {
    __m256d m;
  };
  __m256d v;

  F64() = default;
  RNN_FN F64(double x) : v(_mm256_set1_pd(x)) {}
  RNN_FN explicit F64(__m256d x) : v(x) {}

  RNN_FN static F64 load(const double* p) { return F64(_mm256_loadu_pd(p)); }
  RNN_FN static F64 load(const double* p, int n) { return n >= lanes ? load(p) : F64(_mm256_maskload_pd(p, first(n))); }
  RNN_FN static F64 broadcast(const double* p) { return *p; }
  RNN_FN void store(double* p) const { _mm256_storeu_pd(p, v); }
  RNN_FN void store(double* p, int n) const {
    if (n >= lanes) return store(p);
    _mm256_maskstore_pd(p, first(n), v);
  }

 private:
  RNN_FN static __m256i first(int n) { return _mm256_cmpgt_epi64(_mm256_set1_epi64x(n), _mm256_setr_epi64x(0, 1, 2, 3)); }
};

RNN_FN F64 operator+(F64 a, F64 b) { return F64(_mm256_add_pd(a.v, b.v)); }
RNN_FN F64 operator-(F64 a, F64 b) { return F64(_mm256_sub_pd(a.v, b.v)); }
RNN_FN F64 operator*(F64 a, F64 b) { return F64(_mm256_mul_pd(a.v, b.v)); }
RNN_FN F64 operator/(F64 a, F64 b) { return F64(_mm256_div_pd(a.v, b.v)); }
RNN_FN F64 operator-(F64 a) { return F64(-a.v); }
RNN_FN F64 fma(F64 a, F64 b, F64 c) { return F64(_mm256_fmadd_pd(a.v, b.v, c.v)); }
RNN_FN F64 min(F64 a, F64 b) { return F64(_mm256_min_pd(a.v, b.v)); }
RNN_FN F64 max(F64 a, F64 b) { return F64(_mm256_max_pd(a.v, b.v)); }
RNN_FN F64::Mask lt(F64 a, F64 b) { return {_mm256_cmp_pd(a.v, b.v, _CMP_LT_OQ)}; }
RNN_FN F64 select(F64::Mask m, F64 a, F64 b) { return F64(_mm256_blendv_pd(b.v, a.v, m.m)); }
RNN_FN F64 sqrt(F64 a) { return F64(_mm256_sqrt_pd(a.v)); }
RNN_FN F64 abs(F64 a) { return F64(_mm256_andnot_pd(_mm256_set1_pd(-0.), a.v)); }
RNN_FN F64 copysign(F64 a, F64 s) {
  const __m256d sign = _mm256_set1_pd(-0.);
  return F64(_mm256_or_pd(_mm256_andnot_pd(sign, a.v), _mm256_and_pd(sign, s.v)));
}
RNN_FN F64 interleave_low(F64 a, F64 b) {
  return F64(_mm256_permute2f128_pd(_mm256_unpacklo_pd(a.v, b.v), _mm256_unpackhi_pd(a.v, b.v), 0x20));
}
RNN_FN F64 interleave_high(F64 a, F64 b) {
  return F64(_mm256_permute2f128_pd(_mm256_unpacklo_pd(a.v, b.v), _mm256_unpackhi_pd(a.v, b.v), 0x31));
}
RNN_FN F64 power(F64 t) { return F64(_mm256_castsi256_pd(_mm256_slli_epi64(_mm256_castpd_si256(t.v), 52))); }

using math::exp;
using math::relu;
using math::sigmoid;
using math::tanh;

}  // namespace avx2
}  // namespace rnnkernels
