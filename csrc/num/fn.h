// How every small function of the vocabulary is declared. Always inlined, so that an object file compiled for one instruction set holds no
// weak copy of it that the linker could pick for another.
#pragma once

#ifdef __CUDACC__
#define RNN_FN __host__ __device__ inline __attribute__((always_inline))
#else
#define RNN_FN inline __attribute__((always_inline))
#endif
