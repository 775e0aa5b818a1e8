// How every small function of the vocabulary is declared. Always inlined, so that an object file compiled for one instruction set holds no
// weak copy of it that the linker could pick for another.
#pragma once

#ifdef __CUDACC__
#define RNN_FN __host__ __device__ inline __attribute__((always_inline))
#else
#define RNN_FN inline __attribute__((always_inline))
#endif

// Before a loop whose count the compiler knows and whose arrays belong in registers.
#ifdef __CUDACC__
#define RNN_UNROLL _Pragma("unroll")
#else
#define RNN_UNROLL _Pragma("GCC unroll 8")
#endif

namespace rnnkernels {

// each<n>(f) calls f(Index<0>()) … f(Index<n - 1>()): a loop whose counter is a constant, so that what depends on it is decided by the
// compiler.
template <int i>
struct Index {
  static constexpr int value = i;
};

// Asks for a line of memory ahead of its use; any address will do.
RNN_FN void prefetch(const void* address) {
#ifdef __CUDA_ARCH__
  asm volatile("prefetch.global.L2 [%0];" ::"l"(address));
#else
  __builtin_prefetch(address);
#endif
}

template <int n, int i = 0, class Function>
RNN_FN void each(const Function& f) {
  if constexpr (i < n) {
    f(Index<i>());
    each<n, i + 1>(f);
  }
}

}  // namespace rnnkernels
