#include "num/avx512.h"
#include "num_cases.h"

namespace num_test {

static constexpr Isa table = isa<rnnkernels::avx512::F32, rnnkernels::avx512::F64>("avx512");
const Isa* avx512() { return &table; }

}  // namespace num_test
