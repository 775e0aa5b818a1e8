// The 16-bit types that tensors may be stored in. Arithmetic never happens in them: loads widen to float, stores round to nearest even.
#pragma once

#include <stdint.h>

#include "fn.h"

namespace rnnkernels {

struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};
// Two in a word, where a processor multiplies them so.
struct Pair {
  bf16 low, high;
};

RNN_FN uint32_t float_bits(float x) {
  uint32_t u;
  __builtin_memcpy(&u, &x, sizeof u);
  return u;
}
RNN_FN float float_of_bits(uint32_t u) {
  float x;
  __builtin_memcpy(&x, &u, sizeof x);
  return x;
}

RNN_FN double widen(double x) { return x; }
RNN_FN float widen(float x) { return x; }
RNN_FN float widen(int8_t x) { return x; }
RNN_FN float widen(bf16 x) { return float_of_bits(uint32_t(x.bits) << 16); }
RNN_FN float widen(f16 x) {
  const uint32_t sign = uint32_t(x.bits & 0x8000) << 16, magnitude = x.bits & 0x7fff;
  uint32_t u;
  if (magnitude < 0x0400) {
    u = float_bits(float(magnitude) * 0x1p-24f);  // no subnormal float on the way, so a flush-to-zero mode changes nothing
  } else if (magnitude < 0x7c00) {
    u = (magnitude << 13) + ((127 - 15) << 23);
  } else {
    u = (magnitude << 13) | 0x7f800000 | (magnitude > 0x7c00 ? 0x00400000 : 0);
  }
  return float_of_bits(sign | u);
}

template <class S, class E>
RNN_FN S narrow(E x) {
  return S{x};
}
template <>
RNN_FN bf16 narrow<bf16, float>(float x) {
  const uint32_t u = float_bits(x);
  if ((u & 0x7fffffff) > 0x7f800000) return {uint16_t((u >> 16) | 0x0040)};  // rounding could carry a NaN into infinity
  return {uint16_t((u + 0x7fff + ((u >> 16) & 1)) >> 16)};
}
template <>
RNN_FN f16 narrow<f16, float>(float x) {
  const uint32_t u = float_bits(x), sign = (u >> 16) & 0x8000, magnitude = u & 0x7fffffff;
  uint32_t h;
  if (magnitude > 0x7f800000) {
    h = 0x7e00 | ((magnitude >> 13) & 0x03ff);
  } else if (magnitude >= 0x47800000) {  // 2^16; what lies between the largest half and it is carried to infinity by the rounding below
    h = 0x7c00;
  } else if (magnitude < 0x38800000) {  // 2^-14: adding 1/2 lets the float unit round to a multiple of 2^-24, the subnormal spacing
    h = float_bits(float_of_bits(magnitude) + 0.5f) - float_bits(0.5f);
  } else {
    h = (magnitude - ((127 - 15) << 23) + 0x0fff + ((magnitude >> 13) & 1)) >> 13;
  }
  return {uint16_t(sign | h)};
}

}  // namespace rnnkernels
