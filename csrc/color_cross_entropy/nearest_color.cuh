#pragma once

#include <cmath>
#include <cstdint>

#include "color_cross_entropy/exact_in_float32.h"

namespace gcrl_kernels {

inline constexpr int kThreads = 128;
inline constexpr int kPixels = 4;    // of a thread, held in registers while the palette passes by
inline constexpr int kColors = 512;  // of the palette in shared memory at a time

// Squared distances in float or double, or for 8-bit pixels in uint64_t, where no sum of three
// squared differences from an int32 overflows.
template <typename Distance>
struct Metric {
  static __device__ Distance infinity() { return static_cast<Distance>(INFINITY); }
  static __device__ Distance square(Distance pixel, Distance color) {
    const Distance difference = pixel - color;
    return difference * difference;
  }
};

template <>
struct Metric<uint64_t> {
  static __device__ uint64_t infinity() { return ~uint64_t{0}; }
  // Unsigned arithmetic is modulo 2^64, and so is right for the square of a negative difference.
  static __device__ uint64_t square(uint64_t pixel, uint64_t color) {
    const uint64_t difference = pixel - color;
    return difference * difference;
  }
};

template <typename Distance, typename Pixel, typename Color>
__device__ void find_nearest(const Pixel* pixels, int64_t count, const Color* palette,
                             int64_t colors, int64_t* nearest) {
  __shared__ Distance shared[3 * kColors];
  // Neighbouring threads have neighbouring pixels.
  const int64_t first = int64_t{blockIdx.x} * kThreads * kPixels + threadIdx.x;
  Distance pixel[kPixels][3], least[kPixels];
  int32_t index[kPixels];
#pragma unroll
  for (int p = 0; p < kPixels; ++p) {
    const int64_t i = first + p * kThreads;
#pragma unroll
    for (int c = 0; c < 3; ++c) {
      pixel[p][c] = i < count ? static_cast<Distance>(pixels[3 * i + c]) : Distance{0};
    }
    least[p] = Metric<Distance>::infinity();
    index[p] = 0;
  }

  for (int64_t begin = 0; begin < colors; begin += kColors) {
    const int size = static_cast<int>(min(int64_t{kColors}, colors - begin));
    __syncthreads();
    for (int i = threadIdx.x; i < 3 * size; i += kThreads) {
      shared[i] = static_cast<Distance>(palette[3 * begin + i]);
    }
    __syncthreads();
    for (int k = 0; k < size; ++k) {
#pragma unroll
      for (int p = 0; p < kPixels; ++p) {
        Distance distance = Metric<Distance>::square(pixel[p][0], shared[3 * k]);
        distance += Metric<Distance>::square(pixel[p][1], shared[3 * k + 1]);
        distance += Metric<Distance>::square(pixel[p][2], shared[3 * k + 2]);
        if (distance < least[p]) {
          least[p] = distance;
          index[p] = static_cast<int32_t>(begin) + k;
        }
      }
    }
  }

#pragma unroll
  for (int p = 0; p < kPixels; ++p) {
    const int64_t i = first + p * kThreads;
    bool nan = false;
#pragma unroll
    for (int c = 0; c < 3; ++c) nan |= pixel[p][c] != pixel[p][c];
    if (i < count) nearest[i] = nan ? -1 : index[p];
  }
}

template <typename Real>
__global__ void __launch_bounds__(kThreads)
    nearest_color(const Real* pixels, int64_t count, const Real* palette, int64_t colors,
                  int64_t* nearest) {
  find_nearest<Real>(pixels, count, palette, colors, nearest);
}

// In float32 where that is exact, as on the CPU.
static __global__ void __launch_bounds__(kThreads)
    nearest_color(const uint8_t* pixels, int64_t count, const int32_t* palette, int64_t colors,
                  int64_t* nearest) {
  bool exact = true;
  for (int64_t i = threadIdx.x; i < 3 * colors; i += kThreads) {
    exact &= is_exact_in_float32(palette[i]);
  }
  if (__syncthreads_and(exact)) {
    find_nearest<float>(pixels, count, palette, colors, nearest);
  } else {
    find_nearest<uint64_t>(pixels, count, palette, colors, nearest);
  }
}

}  // namespace gcrl_kernels
