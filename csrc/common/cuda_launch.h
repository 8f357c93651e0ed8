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

// Launches a kernel on the device of a tensor, in PyTorch's current stream there.
template <typename... Parameters, typename... Arguments>
void launch(void (*kernel)(Parameters...), dim3 grid, dim3 block,
            const torch::stable::Tensor& where, Arguments&&... arguments) {
  const auto device = where.get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(device);
  void* stream = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &stream));
  kernel<<<grid, block, 0, static_cast<cudaStream_t>(stream)>>>(
      std::forward<Arguments>(arguments)...);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

}  // namespace gcrl_kernels
