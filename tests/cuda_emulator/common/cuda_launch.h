// Launches kernels in the emulator; a GPU is as large as `emulated_device` says.

#pragma once

#include <torch/csrc/stable/tensor.h>

#include "cuda.h"

namespace gcrl_kernels {

struct Blocks {
  dim3 grid, block;
  int shared = 0;
};

template <typename... Parameters, typename... Arguments>
void launch(void (*kernel)(Parameters...), const Blocks& blocks, const torch::stable::Tensor&,
            const Arguments&... arguments) {
  emulator::launch(kernel, blocks.grid, blocks.block, static_cast<size_t>(blocks.shared),
                   arguments...);
}

inline int emulated_multiprocessors = 1, emulated_shared = 227 << 10;

struct Device {
  explicit Device(const torch::stable::Tensor&) {}
  int multiprocessors = emulated_multiprocessors, shared = emulated_shared;
};

}  // namespace gcrl_kernels
