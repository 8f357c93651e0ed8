// Launches kernels in the emulator.

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

// An operator: as what GPU the emulator passes from now on.
inline void set_device(int64_t multiprocessors, int64_t shared) {
  emulator::multiprocessors = static_cast<int>(multiprocessors);
  emulator::most_shared = static_cast<size_t>(shared);
}

struct Device {
  explicit Device(const torch::stable::Tensor&) {}
  int multiprocessors = emulator::multiprocessors;
  int shared = static_cast<int>(emulator::most_shared);
};

}  // namespace gcrl_kernels
