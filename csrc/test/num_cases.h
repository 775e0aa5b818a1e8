// What num_test.cpp asks of an instruction set, as plain function pointers: the files compiled for one hold neither oracle nor STL.
#pragma once

#include "num/dual.h"
#include "num/storage.h"

namespace num_test {

using rnnkernels::bf16;
using rnnkernels::Dual;
using rnnkernels::f16;

enum Function { kExp, kSigmoid, kTanh, kRelu, kMix, kFunctions };
enum Operation { kAdd, kSub, kMul, kDiv, kNeg, kFma, kMin, kMax, kAbs, kLess, kCopysign, kOperations };
constexpr int kMaxLanes = 16;

template <class S, class E>
struct Memory {
  void (*load)(const S* from, E* to);
  void (*load_part)(const S* from, int n, E* to);  // all lanes of the number go to `to`
  void (*broadcast)(const S* from, E* to);
  void (*store)(const E* from, S* to);
  void (*store_part)(const E* from, S* to, int n);
};

template <class E>
struct Number {
  int lanes;
  void (*apply[kFunctions])(const E* x, E* y, int count);
  void (*slope[kFunctions])(const E* x, E* y, int count);  // by Dual
  void (*operate)(const E* a, const E* b, const E* c, E (*out)[kMaxLanes]);
};

struct Isa {
  const char* name;
  Number<float> f32;
  Number<double> f64;
  Memory<float, float> as_float;
  Memory<bf16, float> as_bf16;
  Memory<f16, float> as_f16;
  Memory<double, double> as_double;
};

const Isa* scalar();
const Isa* avx2();
const Isa* avx512();
const Isa* avx512bf16();

// Every word of the vocabulary once, for the chain rule.
template <class V>
RNN_FN V mix(V x) {
  const V a = fma(x, tanh(x), sigmoid(x) / (exp(x) + 1)), b = abs(x) * max(x, V(0.5f)) - min(-x, V(-0.25f));
  return select(lt(x, V(0.3f)), a - b, 2 * a + b * relu(x));
}

template <int f, class V>
RNN_FN V call(V x) {
  if constexpr (f == kExp) return exp(x);
  if constexpr (f == kSigmoid) return sigmoid(x);
  if constexpr (f == kTanh) return tanh(x);
  if constexpr (f == kRelu) return relu(x);
  if constexpr (f == kMix) return mix(x);
}

template <int f, class V>
void apply(const typename V::element* x, typename V::element* y, int count) {
  for (int i = 0; i < count; i += V::lanes) call<f>(V::load(x + i, count - i)).store(y + i, count - i);
}

template <int f, class V>
void slope(const typename V::element* x, typename V::element* y, int count) {
  for (int i = 0; i < count; i += V::lanes) call<f>(Dual<V>(V::load(x + i, count - i), V(1))).d.store(y + i, count - i);
}

template <class V>
void operate(const typename V::element* pa, const typename V::element* pb, const typename V::element* pc,
             typename V::element (*out)[kMaxLanes]) {
  const V a = V::load(pa), b = V::load(pb), c = V::load(pc);
  (a + b).store(out[kAdd]);
  (a - b).store(out[kSub]);
  (a * b).store(out[kMul]);
  (a / b).store(out[kDiv]);
  (-a).store(out[kNeg]);
  fma(a, b, c).store(out[kFma]);
  min(a, b).store(out[kMin]);
  max(a, b).store(out[kMax]);
  abs(a).store(out[kAbs]);
  select(lt(a, b), V(1), V(2)).store(out[kLess]);
  copysign(a, b).store(out[kCopysign]);
}

template <class V, class S>
struct MemoryOf {
  using E = typename V::element;
  static void load(const S* from, E* to) { V::load(from).store(to); }
  static void load_part(const S* from, int n, E* to) { V::load(from, n).store(to); }
  static void broadcast(const S* from, E* to) { V::broadcast(from).store(to); }
  static void store(const E* from, S* to) { V::load(from).store(to); }
  static void store_part(const E* from, S* to, int n) { V::load(from).store(to, n); }
  static constexpr Memory<S, E> table() { return {load, load_part, broadcast, store, store_part}; }
};

template <class V>
constexpr Number<typename V::element> number() {
  return {V::lanes,
          {apply<kExp, V>, apply<kSigmoid, V>, apply<kTanh, V>, apply<kRelu, V>, apply<kMix, V>},
          {slope<kExp, V>, slope<kSigmoid, V>, slope<kTanh, V>, slope<kRelu, V>, slope<kMix, V>},
          operate<V>};
}

template <class F32, class F64>
constexpr Isa isa(const char* name) {
  return {name,
          number<F32>(),
          number<F64>(),
          MemoryOf<F32, float>::table(),
          MemoryOf<F32, bf16>::table(),
          MemoryOf<F32, f16>::table(),
          MemoryOf<F64, double>::table()};
}

}  // namespace num_test
