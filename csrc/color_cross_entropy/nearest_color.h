#pragma once

#include <stdint.h>

namespace gcrl_kernels {

// One instruction set's kernels. Each finds, for `count` pixels [count, 3], the index of the
// nearest colour of the palette [colors, 3] by squared Euclidean distance: the lowest index wins a
// tie, a pixel with a NaN gives -1, a distance that is NaN is never the nearest, and 0 is what
// infinite ones leave.
struct NearestColor {
  void (*uint8)(const uint8_t* pixels, int64_t count, const float* palette, int64_t colors,
                int64_t* nearest);
  void (*float32)(const float* pixels, int64_t count, const float* palette, int64_t colors,
                  int64_t* nearest);
  void (*float64)(const double* pixels, int64_t count, const double* palette, int64_t colors,
                  int64_t* nearest);
};

namespace portable {
extern const NearestColor nearest_color;
}
namespace avx2 {
extern const NearestColor nearest_color;
}
namespace avx512 {
extern const NearestColor nearest_color;
}

}  // namespace gcrl_kernels
