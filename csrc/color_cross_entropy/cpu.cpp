#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <limits>
#include <vector>

#include "color_cross_entropy/exact_in_float32.h"
#include "color_cross_entropy/nearest_color.h"
#include "color_cross_entropy/quantize_colors.h"
#include "common/cpu_level.h"

namespace gcrl_kernels {
namespace {

using torch::stable::Tensor;

const NearestColor& nearest_color() {
#if defined(__x86_64__)
  if (cpu_level() == CpuLevel::kAvx512) return avx512::nearest_color;
  if (cpu_level() == CpuLevel::kAvx2) return avx2::nearest_color;
#endif
  return portable::nearest_color;
}

// Exact for every palette: the sum of three squares of differences below 2^31 + 2^8 is below 2^64.
void nearest_integer_color(const uint8_t* pixels, int64_t count, const int32_t* palette,
                           int64_t colors, int64_t* nearest) {
  for (int64_t i = 0; i < count; ++i) {
    uint64_t least = std::numeric_limits<uint64_t>::max();
    for (int64_t k = 0; k < colors; ++k) {
      uint64_t distance = 0;
      for (int c = 0; c < 3; ++c) {
        const int64_t difference = int64_t{pixels[3 * i + c]} - palette[3 * k + c];
        distance += static_cast<uint64_t>(difference) * static_cast<uint64_t>(difference);
      }
      if (distance < least) {
        least = distance;
        nearest[i] = k;
      }
    }
  }
}

// Runs a kernel over the pixels on all threads.
template <typename Pixel, typename Color>
void run(void (*kernel)(const Pixel*, int64_t, const Color*, int64_t, int64_t*),
         const Tensor& pixels, const Color* palette, int64_t colors, const Tensor& nearest) {
  constexpr int64_t kPairsWorthAThread = 1 << 18;
  const Pixel* input = pixels.const_data_ptr<Pixel>();
  int64_t* output = nearest.mutable_data_ptr<int64_t>();
  const int64_t grain = std::max<int64_t>(64, kPairsWorthAThread / colors);
  torch::stable::parallel_for(0, nearest.numel(), grain, [=](int64_t begin, int64_t end) {
    kernel(input + 3 * begin, end - begin, palette, colors, output + begin);
  });
}

void quantize_uint8(const Tensor& pixels, const Tensor& palette, const Tensor& nearest) {
  const int32_t* colors = palette.const_data_ptr<int32_t>();
  const int32_t* end = colors + palette.numel();
  if (std::all_of(colors, end, is_exact_in_float32)) {
    const std::vector<float> exact(colors, end);
    run(nearest_color().uint8, pixels, exact.data(), palette.size(0), nearest);
  } else {
    run(nearest_integer_color, pixels, colors, palette.size(0), nearest);
  }
}

Tensor quantize_colors(const Tensor& pixels, const Tensor& palette) {
  const ColorTypes types = check_colors(pixels, palette);
  Tensor nearest = new_indices(pixels);
  const NearestColor& kernels = nearest_color();
  switch (types) {
    case ColorTypes::kUint8:
      quantize_uint8(pixels, palette, nearest);
      break;
    case ColorTypes::kFloat32:
      run(kernels.float32, pixels, palette.const_data_ptr<float>(), palette.size(0), nearest);
      break;
    case ColorTypes::kFloat64:
      run(kernels.float64, pixels, palette.const_data_ptr<double>(), palette.size(0), nearest);
      break;
  }
  return nearest;
}

}  // namespace
}  // namespace gcrl_kernels

STABLE_TORCH_LIBRARY_FRAGMENT(gcrl_kernels_cpu, library) {
  library.def("quantize_colors(Tensor pixels, Tensor palette) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(gcrl_kernels_cpu, CPU, library) {
  library.impl("quantize_colors", TORCH_BOX(&gcrl_kernels::quantize_colors));
}
