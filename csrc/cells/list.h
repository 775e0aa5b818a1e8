// Every page, and the descriptions of all of them in the order of cells.def.
#pragma once

#include "cells/automatic.h"
#include "cells/cell_norm.h"
#include "cells/clip.h"
#include "cells/dreamer.h"
#include "cells/gru.h"
#include "cells/layer_norm.h"
#include "cells/lstm.h"
#include "cells/lstm_variants.h"
#include "cells/projected.h"
#include "cells/residual.h"
#include "cells/srn.h"
#include "cells/tangent.h"
#include "cells/variational.h"
#include "cells/zoneout.h"

namespace rnnkernels {

constexpr CellInfo kCells[] = {
#define RNN_CELL(name, heat, ...) describe<Complete<__VA_ARGS__>>(#name, #__VA_ARGS__),
#include "cells/cells.def"
#undef RNN_CELL
};
constexpr int kCellCount = sizeof(kCells) / sizeof(CellInfo);

}  // namespace rnnkernels
