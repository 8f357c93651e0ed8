#pragma once

namespace gcrl_kernels {

// The dtypes that are computed with in float32.
enum class ElementType { kFloat32, kFloat16, kBFloat16 };

}  // namespace gcrl_kernels
