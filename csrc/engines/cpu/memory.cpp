#include <cstdint>

#include "engines/cpu/engine.h"
#if defined(__linux__)
#include <sys/mman.h>
#include <unistd.h>
#endif

namespace rnnkernels::cpu {

void prefer_large_pages(void* memory, int64_t bytes) {
#if defined(MADV_HUGEPAGE)
  constexpr uintptr_t page = uintptr_t(2) << 20;
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(memory) + page - 1) / page * page;
  const uintptr_t end = (reinterpret_cast<uintptr_t>(memory) + uintptr_t(bytes)) / page * page;
  // Advice: a kernel without large pages says no, and nothing is lost.
  if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#else
  (void)memory, (void)bytes;
#endif
}

int64_t level1_bytes() {
#if defined(_SC_LEVEL1_DCACHE_SIZE)
  const long found = sysconf(_SC_LEVEL1_DCACHE_SIZE);
  return found > 0 ? found : 0;
#else
  return 0;
#endif
}

}  // namespace rnnkernels::cpu
