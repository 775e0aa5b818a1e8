// The kernels of one instruction set, compiled with the baseline: one number at a time.
#include "num/scalar.h"

#include "engines/cpu/kernels.h"

namespace rnnkernels::cpu {

extern constexpr Isa isa_scalar = make_isa<scalar::F32, scalar::F64, 12>("scalar");

}  // namespace rnnkernels::cpu
