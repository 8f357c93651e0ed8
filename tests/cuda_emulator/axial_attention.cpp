// The operators of csrc/axial_attention/cuda.cu as gcrl_kernels_emulated, for tensors of the CPU.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include "common/cuda_launch.h"

#define gcrl_kernels_cuda gcrl_kernels_emulated
#define CUDA CPU
#include "axial_attention/cuda.cu"

namespace {

void set_device(int64_t multiprocessors, int64_t shared) {
  gcrl_kernels::emulated_multiprocessors = static_cast<int>(multiprocessors);
  gcrl_kernels::emulated_shared = static_cast<int>(shared);
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(gcrl_kernels_cuda, library) {
  library.def("set_device(int multiprocessors, int shared) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(gcrl_kernels_cuda, CompositeExplicitAutograd, library) {
  library.impl("set_device", TORCH_BOX(&set_device));
}
