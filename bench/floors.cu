// What the CUDA engines cannot beat on this device: the price of a barrier, of a hop between blocks, of everybody reading what everybody
// wrote. Prints JSON: microseconds each. Built and run by bench/gpu.sh.
#include <cooperative_groups.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>

namespace cg = cooperative_groups;

constexpr int kSteps = 2000, kThreads = 256;

#define CHECK(call)                                                                                    \
  do {                                                                                                 \
    const cudaError_t error = (call);                                                                  \
    if (error != cudaSuccess) std::printf("%s: %s\n", #call, cudaGetErrorString(error)), std::exit(1); \
  } while (0)

__device__ uint64_t load(const uint64_t* p) {
  uint64_t x;
  asm volatile("ld.relaxed.gpu.global.u64 %0, [%1];" : "=l"(x) : "l"(p));
  return x;
}
__device__ void store(uint64_t* p, uint64_t x) { asm volatile("st.relaxed.gpu.global.u64 [%0], %1;" ::"l"(p), "l"(x)); }

__global__ void grid_barrier(uint64_t*, int) {
  for (int i = 0; i < kSteps; ++i) cg::this_grid().sync();
}

// Two blocks pass an epoch to and fro: two hops a step.
__global__ void hop(uint64_t* packets, int) {
  if (threadIdx.x != 0 || blockIdx.x > 1) return;
  for (uint64_t i = 1; i <= kSteps; ++i) {
    if (blockIdx.x == 0) store(packets, i);
    while (load(packets + 32 * (blockIdx.x == 0)) < i) {
    }
    if (blockIdx.x == 1) store(packets + 32, i);
  }
}

// The persistent engine's exchange and nothing else: every block writes its share of n packets and reads all of them.
__global__ void exchange(uint64_t* packets, int n) {
  uint64_t sum = 0;
  for (uint64_t i = 1; i <= kSteps; ++i) {
    uint64_t* side = packets + (i & 1) * n;
    for (int k = blockIdx.x * kThreads + threadIdx.x; k < n; k += gridDim.x * kThreads) store(side + k, i << 32 | k);
    for (int first = threadIdx.x; first < n; first += 8 * kThreads) {
      uint64_t word[8];
      for (int j = 0; j < 8; ++j)
        if (first + j * kThreads < n) word[j] = load(side + first + j * kThreads);
      for (int j = 0; j < 8; ++j)
        if (first + j * kThreads < n) {
          while (word[j] >> 32 != i) word[j] = load(side + first + j * kThreads);
          sum += word[j];
        }
    }
    __syncthreads();
  }
  if (sum == 1) packets[0] = sum;
}

#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
template <int size>
__global__ void __cluster_dims__(size) cluster_barrier(uint64_t*, int) {
  for (int i = 0; i < kSteps; ++i) cg::this_cluster().sync();
}
#endif

double microseconds(void* kernel, int blocks, uint64_t* packets, int n, bool together) {
  cudaEvent_t start, end;
  CHECK(cudaEventCreate(&start));
  CHECK(cudaEventCreate(&end));
  float best = 1e30f;
  for (int repeat = 0; repeat < 5; ++repeat) {
    CHECK(cudaMemset(packets, 0, size_t(2 * n + 64) * sizeof(uint64_t)));
    void* arguments[] = {&packets, &n};
    CHECK(cudaEventRecord(start));
    if (together)
      CHECK(cudaLaunchCooperativeKernel(kernel, dim3(blocks), dim3(kThreads), arguments, 0, nullptr));
    else
      CHECK(cudaLaunchKernel(kernel, dim3(blocks), dim3(kThreads), arguments, 0, nullptr));
    CHECK(cudaEventRecord(end));
    CHECK(cudaEventSynchronize(end));
    float ms;
    CHECK(cudaEventElapsedTime(&ms, start, end));
    if (ms < best) best = ms;
  }
  return double(best) * 1e3 / kSteps;
}

int main() {
  int blocks = 0;
  CHECK(cudaDeviceGetAttribute(&blocks, cudaDevAttrMultiProcessorCount, 0));
  uint64_t* packets;
  CHECK(cudaMalloc(&packets, size_t(2 << 20) * sizeof(uint64_t)));
  std::printf("{\"multiprocessors\": %d, \"grid_barrier\": %.3f", blocks, microseconds((void*)grid_barrier, blocks, packets, 0, true));
  std::printf(", \"hop\": %.3f", microseconds((void*)hop, 2, packets, 0, true) / 2);
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
  std::printf(", \"cluster_barrier_4\": %.3f", microseconds((void*)cluster_barrier<4>, 4, packets, 0, false));
  std::printf(", \"cluster_barrier_8\": %.3f", microseconds((void*)cluster_barrier<8>, 8, packets, 0, false));
#endif
  for (int n : {128, 512, 1024, 8192, 65536})
    std::printf(", \"exchange_%d\": %.3f", n, microseconds((void*)exchange, blocks, packets, n, true));
  std::printf("}\n");
}
