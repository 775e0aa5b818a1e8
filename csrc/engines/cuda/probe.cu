#include "engines/cuda/probe.h"

#include <cuda_runtime_api.h>

namespace rnnkernels::cuda {

Probe probe() {
  Probe found;
  found.architectures = RNNKERNELS_CUDA_ARCHS;
  cudaRuntimeGetVersion(&found.runtime);
  if (cudaDriverGetVersion(&found.driver) != cudaSuccess) found.driver = 0;
  int count = 0;
  // Counting devices and reading their properties creates no context, so asking takes no device memory.
  if (found.driver == 0 || cudaGetDeviceCount(&count) != cudaSuccess) count = 0;
  for (int device = 0; device < count; ++device) {
    cudaDeviceProp properties;
    if (cudaGetDeviceProperties(&properties, device) == cudaSuccess) {
      found.devices.push_back({properties.name, properties.major, properties.minor});
    }
  }
  // An error left behind would be found by whoever asks next.
  cudaGetLastError();
  return found;
}

}  // namespace rnnkernels::cuda
