#include "engines/traced/trace.h"

namespace rnnkernels::traced {

const Tracer tracers[kCellCount] = {
#define RNN_CELL(name, heat, ...) {trace<Complete<__VA_ARGS__>>},
#include "cells/cells.def"
#undef RNN_CELL
};

}  // namespace rnnkernels::traced
