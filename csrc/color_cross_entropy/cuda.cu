#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>

#include "color_cross_entropy/nearest_color.cuh"
#include "color_cross_entropy/quantize_colors.h"
#include "common/cuda_launch.h"

namespace gcrl_kernels {
namespace {

using torch::stable::Tensor;

template <typename Pixel, typename Color>
void run(const Tensor& pixels, const Tensor& palette, const Tensor& nearest) {
  const int64_t count = nearest.numel();
  const int64_t blocks = (count + kThreads * kPixels - 1) / (kThreads * kPixels);
  void (*kernel)(const Pixel*, int64_t, const Color*, int64_t, int64_t*) = nearest_color;
  launch(kernel, {dim3(static_cast<unsigned>(blocks)), dim3(kThreads)}, pixels,
         pixels.const_data_ptr<Pixel>(), count, palette.const_data_ptr<Color>(), palette.size(0),
         nearest.mutable_data_ptr<int64_t>());
}

Tensor quantize_colors(const Tensor& pixels, const Tensor& palette) {
  const ColorTypes types = check_colors(pixels, palette);
  Tensor nearest = new_indices(pixels);
  if (nearest.numel() == 0) return nearest;
  switch (types) {
    case ColorTypes::kUint8:
      run<uint8_t, int32_t>(pixels, palette, nearest);
      break;
    case ColorTypes::kFloat32:
      run<float, float>(pixels, palette, nearest);
      break;
    case ColorTypes::kFloat64:
      run<double, double>(pixels, palette, nearest);
      break;
  }
  return nearest;
}

}  // namespace
}  // namespace gcrl_kernels

STABLE_TORCH_LIBRARY_FRAGMENT(gcrl_kernels_cuda, library) {
  library.def("quantize_colors(Tensor pixels, Tensor palette) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(gcrl_kernels_cuda, CUDA, library) {
  library.impl("quantize_colors", TORCH_BOX(&gcrl_kernels::quantize_colors));
}
