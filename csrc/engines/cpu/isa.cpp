// Which instruction set runs, and whether this process was forked: what all calls share.
#include <pthread.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <atomic>
#include <cstdlib>
#include <stdexcept>

#include "engines/cpu/engine.h"
#include "engines/cpu/team.h"
#include "engines/cpu/walk.h"

namespace rnnkernels::cpu {

namespace {

#if RNNKERNELS_X86
Isa with(const Bfloat16& own, const Isa& other, const char* name) {
  Isa isa = other;
  isa.name = isa.pages = name;
  isa.pairs = &own.pairs;
  isa.storage[int(Storage::BF16)] = own.storage;
  for (int cell = 0; cell < kCellCount; ++cell) isa.page[cell].ops[int(Storage::BF16)] = own.page[cell];
  return isa;
}

Isa with(const PairOps& pairs, const Isa& other, const char* name) {
  Isa isa = other;
  isa.name = name;
  isa.pairs = &pairs;
  return isa;
}
PairOps with(const MatrixTiles& own, PairOps pairs) {
  pairs.products = own.products;
  pairs.start = own.start;
  pairs.finish = own.finish;
  return pairs;
}

const Isa isa_avx512bf16 = with(bfloat16_avx512, isa_avx512, "avx512bf16");
const PairOps pairs_amx = with(tiles_amx, bfloat16_avx512.pairs);
const Isa isa_amx = with(pairs_amx, isa_avx512bf16, "amx");
#endif

const Isa* const kBuilt[] = {
#if RNNKERNELS_X86
    &isa_amx, &isa_avx512bf16, &isa_avx512, &isa_avx2,
#endif
    &isa_scalar};

#if RNNKERNELS_X86
// Their state is large, so the system has it for processes that ask.
bool may_use_tiles() {
  constexpr int request_permission = 0x1023, tile_data = 18;
  static const bool granted = syscall(SYS_arch_prctl, request_permission, tile_data) == 0;
  return granted;
}
#endif

bool runs(const Isa* isa) {
#if RNNKERNELS_X86
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  if (isa == &isa_avx2) return avx2;
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
                      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl");
  if (isa == &isa_avx512) return avx512;
  const bool bf16 = avx512 && __builtin_cpu_supports("avx512bf16");
  if (isa == &isa_avx512bf16) return bf16;
  if (isa == &isa_amx) return bf16 && __builtin_cpu_supports("amx-tile") && __builtin_cpu_supports("amx-bf16") && may_use_tiles();
#endif
  return isa == &isa_scalar;
}

const Isa* choose(const std::string& name) {
  std::string known;
  for (const Isa* isa : kBuilt) {
    // Whoever asks for another one has no use for what looking at tiles asks of the system.
    if ((!name.empty() && name != isa->name) || !runs(isa)) continue;
    return isa;
  }
  for (const Isa* isa : kBuilt) {
    if (!runs(isa)) continue;
    known += known.empty() ? isa->name : std::string(", ") + isa->name;
  }
  throw std::invalid_argument("instruction set '" + name + "' is not available here; expected one of " + known);
}

std::atomic<const Isa*> chosen{nullptr};

std::atomic<bool> is_child{false};
const int registered = pthread_atfork(nullptr, nullptr, [] { is_child.store(true); });

}  // namespace

const Isa& current() {
  const Isa* isa = chosen.load(std::memory_order_acquire);
  if (!isa) {
    const char* name = std::getenv("RNNKERNELS_ISA");
    try {
      isa = choose(name ? name : "");
    } catch (const std::invalid_argument& e) {
      throw std::invalid_argument(std::string("RNNKERNELS_ISA: ") + e.what());
    }
    chosen.store(isa, std::memory_order_release);
  }
  return *isa;
}

bool forked() { return is_child.load(std::memory_order_relaxed); }

std::vector<std::string> supported_isas() {
  std::vector<std::string> names;
  for (const Isa* isa : kBuilt)
    if (runs(isa)) names.push_back(isa->name);
  return names;
}
std::vector<std::string> built_isas() {
  std::vector<std::string> names;
  for (const Isa* isa : kBuilt) names.push_back(isa->name);
  return names;
}
std::string isa() { return current().name; }
std::string isa_of_pages() { return current().pages; }
void set_isa(const std::string& name) { chosen.store(choose(name), std::memory_order_release); }

}  // namespace rnnkernels::cpu
