// What AVX-512 has of its own for bfloat16, compiled with its own flags (see CMakeLists.txt); everything else is that of isa_avx512.cpp.
#include "num/avx512bf16.h"

#include "engines/cpu/kernels.h"

namespace rnnkernels::cpu {

extern constexpr Bfloat16 bfloat16_avx512 = make_bfloat16<avx512bf16::F32, avx512bf16::Pairs, kSumsOf32Registers>();

}  // namespace rnnkernels::cpu
