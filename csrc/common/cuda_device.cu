#include <torch/csrc/stable/library.h>

#include <string>

#include "common/cuda_launch.h"

namespace gcrl_kernels {

Device::Device(const torch::stable::Tensor& where) {
  const auto device = where.get_device_index();
  STD_CUDA_CHECK(cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device));
  STD_CUDA_CHECK(cudaDeviceGetAttribute(&shared, cudaDevAttrMaxSharedMemoryPerBlockOptin, device));
}

}  // namespace gcrl_kernels
