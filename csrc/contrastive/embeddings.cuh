#pragma once

#include <cmath>
#include <cstdint>

#include "common/ptx.cuh"
#include "common/tiles.cuh"

namespace gcrl_kernels::contrastive {

inline constexpr float kLeastNorm = 1e-12f;  // that a vector is divided by

// Embeddings as the kernels read them: [count, width] with zeros after the features, so that rows
// are whole chunks. z_i = factor_i data_i: normalised, a row is data times a number from 1/2 to 1,
// and data are the numbers given times a power of two, exact in any dtype.
template <typename T>
struct Embeddings {
  T* data;
  float* factor;
  float* divisor;  // by which z is the vector given
  int width;

  __device__ T* row(int64_t i) const { return data + i * width; }
};

// Rows as they are given, the features side by side.
template <typename T>
struct GivenRows {
  const T* data;
  int64_t stride, count;
  int features;
};

inline constexpr int kPackThreads = 256;

// A warp to a row.
template <typename T>
__global__ void __launch_bounds__(kPackThreads)
    pack_embeddings(GivenRows<T> given, bool normalize, Embeddings<T> out) {
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  const int64_t i = int64_t{blockIdx.x} * (kPackThreads / kWarp) + threadIdx.x / kWarp;
  if (i >= given.count) return;
  const T* from = given.data + i * given.stride;
  float divisor = 1.0f, power = 1.0f;
  if (normalize) {
    float squares = 0.0f;
    for (int d = lane; d < given.features; d += kWarp) {
      const float number = static_cast<float>(from[d]);
      squares = fmaf(number, number, squares);
    }
    for (int distance = kWarp / 2; distance > 0; distance /= 2) {
      squares += __shfl_xor_sync(kWholeWarp, squares, distance);
    }
    divisor = sqrtf(squares);
    divisor = divisor < kLeastNorm ? kLeastNorm : divisor;
    if (divisor < INFINITY) power = ldexpf(1.0f, -ilogbf(divisor));
  }
  if (lane == 0) {
    out.factor[i] = 1.0f / (divisor * power);
    out.divisor[i] = divisor;
  }
  T* to = out.row(i);
  for (int d = lane; d < out.width; d += kWarp) {
    to[d] = static_cast<T>(d < given.features ? static_cast<float>(from[d]) * power : 0.0f);
  }
}

}  // namespace gcrl_kernels::contrastive
