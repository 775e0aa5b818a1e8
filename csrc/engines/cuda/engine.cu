#include "engines/cuda/engine.h"

#include <cuda_runtime_api.h>

#include <mutex>
#include <vector>

#include "cells/list.h"
#include "engines/cuda/kernels.cuh"

namespace rnnkernels::cuda {

#define RNN_CELL(name, ...) extern const CellKernels kernels_##name;
#include "cells/cells.def"
#undef RNN_CELL

namespace {

const CellKernels* const kKernels[] = {
#define RNN_CELL(name, ...) &kernels_##name,
#include "cells/cells.def"
#undef RNN_CELL
};

// A tiling is searched for once: a call asks for the same one several times, and a training loop for two, over and over.
Tiling tiling_of(const Problem& p, bool backward, const Device& device) {
  struct Known {
    int cell;
    Storage storage;
    int64_t batch, hidden, output;
    bool backward;
    int multiprocessors;
    int64_t shared_bytes;
    Tiling tiling;
  };
  static std::mutex mutex;
  static std::vector<Known> known;
  const std::lock_guard<std::mutex> lock(mutex);
  for (const Known& k : known)
    if (k.cell == p.cell && k.storage == p.storage && k.batch == p.batch && k.hidden == p.hidden && k.output == p.output &&
        k.backward == backward && k.multiprocessors == device.multiprocessors && k.shared_bytes == device.shared_bytes)
      return k.tiling;
  if (known.size() == 64) known.clear();
  known.push_back({p.cell, p.storage, p.batch, p.hidden, p.output, backward, device.multiprocessors, device.shared_bytes,
                   tile(device, kCells[p.cell], p, backward)});
  return known.back().tiling;
}

// This library has a current device of its own, beside that of whoever calls.
void use(int device) { check(cudaSetDevice(device), "device"); }

}  // namespace

Device device(int index) {
  int multiprocessors = 0, shared = 0;
  check(cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, index), "device");
  check(cudaDeviceGetAttribute(&shared, cudaDevAttrMaxSharedMemoryPerBlockOptin, index), "device");
  return {multiprocessors, shared};
}

std::string fits(const Problem& p, bool backward, const Device& device) {
  const CellInfo& cell = kCells[p.cell];
  for (int s = 0; s < cell.stages; ++s)
    if (cell.stage[s].reduction != Reduction::None)
      return std::string("the persistent engine has no reduction across units, which ") + cell.name + " asks for";
  if (!kKernels[p.cell]->forward[int(p.storage)]) return "the persistent engine computes in float32: float64 runs stepwise";
  if (p.steps >= int64_t(1) << 32) return "the persistent engine counts steps in 32 bits";
  if (!tiling_of(p, backward, device).fits)
    return std::string("the weights of ") + cell.name + " with hidden size " + std::to_string(p.hidden) +
           " do not fit into the shared memory of " + std::to_string(device.multiprocessors) + " multiprocessors with " +
           std::to_string(device.shared_bytes) + " bytes each";
  return "";
}

int64_t workspace_bytes(const Problem& p, bool backward, const Device& device) {
  return tiling_of(p, backward, device).packet_count * int64_t(sizeof(uint64_t));
}

void forward(const Forward& f, const int64_t* offsets, int index, void* stream) {
  use(index);
  const Problem& p = f.problem;
  kKernels[p.cell]->forward[int(p.storage)]({f, tiling_of(p, false, device(index)), offsets, static_cast<uint64_t*>(f.workspace)}, stream);
}

void backward(const Backward& g, const int64_t* offsets, int index, void* stream) {
  use(index);
  const Problem& p = g.problem;
  kKernels[p.cell]->backward[int(p.storage)]({g, tiling_of(p, true, device(index)), offsets, static_cast<uint64_t*>(g.workspace)}, stream);
}

void forward_step(const Problem& p, int stage, const ForwardStep& step, int64_t rows, const void* sums, int index, void* stream) {
  use(index);
  kKernels[p.cell]->step[int(p.storage)].forward[stage](step, rows, sums, stream);
}

void backward_step(const Problem& p, int stage, const BackwardStep& step, int64_t rows, int64_t summed_rows, const void* sums, int index,
                   void* stream) {
  use(index);
  kKernels[p.cell]->step[int(p.storage)].backward[stage](step, rows, summed_rows, sums, stream);
}

}  // namespace rnnkernels::cuda
