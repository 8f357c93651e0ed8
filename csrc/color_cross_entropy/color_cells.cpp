#include "color_cross_entropy/color_cells.h"

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>

namespace gcrl_kernels {
namespace {

constexpr float kBeyond = 0.125f;  // how far the box goes beyond the palette, of its own width
constexpr float kInfinity = std::numeric_limits<float>::infinity();

}  // namespace

ColorCells::ColorCells(const float* palette, int64_t colors) : candidates_(kCells + 1) {
  candidates_[kOutside].resize(colors);
  std::iota(candidates_[kOutside].begin(), candidates_[kOutside].end(), 0);
  std::vector<float> channels(3 * colors);
  std::array<float, 3> margin;
  for (int c = 0; c < 3; ++c) {
    float low = kInfinity, high = -kInfinity;
    for (int64_t k = 0; k < colors; ++k) {
      const float value = channels[c * colors + k] = palette[3 * k + c];
      if (!std::isfinite(value)) continue;
      low = std::min(low, value);
      high = std::max(high, value);
    }
    width_[c] = (high - low) * (1 + 2 * kBeyond) / kSide;
    low_[c] = low - (high - low) * kBeyond;
    per_unit_[c] = 1 / width_[c];
    // Rounding may put a pixel into the cell beside its own.
    margin[c] = 1e-3f * width_[c] + 1e-6f * std::max(std::abs(low), std::abs(high));
  }

  torch::stable::parallel_for(0, kCells, 1, [&](int64_t begin, int64_t end) {
    std::vector<float> nearest(colors), farthest(colors);
    for (int64_t cell = begin; cell < end; ++cell) {
      const int64_t place[3] = {cell / (kSide * kSide), cell / kSide % kSide, cell % kSide};
      std::fill(nearest.begin(), nearest.end(), 0.0f);
      std::fill(farthest.begin(), farthest.end(), 0.0f);
      for (int c = 0; c < 3; ++c) {
        const float low = low_[c] + static_cast<float>(place[c]) * width_[c] - margin[c];
        const float high = low + width_[c] + 2 * margin[c];
        const float* values = channels.data() + c * colors;
        for (int64_t k = 0; k < colors; ++k) {
          const float below = low - values[k], above = values[k] - high;
          const float outside = std::max(std::max(below, above), 0.0f);
          const float most = std::max(-below, -above);
          nearest[k] += outside * outside;
          farthest[k] += most * most;
        }
      }
      float bound = kInfinity;
      for (const float distance : farthest) bound = distance < bound ? distance : bound;
      bound *= 1 + 1e-4f;  // for rounding
      for (int64_t k = 0; k < colors; ++k) {
        if (nearest[k] <= bound) candidates_[cell].push_back(static_cast<int32_t>(k));
      }
    }
  });
}

}  // namespace gcrl_kernels
