// One step at a time, by plain loops.
#include "engines/cpu/engine.h"
#include "engines/cpu/walk.h"

namespace rnnkernels::cpu {

namespace {

// Sums as the pages take them: numbers, the slots of a unit side by side. Empty for null.
std::vector<double> gather(const Problem& p, const void* sums, int64_t rows, int64_t given, int64_t columns, int64_t width) {
  std::vector<double> all;  // room for numbers of either kind
  if (!sums || !columns) return all;
  all.resize(size_t(rows * columns * width));
  const StorageOps& storage = isa_scalar.storage[int(p.storage)];
  const int64_t number = kNumberBytes[int(p.storage)], bytes = kStorageBytes[int(p.storage)];
  for (int64_t r = 0; r < given; ++r)
    for (int64_t c = 0; c < columns; ++c)
      for (int64_t u = 0; u < width; ++u)
        storage.load(at(sums, ((r * columns + c) * width + u) * bytes), 1,
                     at(static_cast<void*>(all.data()), ((r * width + u) * columns + c) * number));
  return all;
}

}  // namespace

void forward_step(const Problem& p, int stage, const ForwardStep& step, int64_t rows, const void* sums) {
  const Page& page = page_of(p.cell, isa_scalar);
  const int64_t width = width_of(p, page.cell.stage[stage].width);
  const std::vector<double> numbers = gather(p, sums, rows, rows, page.cell.hidden_slots(stage), width);
  page.ops[int(p.storage)].forward[stage](step, {0, int(rows), 1}, 0, width, int(width), nullptr,
                                          numbers.empty() ? nullptr : numbers.data());
}

void backward_step(const Problem& p, int stage, const BackwardStep& step, int64_t rows, int64_t summed_rows, const void* sums) {
  const Page& page = page_of(p.cell, isa_scalar);
  const int64_t width = width_of(p, page.cell.stage[stage].width);
  const std::vector<double> numbers = gather(p, sums, rows, summed_rows, 1, width);
  page.ops[int(p.storage)].backward[stage](step, {0, int(rows), 1}, 0, width, int(width), numbers.empty() ? nullptr : numbers.data());
}

}  // namespace rnnkernels::cpu
