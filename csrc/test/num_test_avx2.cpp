#include "num/avx2.h"
#include "num_cases.h"

namespace num_test {

static constexpr Isa table = isa<rnnkernels::avx2::F32, rnnkernels::avx2::F64>("avx2");
const Isa* avx2() { return &table; }

}  // namespace num_test
