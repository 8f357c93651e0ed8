#pragma once

#include <cmath>
#include <cstdint>

#include "color_cross_entropy/exact_in_float32.h"

namespace gcrl_kernels::color_cross_entropy {

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

// The nearest colour of a pixel among those seen so far: the lowest index of several.
template <typename Distance>
struct Candidate {
  // Of two that have seen different colours.
  __device__ Candidate nearer(const Candidate& other) const {
    const bool same = other.distance == distance;
    return other.distance < distance || (same && other.index < index) ? other : *this;
  }

  Distance distance;
  int32_t index;
};

// A thread's pixels, on their way through the palette.
template <typename Distance>
struct Search {
  template <typename Pixel>
  __device__ void begin(int p, const Pixel* pixels, int64_t i, bool exists) {
#pragma unroll
    for (int c = 0; c < 3; ++c) {
      pixel[p][c] = exists ? static_cast<Distance>(pixels[3 * i + c]) : Distance{0};
    }
    nearest[p] = {Metric<Distance>::infinity(), 0};
  }

  // Goes over each `step`-th colour from `first`. All threads of the block come here.
  template <typename Color>
  __device__ void run(const Color* palette, int64_t colors, int first, int step) {
    __shared__ Distance shared[3 * kColors];
    for (int64_t begin = 0; begin < colors; begin += kColors) {
      const int size = static_cast<int>(min(int64_t{kColors}, colors - begin));
      __syncthreads();
      for (int i = threadIdx.x; i < 3 * size; i += blockDim.x) {
        shared[i] = static_cast<Distance>(palette[3 * begin + i]);
      }
      __syncthreads();
      for (int k = first; k < size; k += step) {
#pragma unroll
        for (int p = 0; p < kPixels; ++p) {
          Distance distance = Metric<Distance>::square(pixel[p][0], shared[3 * k]);
          distance += Metric<Distance>::square(pixel[p][1], shared[3 * k + 1]);
          distance += Metric<Distance>::square(pixel[p][2], shared[3 * k + 2]);
          if (distance < nearest[p].distance) {
            nearest[p] = {distance, static_cast<int32_t>(begin) + k};
          }
        }
      }
    }
  }

  // -1 for a pixel from which no colour is at a finite distance, such as one with a NaN.
  __device__ int32_t index(int p) const {
    return nearest[p].distance < Metric<Distance>::infinity() ? nearest[p].index : -1;
  }

  Distance pixel[kPixels][3];
  Candidate<Distance> nearest[kPixels];
};

// Whether all colours of an integer palette may be compared in float32. All threads of the block
// come here.
static __device__ bool is_exact_palette(const int32_t* palette, int64_t colors) {
  bool exact = true;
  for (int64_t i = threadIdx.x; i < 3 * colors; i += blockDim.x) {
    exact &= is_exact_in_float32(palette[i]);
  }
  return __syncthreads_and(exact);
}

template <typename Distance, typename Pixel, typename Color>
__device__ void find_nearest(const Pixel* pixels, int64_t count, const Color* palette,
                             int64_t colors, int64_t* nearest) {
  // Neighbouring threads have neighbouring pixels.
  const int64_t first = int64_t{blockIdx.x} * kThreads * kPixels + threadIdx.x;
  Search<Distance> search;
#pragma unroll
  for (int p = 0; p < kPixels; ++p) {
    const int64_t i = first + p * kThreads;
    search.begin(p, pixels, i, i < count);
  }
  search.run(palette, colors, 0, 1);
#pragma unroll
  for (int p = 0; p < kPixels; ++p) {
    const int64_t i = first + p * kThreads;
    if (i < count) nearest[i] = search.index(p);
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
  if (is_exact_palette(palette, colors)) {
    find_nearest<float>(pixels, count, palette, colors, nearest);
  } else {
    find_nearest<uint64_t>(pixels, count, palette, colors, nearest);
  }
}

}  // namespace gcrl_kernels::color_cross_entropy
