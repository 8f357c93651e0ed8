#include "common/cpu_level.h"

#include <torch/csrc/stable/library.h>
#include <torch/headeronly/util/Exception.h>

#include <atomic>
#include <string>

namespace gcrl_kernels {
namespace {

constexpr const char* kNames[] = {"portable", "avx2", "avx512"};

CpuLevel best_level() {
#if defined(__x86_64__)
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) {
    const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    return avx512 ? CpuLevel::kAvx512 : CpuLevel::kAvx2;
  }
#endif
  return CpuLevel::kPortable;
}

std::atomic<CpuLevel>& level_in_force() {
  static std::atomic<CpuLevel> level{best_level()};
  return level;
}

// The names of the levels that this CPU has, best first, separated by commas.
std::string cpu_levels() {
  std::string names;
  for (int level = static_cast<int>(best_level()); level >= 0; --level) {
    if (!names.empty()) names += ',';
    names += kNames[level];
  }
  return names;
}

void set_cpu_level(std::string name) {
  for (int level = 0; level <= static_cast<int>(best_level()); ++level) {
    if (name == kNames[level]) {
      level_in_force() = static_cast<CpuLevel>(level);
      return;
    }
  }
  STD_TORCH_CHECK(false, "level: expected one of ", cpu_levels(), ", got ", name);
}

}  // namespace

CpuLevel cpu_level() { return level_in_force(); }

}  // namespace gcrl_kernels

STABLE_TORCH_LIBRARY_FRAGMENT(gcrl_kernels_cpu, library) {
  library.def("cpu_levels() -> str");
  library.def("set_cpu_level(str level) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(gcrl_kernels_cpu, CompositeExplicitAutograd, library) {
  library.impl("cpu_levels", TORCH_BOX(&gcrl_kernels::cpu_levels));
  library.impl("set_cpu_level", TORCH_BOX(&gcrl_kernels::set_cpu_level));
}
