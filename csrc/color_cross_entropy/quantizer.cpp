#include "color_cross_entropy/quantizer.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <limits>
#include <optional>
#include <vector>

#include "color_cross_entropy/exact_in_float32.h"
#include "common/cpu_level.h"

namespace gcrl_kernels {
namespace {

using torch::stable::Tensor;

constexpr int64_t kPairsWorthAThread = 1 << 18;
constexpr int64_t kBlock = 1 << 16;  // pixels that are sorted into cells at a time
constexpr int64_t kPixelsWorthCells = 1 << 15, kColorsWorthCells = 64;

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

// A kernel on many pixels: those of a cell together, with the colours that are near it.
template <typename Pixel>
void find_in_cells(void (*kernel)(const Pixel*, int64_t, const float*, int64_t, int64_t*),
                   const ColorCells& cells, const Pixel* pixels, int64_t count,
                   const float* palette, int64_t* nearest) {
  constexpr int kCells = ColorCells::kCells + 1;
  const int64_t most = std::min(count, kBlock);
  std::vector<int32_t> cell_of(most), order(most);
  std::vector<Pixel> sorted(3 * most);
  std::vector<int64_t> found(most);
  std::vector<float> colors;
  for (int64_t first = 0; first < count; first += most) {
    const int64_t size = std::min(most, count - first);
    const Pixel* block = pixels + 3 * first;
    int32_t ends[kCells + 1] = {};
    for (int64_t i = 0; i < size; ++i) {
      cell_of[i] = cells.cell(block[3 * i], block[3 * i + 1], block[3 * i + 2]);
      ++ends[cell_of[i] + 1];
    }
    for (int cell = 0; cell < kCells; ++cell) ends[cell + 1] += ends[cell];
    for (int64_t i = 0; i < size; ++i) {
      const int32_t place = ends[cell_of[i]]++;  // the cell's begin becomes its end
      order[place] = static_cast<int32_t>(i);
      for (int c = 0; c < 3; ++c) sorted[3 * place + c] = block[3 * i + c];
    }
    for (int cell = 0, begin = 0; cell < kCells; begin = ends[cell++]) {
      const int64_t inside = ends[cell] - begin;
      if (inside == 0) continue;
      const std::vector<int32_t>& candidates = cells.candidates(cell);
      colors.clear();
      for (const int32_t k : candidates) {
        colors.insert(colors.end(), palette + 3 * k, palette + 3 * k + 3);
      }
      kernel(sorted.data() + 3 * begin, inside, colors.data(),
             static_cast<int64_t>(candidates.size()), found.data() + begin);
      for (int64_t i = begin; i < ends[cell]; ++i) {
        nearest[first + order[i]] = found[i] < 0 ? -1 : candidates[found[i]];
      }
    }
  }
}

Tensor quantize_colors(const Tensor& pixels, const Tensor& palette) {
  const Quantizer quantizer(pixels, palette);
  Tensor nearest = new_indices(pixels);
  quantizer.find_all(nearest.mutable_data_ptr<int64_t>());
  return nearest;
}

}  // namespace

Quantizer::Quantizer(const Tensor& pixels, const Tensor& palette)
    : types_(check_colors(pixels, palette)),
      pixels_(pixels.const_data_ptr()),
      palette_(palette.const_data_ptr()),
      count_(pixels.numel() / 3),
      colors_(palette.size(0)),
      kernels_(nearest_color()) {
  if (types_ == ColorTypes::kFloat64) return;
  if (types_ == ColorTypes::kUint8) {
    const int32_t* colors = palette.const_data_ptr<int32_t>();
    const int32_t* end = colors + palette.numel();
    if (!std::all_of(colors, end, is_exact_in_float32)) return;
    exact_.assign(colors, end);
    palette_ = exact_.data();
  }
}

void Quantizer::find_all(int64_t* nearest) const {
  const bool has_floats = types_ == ColorTypes::kFloat32 || !exact_.empty();
  std::optional<ColorCells> cells;
  if (has_floats && count_ >= kPixelsWorthCells && colors_ >= kColorsWorthCells) {
    cells.emplace(static_cast<const float*>(palette_), colors_);
  }
  const int64_t grain = std::max<int64_t>(64, kPairsWorthAThread / colors_);
  torch::stable::parallel_for(0, count_, grain, [&](int64_t begin, int64_t end) {
    find(begin, end, nearest + begin, cells ? &*cells : nullptr);
  });
}

void Quantizer::find(int64_t begin, int64_t end, int64_t* nearest, const ColorCells* cells) const {
  const int64_t count = end - begin;
  const auto near =
      [&]<typename Pixel>(void (*kernel)(const Pixel*, int64_t, const float*, int64_t, int64_t*)) {
        const auto* pixels = static_cast<const Pixel*>(pixels_) + 3 * begin;
        const auto* palette = static_cast<const float*>(palette_);
        if (cells != nullptr) return find_in_cells(kernel, *cells, pixels, count, palette, nearest);
        kernel(pixels, count, palette, colors_, nearest);
      };
  switch (types_) {
    case ColorTypes::kUint8:
      if (!exact_.empty()) return near(kernels_.uint8);
      return nearest_integer_color(static_cast<const uint8_t*>(pixels_) + 3 * begin, count,
                                   static_cast<const int32_t*>(palette_), colors_, nearest);
    case ColorTypes::kFloat32:
      return near(kernels_.float32);
    case ColorTypes::kFloat64:
      return kernels_.float64(static_cast<const double*>(pixels_) + 3 * begin, count,
                              static_cast<const double*>(palette_), colors_, nearest);
  }
}

}  // namespace gcrl_kernels

STABLE_TORCH_LIBRARY_FRAGMENT(gcrl_kernels_cpu, library) {
  library.def("quantize_colors(Tensor pixels, Tensor palette) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(gcrl_kernels_cpu, CPU, library) {
  library.impl("quantize_colors", TORCH_BOX(&gcrl_kernels::quantize_colors));
}
