#include "num/avx512bf16.h"
#include "num_cases.h"

namespace num_test {

static constexpr Isa table = isa<rnnkernels::avx512bf16::F32, rnnkernels::avx512bf16::F64>("avx512bf16");
const Isa* avx512bf16() { return &table; }

}  // namespace num_test
