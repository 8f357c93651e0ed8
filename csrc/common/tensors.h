#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <cstdint>
#include <initializer_list>

#include "common/element_type.h"

namespace gcrl_kernels {

// The operators' callers have cast and laid out their tensors; these checks keep a direct call from
// reading out of bounds. Static, as what headers define for several files is: see test_symbols.py.

static inline void check_contiguous(const torch::stable::Tensor& tensor, const char* name) {
  STD_TORCH_CHECK(tensor.is_contiguous(), name, ": expected a contiguous tensor");
}

// The last dimensions of a tensor must be the given ones; -1 stands for any size.
static inline void check_last_sizes(const torch::stable::Tensor& tensor, const char* name,
                                    std::initializer_list<int64_t> expected) {
  const int64_t leading = tensor.dim() - static_cast<int64_t>(expected.size());
  STD_TORCH_CHECK(leading >= 0, name, ": expected at least ", expected.size(), " dimensions, got ",
                  tensor.dim());
  int64_t dimension = leading;
  for (const int64_t size : expected) {
    STD_TORCH_CHECK(size < 0 || tensor.size(dimension) == size, name, ": expected size ", size,
                    " in dimension ", dimension, ", got ", tensor.size(dimension));
    ++dimension;
  }
}

static inline void check_same_device(const torch::stable::Tensor& tensor, const char* name,
                                     const torch::stable::Tensor& other) {
  STD_TORCH_CHECK(tensor.device() == other.device(), name,
                  ": expected the device of the other tensors");
}

// A mask's bytes, of which any that is not 0 stands for true: C++ knows bools of 0 and 1 alone.
static inline const uint8_t* mask_bytes(const torch::stable::Tensor& mask) {
  STD_TORCH_CHECK(mask.scalar_type() == torch::headeronly::ScalarType::Bool,
                  "mask: expected a tensor of dtype bool");
  return static_cast<const uint8_t*>(mask.const_data_ptr());
}

static inline ElementType element_type(const torch::stable::Tensor& tensor, const char* name) {
  using torch::headeronly::ScalarType;
  switch (tensor.scalar_type()) {
    case ScalarType::Float:
      return ElementType::kFloat32;
    case ScalarType::Half:
      return ElementType::kFloat16;
    case ScalarType::BFloat16:
      return ElementType::kBFloat16;
    default:
      STD_TORCH_CHECK(false, name, ": expected float32, float16 or bfloat16");
  }
}

}  // namespace gcrl_kernels
