// The operators of csrc/contrastive/cuda.cu as gcrl_kernels_emulated, for tensors of the CPU.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include "common/cuda_launch.h"

#define gcrl_kernels_cuda gcrl_kernels_emulated
#define CUDA CPU
#include "contrastive/cuda.cu"

STABLE_TORCH_LIBRARY_FRAGMENT(gcrl_kernels_cuda, library) {
  library.def("set_contrast_device(int multiprocessors, int shared) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(gcrl_kernels_cuda, CompositeExplicitAutograd, library) {
  library.impl("set_contrast_device", TORCH_BOX(&gcrl_kernels::set_device));
}
