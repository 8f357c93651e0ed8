#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <vector>

#include "color_cross_entropy/color_cells.h"
#include "color_cross_entropy/nearest_color.h"
#include "color_cross_entropy/quantize_colors.h"

namespace gcrl_kernels {

// Finds the nearest colours of a tensor's pixels, part by part, from any thread.
class Quantizer {
 public:
  Quantizer(const torch::stable::Tensor& pixels, const torch::stable::Tensor& palette);

  // Of pixels begin to end; with cells, which must be the palette's, many of them in less time.
  void find(int64_t begin, int64_t end, int64_t* nearest, const ColorCells* cells = nullptr) const;

  // Of all pixels, on all threads.
  void find_all(int64_t* nearest) const;

 private:
  ColorTypes types_;
  const void *pixels_, *palette_;
  int64_t count_, colors_;
  std::vector<float> exact_;  // an integer palette, where float32 is exact
  const NearestColor& kernels_;
};

}  // namespace gcrl_kernels
