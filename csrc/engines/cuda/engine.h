// The CUDA engines. Stepwise: a library's product and one launch of a page a step, always possible. Persistent: the whole sequence in one
// launch, its weights on the chip, where they fit.
#pragma once

#include <stdexcept>
#include <string>

#include "core/step.h"
#include "core/tiling.h"

namespace rnnkernels::cuda {

struct PersistentForward;
struct PersistentBackward;

struct CudaError : std::runtime_error {
  CudaError(const char* what, const char* why) : std::runtime_error(std::string("CUDA: ") + what + ": " + why) {}
};

struct StepKernels {
  void (*forward[kMaxStages])(const ForwardStep&, int64_t rows, const void* sums, void* stream);
  void (*backward[kMaxStages])(const BackwardStep&, int64_t rows, int64_t summed_rows, const void* sums, void* stream);
};

struct PersistentKernels {
  void (*forward)(const PersistentForward&, void* stream);
  void (*backward)(const PersistentBackward&, void* stream);
  int (*residents)(bool backward, const Tiling&, int multiprocessors);
};

struct CellKernels {
  PersistentKernels persistent[kStorages];  // null where there is none
  PersistentKernels tf32;                   // float32 by tensor cores
  StepKernels step[kStorages];
};

// The kernels of a cell that was loaded; they live to the end of the program.
void add_kernels(int cell, const CellKernels*);

// A device as the persistent engine sees it.
Device device(int index);

// Empty if the persistent engine can run it on the device, otherwise the reason why not.
std::string fits(const Problem&, bool backward, int device);
int64_t workspace_bytes(const Problem&, bool backward, int device);

// Pointers are the device's; offsets [T + 1] say where each step's tokens start; workspace holds workspace_bytes(). On the stream given, of
// the device given. The input's product is in f.gates already; sums over tokens are left to the caller.
void forward(const Forward&, const int64_t* offsets, int device, void* stream);
void backward(const Backward&, const int64_t* offsets, int device, void* stream);

// Stage s of one step for `rows` rows; sums: [rows][H slots · width] in storage type, null for zero; backward has them for summed_rows
// rows.
void forward_step(const Problem&, int stage, const ForwardStep&, int64_t rows, const void* sums, int device, void* stream);
void backward_step(const Problem&, int stage, const BackwardStep&, int64_t rows, int64_t summed_rows, const void* sums, int device,
                   void* stream);

}  // namespace rnnkernels::cuda
