#pragma once

#include <array>
#include <cstdint>
#include <vector>

namespace gcrl_kernels {

// A box around a palette in cells, and for each cell the colours that can be the nearest of a pixel
// in it: those no farther from its nearest corner than some colour is from its farthest. Most
// colours are out of the question so.
class ColorCells {
 public:
  static constexpr int kSide = 8, kCells = kSide * kSide * kSide;
  static constexpr int kOutside = kCells;  // the number of the rest of space

  // float32 [colors, 3]
  ColorCells(const float* palette, int64_t colors);

  // Where a pixel lies; a NaN is outside.
  int cell(float red, float green, float blue) const {
    const float place[3] = {(red - low_[0]) * per_unit_[0], (green - low_[1]) * per_unit_[1],
                            (blue - low_[2]) * per_unit_[2]};
    int cell = 0;
    bool inside = true;
    for (const float p : place) {
      inside &= p >= 0 && p < kSide;
      cell = cell * kSide + (inside ? static_cast<int>(p) : 0);
    }
    return inside ? cell : kOutside;
  }

  // Ascending; outside: every colour.
  const std::vector<int32_t>& candidates(int cell) const { return candidates_[cell]; }

 private:
  std::array<float, 3> low_, width_, per_unit_;
  std::vector<std::vector<int32_t>> candidates_;
};

}  // namespace gcrl_kernels
