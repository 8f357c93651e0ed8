#pragma once

namespace gcrl_kernels {

// The instruction sets that CPU kernels are compiled for, in ascending order.
enum class CpuLevel { kPortable, kAvx2, kAvx512 };

// The level in force: the best that this CPU has, or the one that set_cpu_level holds it to.
CpuLevel cpu_level();

}  // namespace gcrl_kernels
