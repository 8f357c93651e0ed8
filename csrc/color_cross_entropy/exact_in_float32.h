#pragma once

#include <stdint.h>

namespace gcrl_kernels {

// Whether 8-bit pixels may be compared in float32 with a colour of this value: one within [-2048,
// 2303] differs from them by 2303 at most, and 3 * 2303^2 < 2^24, so that every term is exact.
static constexpr bool is_exact_in_float32(int32_t value) { return -2048 <= value && value <= 2303; }

}  // namespace gcrl_kernels
