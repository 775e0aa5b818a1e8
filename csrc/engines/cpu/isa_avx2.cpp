// The kernels of one instruction set, compiled with its own flags (see CMakeLists.txt).
#include "num/avx2.h"

#include "engines/cpu/kernels.h"

namespace rnnkernels::cpu {

extern constexpr Isa isa_avx2 = make_isa<avx2::F32, avx2::F64, 12>("avx2");

}  // namespace rnnkernels::cpu
