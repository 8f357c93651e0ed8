// The operators of csrc/axial_attention/cuda.cu as gcrl_kernels_emulated, for tensors of the CPU.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include "common/cuda_launch.h"

#define gcrl_kernels_cuda gcrl_kernels_emulated
#define CUDA CPU
#include "axial_attention/cuda.cu"

STABLE_TORCH_LIBRARY_FRAGMENT(gcrl_kernels_cuda, library) {
  library.def("set_device(int multiprocessors, int shared) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(gcrl_kernels_cuda, CompositeExplicitAutograd, library) {
  library.impl("set_device", TORCH_BOX(&gcrl_kernels::set_device));
}
