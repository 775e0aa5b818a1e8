#include "engines/cuda/engine.h"

#include <cuda_runtime_api.h>

#include <mutex>
#include <vector>

#include "core/registry.h"
#include "engines/cuda/kernels.cuh"

namespace rnnkernels::cuda {

#define RNN_CELL(name, heat, ...) extern const CellKernels kernels_##name;
#include "cells/cells.def"
#undef RNN_CELL

namespace {

const CellKernels* const kKernels[] = {
#define RNN_CELL(name, heat, ...) &kernels_##name,
#include "cells/cells.def"
#undef RNN_CELL
};

Loaded<CellKernels> loaded;

const CellKernels* find(int cell) { return cell < kCellCount ? kKernels[cell] : loaded.find(cell); }

const CellKernels& kernels_of(int cell) {
  const CellKernels* kernels = find(cell);
  if (!kernels) throw CudaError(registry[cell].name, "the cell was loaded without kernels for a GPU");
  return *kernels;
}

// The device of a call, current while this lives: the thread's own may be another.
class Use {
 public:
  explicit Use(int device) {
    check(cudaGetDevice(&before_), "device");
    changed_ = device != before_;  // setting a device makes it a context, which one that nobody uses need not have
    if (changed_) check(cudaSetDevice(device), "device");
  }
  ~Use() {
    if (changed_) cudaSetDevice(before_);
  }
  Use(const Use&) = delete;
  Use& operator=(const Use&) = delete;

 private:
  int before_ = 0;
  bool changed_ = false;
};

template <class Arithmetic, class S>
__global__ void pack_kernel(const __grid_constant__ Tiling t, int s, Matrix m, void* workspace) {
  const int words = Arithmetic::shape.item_words, items = t.stage[s].items();
  const int word = int(blockIdx.x) % words, item = int(blockIdx.x) / words % items, block = int(blockIdx.x) / words / items;
  packed_item<Arithmetic>(t, s, workspace, block, item)[word * kThreads + int(threadIdx.x)] =
      pack<Arithmetic, S>(t, s, m, block, item, word, int(threadIdx.x));
}

}  // namespace

void add_kernels(int cell, const CellKernels* kernels) { loaded.set(cell, kernels); }

Device device(int index) {
  const Use device_of_call(index);
  int multiprocessors = 0, shared = 0, major = 0, minor = 0;
  cudaFuncAttributes compiled{};  // for clusters the code must know them too
  check(cudaFuncGetAttributes(&compiled, pack_kernel<Exact, float>), "device");
  check(cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, index), "device");
  check(cudaDeviceGetAttribute(&shared, cudaDevAttrMaxSharedMemoryPerBlockOptin, index), "device");
  check(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, index), "device");
  check(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, index), "device");
  const bool clusters = major * 10 + minor >= kClusterNumber && compiled.ptxVersion >= kClusterNumber;
  return {multiprocessors, shared, clusters ? kClusterBlocks : 1};
}

namespace {

const PersistentKernels& kernels_of(const Problem& p) {
  const CellKernels& kernels = kernels_of(p.cell);
  return p.storage == Storage::F32 && p.products != Products::Exact ? kernels.tf32 : kernels.persistent[int(p.storage)];
}

// A tiling is searched for once, and the driver asked once how much of it the device holds: a call asks for the same several times, and a
// training loop for two, over and over.
struct Cut {
  Tiling tiling;
  int together;  // blocks that the device holds at once
};

Cut cut_of(const Problem& p, bool backward, int index, int sequences) {
  struct Known {
    int cell;
    Storage storage;
    int64_t batch, hidden, output;
    Products products;
    bool backward;
    int device, sequences;
    Cut cut;
  };
  static std::mutex mutex;
  static std::vector<Known> known;
  const std::lock_guard<std::mutex> lock(mutex);
  for (const Known& k : known)
    if (k.cell == p.cell && k.storage == p.storage && k.batch == p.batch && k.hidden == p.hidden && k.output == p.output &&
        k.products == p.products && k.backward == backward && k.device == index && k.sequences == sequences)
      return k.cut;
  if (known.size() == 64) known.clear();
  const Device d = device(index);
  const Tiling t = tile(d, registry[p.cell], p, backward, sequences);
  const int together = t.fits ? kernels_of(p).residents(backward, t, d.multiprocessors) : 0;
  known.push_back({p.cell, p.storage, p.batch, p.hidden, p.output, p.products, backward, index, sequences, {t, together}});
  return known.back().cut;
}

// Blocks that have to be on the device at once: all that wait for each other.
int needed(const Tiling& t) { return t.exchange == Exchange::Grid ? t.blocks() : t.unit_ctas; }

// Every stage's matrix into the workspace, in the order in which the blocks' threads load it.
void pack_weights(const Problem& p, const Tiling& t, const void* const* weights, bool backward, void* workspace, void* stream) {
  const CellInfo& cell = registry[p.cell];
  auto* const kernel = p.storage == Storage::BF16      ? pack_kernel<Tensor<Fragment::Bf16>, bf16>
                       : p.storage == Storage::F16     ? pack_kernel<Tensor<Fragment::F16>, f16>
                       : p.products == Products::Exact ? pack_kernel<Exact, float>
                                                       : pack_kernel<Tensor<Fragment::Tf32>, float>;
  for (int s = 0; s < cell.stages; ++s) {
    const Matrix matrix = matrix_of(cell, p, weights, backward, s);
    if (!matrix.weights) continue;
    const unsigned blocks = unsigned(t.unit_ctas) * unsigned(t.stage[s].items() * product_shape(p).item_words);
    kernel<<<blocks, kThreads, 0, static_cast<cudaStream_t>(stream)>>>(t, s, matrix, workspace);
    check(cudaGetLastError(), "packing of weights");
  }
}

}  // namespace

