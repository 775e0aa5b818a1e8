// What the CUDA engines cannot beat on this device: the price of a barrier, of a hop between blocks, of everybody reading what everybody
// wrote (microseconds each), the rates of a copy (bytes a second) and of fragment products from registers (multiply-adds a second). Prints
// JSON. Built and run by bench/gpu.sh. Fails if a packet was torn: the engine relies on 16 bytes being loaded and stored in one piece.
#include <cooperative_groups.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>

namespace cg = cooperative_groups;

constexpr int kSteps = 2000, kThreads = 256, kAtOnce = 4, kNear = 1024;
constexpr int kWords = 1 << 28;  // of device memory: 2 GiB, many times the L2

#define CHECK(call)                                                                                    \
  do {                                                                                                 \
    const cudaError_t error = (call);                                                                  \
    if (error != cudaSuccess) std::printf("%s: %s\n", #call, cudaGetErrorString(error)), std::exit(1); \
  } while (0)

__device__ unsigned torn_packets;

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

// 12 bytes and their epoch, as the persistent engine's.
struct Packet {
  uint64_t low, high;
};
__device__ Packet packet_of(uint32_t k, uint32_t epoch) {
  const uint32_t word = (k + 1) * 2654435761u ^ epoch;
  return {uint64_t(~word) << 32 | word, uint64_t(epoch) << 32 | (word ^ k)};
}
__device__ Packet load(const Packet* p) {
  Packet x;
  asm volatile("{\n.reg .b128 x;\nld.relaxed.gpu.global.b128 x, [%2];\nmov.b128 {%0, %1}, x;\n}" : "=l"(x.low), "=l"(x.high) : "l"(p));
  return x;
}
__device__ void store(Packet* p, Packet x) {
  asm volatile("{\n.reg .b128 x;\nmov.b128 x, {%1, %2};\nst.relaxed.gpu.global.b128 [%0], x;\n}" ::"l"(p), "l"(x.low), "l"(x.high));
}

// The persistent engine's exchange and nothing else: every block writes its share of n packets and reads all of them. Counts those that
// were not as they had been written.
__global__ void exchange(uint64_t* memory, int n) {
  Packet* const packets = reinterpret_cast<Packet*>(memory);
  unsigned torn = 0;
  for (uint32_t i = 1; i <= kSteps; ++i) {
    Packet* const side = packets + (i & 1) * n;
    for (int k = blockIdx.x * kThreads + threadIdx.x; k < n; k += gridDim.x * kThreads) store(side + k, packet_of(k, i));
    for (int first = threadIdx.x; first < n; first += kAtOnce * kThreads) {
      Packet found[kAtOnce];
      for (int j = 0; j < kAtOnce; ++j)
        if (first + j * kThreads < n) found[j] = load(side + first + j * kThreads);
      for (int j = 0; j < kAtOnce; ++j) {
        const int k = first + j * kThreads;
        if (k >= n) continue;
        while (found[j].high >> 32 != i) found[j] = load(side + k);
        const Packet expected = packet_of(k, i);
        torn += found[j].low != expected.low || found[j].high != expected.high;
      }
    }
    __syncthreads();
  }
  if (torn) atomicAdd(&torn_packets, torn);
}

#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
// Likewise through the shared memory of a cluster's blocks: every block writes its share into that of all.
__global__ void __cluster_dims__(8) exchange_near(uint64_t*, int n) {
  __shared__ Packet packets[2 * kNear];
  for (int i = threadIdx.x; i < 2 * kNear; i += kThreads) packets[i] = {};
  cg::this_cluster().sync();
  unsigned torn = 0;
  for (uint32_t i = 1; i <= kSteps; ++i) {
    Packet* const side = packets + (i & 1) * kNear;
    for (int k = blockIdx.x % 8 * kThreads + threadIdx.x; k < n; k += 8 * kThreads)
      for (int peer = 0; peer < 8; ++peer) {
        const Packet x = packet_of(k, i);
        asm volatile(
            "{\n.reg .b128 x;\n.reg .u32 there;\nmov.b128 x, {%2, %3};\nmapa.shared::cluster.u32 there, %0, %1;\n"
            "st.relaxed.cluster.shared::cluster.b128 [there], x;\n}" ::"r"(unsigned(__cvta_generic_to_shared(side + k))),
            "r"(peer), "l"(x.low), "l"(x.high));
      }
    for (int k = threadIdx.x; k < n; k += kThreads) {
      Packet found;
      do
        asm volatile("{\n.reg .b128 x;\nld.relaxed.cluster.shared::cta.b128 x, [%2];\nmov.b128 {%0, %1}, x;\n}"
                     : "=l"(found.low), "=l"(found.high)
                     : "r"(unsigned(__cvta_generic_to_shared(side + k))));
      while (found.high >> 32 != i);
      const Packet expected = packet_of(k, i);
      torn += found.low != expected.low || found.high != expected.high;
    }
    __syncthreads();
  }
  if (torn) atomicAdd(&torn_packets, torn);
  cg::this_cluster().sync();
}
#endif

__global__ void copy(uint64_t* packets, int n) {
  const int half = n / 2;
  for (int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x; i < half / 2; i += int64_t(gridDim.x) * kThreads)
    reinterpret_cast<ulonglong2*>(packets + half)[i] = reinterpret_cast<const ulonglong2*>(packets)[i];
}

// kSteps rounds of eight independent m16n8k16 a warp, eight warps a block: as the persistent engine has them.
__global__ void fragments(uint64_t* packets, int) {
  float d[8][4] = {};
  const uint32_t a = threadIdx.x, b = blockIdx.x;
  for (int i = 0; i < kSteps; ++i)
#pragma unroll
    for (int n = 0; n < 8; ++n)
      asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %4, %4, %4}, {%5, %5}, {%0, %1, %2, %3};"
                   : "+f"(d[n][0]), "+f"(d[n][1]), "+f"(d[n][2]), "+f"(d[n][3])
                   : "r"(a), "r"(b));
  float sum = 0;
  for (int n = 0; n < 8; ++n) sum += d[n][0] + d[n][1] + d[n][2] + d[n][3];
  if (sum == 1) packets[0] = 1;
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
    CHECK(cudaMemset(packets, 0, n == kWords ? 64 : size_t(2 * n + 64) * sizeof(Packet)));
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
  CHECK(cudaMalloc(&packets, size_t(kWords) * sizeof(uint64_t)));
  std::printf("{\"multiprocessors\": %d, \"grid_barrier\": %.3f", blocks, microseconds((void*)grid_barrier, blocks, packets, 0, true));
  std::printf(", \"hop\": %.3f", microseconds((void*)hop, 2, packets, 0, true) / 2);
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
  std::printf(", \"cluster_barrier_4\": %.3f", microseconds((void*)cluster_barrier<4>, 4, packets, 0, false));
  std::printf(", \"cluster_barrier_8\": %.3f", microseconds((void*)cluster_barrier<8>, 8, packets, 0, false));
#endif
  for (int n : {43, 128, 512, 1024, 8192, 21846})
    std::printf(", \"exchange_%d\": %.3f", n, microseconds((void*)exchange, blocks, packets, n, true));
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
  for (int n : {43, 512, kNear}) std::printf(", \"exchange_near_%d\": %.3f", n, microseconds((void*)exchange_near, 8, packets, n, false));
#endif
  unsigned torn = 0;
  CHECK(cudaMemcpyFromSymbol(&torn, torn_packets, sizeof torn));
  std::printf(", \"torn_packets\": %u", torn);
  // The whole launch is one step of these two.
  std::printf(", \"copy_bytes_a_second\": %.4g",
              kWords * 8.0 / (microseconds((void*)copy, blocks * 8, packets, kWords, false) * kSteps * 1e-6));
  std::printf(", \"fragment_multiply_adds_a_second\": %.4g",
              double(blocks) * 8 * 8 * 2048 / (microseconds((void*)fragments, blocks, packets, 0, false) * 1e-6));
  std::printf("}\n");
  return torn != 0;
}
