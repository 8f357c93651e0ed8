#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <string>

#include "common/cuda_launch.h"

namespace gcrl_kernels {
namespace {

// As setup.py was told them.
std::string architectures() { return GCRL_KERNELS_ARCHITECTURES; }

}  // namespace

Device::Device(const torch::stable::Tensor& where) {
  const auto device = where.get_device_index();
  STD_CUDA_CHECK(cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device));
  STD_CUDA_CHECK(cudaDeviceGetAttribute(&shared, cudaDevAttrMaxSharedMemoryPerBlockOptin, device));
}

}  // namespace gcrl_kernels

STABLE_TORCH_LIBRARY_FRAGMENT(gcrl_kernels_cuda, library) { library.def("architectures() -> str"); }

STABLE_TORCH_LIBRARY_IMPL(gcrl_kernels_cuda, CompositeExplicitAutograd, library) {
  library.impl("architectures", TORCH_BOX(&gcrl_kernels::architectures));
}
