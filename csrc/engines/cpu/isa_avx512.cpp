// The kernels of one instruction set, compiled with its own flags (see CMakeLists.txt).
#include "num/avx512.h"

#include "engines/cpu/kernels.h"

namespace rnnkernels::cpu {

extern constexpr Isa isa_avx512 = make_isa<avx512::F32, avx512::F64, kSumsOf32Registers>("avx512");

}  // namespace rnnkernels::cpu
