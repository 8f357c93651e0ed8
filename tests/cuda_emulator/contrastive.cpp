// The operators of csrc/contrastive/cuda.cu as gcrl_kernels_emulated, for tensors of the CPU.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include "common/cuda_launch.h"

#define gcrl_kernels_cuda gcrl_kernels_emulated
#define CUDA CPU
#include "contrastive/cuda.cu"
