// Which instruction set runs, and whether this process was forked: what all calls share.
#include <pthread.h>

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
  isa.name = name;
  isa.pairs = &own.pairs;
  isa.storage[int(Storage::BF16)] = own.storage;
  for (int cell = 0; cell < kCellCount; ++cell) isa.page[cell].ops[int(Storage::BF16)] = own.page[cell];
  return isa;
}

const Isa isa_avx512bf16 = with(bfloat16_avx512, isa_avx512, "avx512bf16");
#endif

const Isa* const kBuilt[] = {
#if RNNKERNELS_X86
    &isa_avx512bf16, &isa_avx512, &isa_avx2,
#endif
    &isa_scalar};

bool runs(const Isa* isa) {
#if RNNKERNELS_X86
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  if (isa == &isa_avx2) return avx2;
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
                      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl");
  if (isa == &isa_avx512) return avx512;
  if (isa == &isa_avx512bf16) return avx512 && __builtin_cpu_supports("avx512bf16");
#endif
  return isa == &isa_scalar;
}

const Isa* choose(const std::string& name) {
  std::string known;
  for (const Isa* isa : kBuilt) {
    if (!runs(isa)) continue;
    if (name.empty() || name == isa->name) return isa;
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
void set_isa(const std::string& name) { chosen.store(choose(name), std::memory_order_release); }

}  // namespace rnnkernels::cpu
