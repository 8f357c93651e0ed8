#pragma once

namespace gcrl_kernels {

// The dtypes of the tensors that CPU kernels read and write; they compute in float32.
enum class FloatType { kFloat32, kFloat16, kBFloat16 };

}  // namespace gcrl_kernels
