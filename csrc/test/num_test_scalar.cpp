#include "num/scalar.h"
#include "num_cases.h"

namespace num_test {

static constexpr Isa table = isa<rnnkernels::scalar::F32, rnnkernels::scalar::F64>("scalar");
const Isa* scalar() { return &table; }

}  // namespace num_test
