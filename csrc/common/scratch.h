#pragma once

#include <stdint.h>

#include <memory>

namespace gcrl_kernels {

// Scratch memory, aligned to the widest vectors.
class Scratch {
 public:
  explicit Scratch(int64_t floats) : memory_(new float[floats + 16]) {}
  float* data() const {
    return reinterpret_cast<float*>((reinterpret_cast<uintptr_t>(memory_.get()) + 63) / 64 * 64);
  }

 private:
  std::unique_ptr<float[]> memory_;
};

}  // namespace gcrl_kernels
