#pragma once

#include <cuda_runtime.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/macros.h>
#include <torch/csrc/stable/tensor.h>

#include <utility>

// A PyTorch without CUDA lacks these; declared weak, they let the library load there as well, with
// its operators registered and never called.
#pragma weak aoti_torch_get_current_cuda_stream
#pragma weak torch_c10_cuda_check_msg
#pragma weak torch_c10_cuda_free_error_msg

namespace gcrl_kernels {

inline constexpr int kSharedWithoutAsking = 48 << 10;

// A kernel's blocks, and the bytes of dynamic shared memory that each has.
struct Blocks {
  dim3 grid, block;
  int shared = 0;
};

// Launches a kernel on the device of a tensor, in PyTorch's current stream there. Each file has
// its own, so that kernels whose parameters' types have one name are not taken for one another.
template <typename... Parameters, typename... Arguments>
static void launch(void (*kernel)(Parameters...), const Blocks& blocks,
                   const torch::stable::Tensor& where, Arguments&&... arguments) {
  const auto device = where.get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(device);
  void* stream = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &stream));
  if (blocks.shared > kSharedWithoutAsking) {
    STD_CUDA_CHECK(
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, blocks.shared));
  }
  kernel<<<blocks.grid, blocks.block, blocks.shared, static_cast<cudaStream_t>(stream)>>>(
      std::forward<Arguments>(arguments)...);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

// Of the device of a tensor.
struct Device {
  explicit Device(const torch::stable::Tensor& where);

  int multiprocessors, shared;  // bytes of shared memory that a block may ask for
};

}  // namespace gcrl_kernels