std::string fits(const Problem& p, bool backward, int index) {
  const CellInfo& cell = registry[p.cell];
  if (!find(p.cell)) return std::string("the cell ") + cell.name + " was loaded without kernels for a GPU";
  const PersistentKernels& kernels = kernels_of(p);
  if (!kernels_of(p.cell).persistent[int(Storage::F32)].forward)
    return std::string("the persistent engine is not compiled for ") + cell.name + ", which cells.def calls COLD";
  if (!kernels.forward) return "the persistent engine computes in float32: float64 runs stepwise";
  if (p.steps >= int64_t(1) << 32) return "the persistent engine counts steps in 32 bits";
  const Use device_of_call(index);
  const auto [t, together] = cut_of(p, backward, index, 1);
  if (!t.fits) {
    const Device d = device(index);
    return std::string("the weights of ") + cell.name + " with hidden size " + std::to_string(p.hidden) +
           " do not fit into the registers and the shared memory of " + std::to_string(d.multiprocessors) + " multiprocessors with " +
           std::to_string(d.shared_bytes) + " bytes each";
  }
  if (together < needed(t))
    return "the device holds " + std::to_string(together) + " blocks of the persistent engine at once, and it needs " +
           std::to_string(needed(t));
  return "";
}

namespace {

Tiling fitting(const Problem& p, bool backward, int index, int sequences) {
  const Tiling t = cut_of(p, backward, index, sequences).tiling;
  if (!t.fits) throw CudaError("persistent engine", "it was asked for what does not fit");
  return t;
}

}  // namespace

bool gains_together(const Problem& p, bool backward, int index) {
  const Use device_of_call(index);
  if (!fits(p, backward, index).empty() || !rnnkernels::gains_together(device(index), registry[p.cell], p, backward)) return false;
  const auto [t, together] = cut_of(p, backward, index, 2);
  return together >= needed(t);
}

int64_t workspace_bytes(const Problem& p, bool backward, int index, int sequences) {
  const Use device_of_call(index);
  return fitting(p, backward, index, sequences).workspace_bytes;
}

namespace {

// The calls as one launch, their weights packed.
template <class Persistent, class Call>
Persistent together(const std::vector<const Call*>& calls, bool backward, const int64_t* offsets, int index, void* stream) {
  const Problem& p = calls[0]->problem;
  Persistent r{{}, fitting(p, backward, index, int(calls.size())), offsets, {}};
  for (size_t i = 0; i < calls.size(); ++i) {
    r.call[i] = *calls[i];
    r.workspace[i] = calls[i]->workspace;
    pack_weights(p, r.tiling, calls[i]->weights, backward, calls[i]->workspace, stream);
  }
  return r;
}

}  // namespace

void forward(const std::vector<const Forward*>& calls, const int64_t* offsets, int index, void* stream) {
  const Use device_of_call(index);
  kernels_of(calls[0]->problem).forward(together<PersistentForward>(calls, false, offsets, index, stream), stream);
}

void backward(const std::vector<const Backward*>& calls, const int64_t* offsets, int index, void* stream) {
  const Use device_of_call(index);
  kernels_of(calls[0]->problem).backward(together<PersistentBackward>(calls, true, offsets, index, stream), stream);
}

void forward_step(const Problem& p, int stage, const ForwardStep& step, int64_t rows, const void* sums, int index, void* stream) {
  const Use device_of_call(index);
  kernels_of(p.cell).step[int(p.storage)].forward[stage](step, rows, sums, stream);
}

void backward_step(const Problem& p, int stage, const BackwardStep& step, int64_t rows, int64_t summed_rows, const void* sums, int index,
                   void* stream) {
  const Use device_of_call(index);
  kernels_of(p.cell).step[int(p.storage)].backward[stage](step, rows, summed_rows, sums, stream);
}

}  // namespace rnnkernels::cuda
