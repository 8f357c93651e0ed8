#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <limits>

#include "common/tensors.h"

namespace gcrl_kernels {

// The dtypes of pixels and palette that quantize_colors takes.
enum class ColorTypes { kUint8, kFloat32, kFloat64 };

static inline ColorTypes check_colors(const torch::stable::Tensor& pixels,
                                      const torch::stable::Tensor& palette) {
  using torch::headeronly::ScalarType;
  check_contiguous(pixels, "pixels");
  check_contiguous(palette, "palette");
  check_last_sizes(pixels, "pixels", {3});
  check_last_sizes(palette, "palette", {-1, 3});
  check_same_device(palette, "palette", pixels);
  const int64_t colors = palette.size(0);
  STD_TORCH_CHECK(palette.dim() == 2, "palette: expected 2 dimensions, got ", palette.dim());
  STD_TORCH_CHECK(colors >= 1 && colors <= std::numeric_limits<int32_t>::max(),
                  "palette: expected between 1 and 2^31 - 1 colours, got ", colors);
  const ScalarType pixel = pixels.scalar_type(), color = palette.scalar_type();
  if (pixel == ScalarType::Byte && color == ScalarType::Int) return ColorTypes::kUint8;
  if (pixel == ScalarType::Float && color == ScalarType::Float) return ColorTypes::kFloat32;
  STD_TORCH_CHECK(pixel == ScalarType::Double && color == ScalarType::Double,
                  "pixels and palette: expected uint8 and int32, float32 and float32, or float64 "
                  "and float64");
  return ColorTypes::kFloat64;
}

// int64 [...] for pixels [..., 3], uninitialised.
static inline torch::stable::Tensor new_indices(const torch::stable::Tensor& pixels) {
  const auto sizes = pixels.sizes();
  return torch::stable::new_empty(pixels, sizes.slice(0, sizes.size() - 1),
                                  torch::headeronly::ScalarType::Long);
}

}  // namespace gcrl_kernels
