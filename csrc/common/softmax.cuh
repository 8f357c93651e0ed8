#pragma once

#include <cmath>

#include "common/ptx.cuh"

// Softmax, and a log-sum-exp from which it can be rebuilt exactly: the number, and its residual,
// what its rounding lost, 0 where it is not finite. Exponentials are powers of two.
namespace gcrl_kernels {

inline constexpr float kLog2E = 1.4426950408889634f;

// e^(a - b), where the difference is rounded before anything else.
static __device__ __forceinline__ float exp_of_difference(float a, float b) {
  return ptx::exp2((a - b) * kLog2E);
}

// e^(score - lse - residual), with the residual in base 2, times log2(e). The score must be rounded
// as it was when its lse was found: where both are large, they differ by little.
static __device__ __forceinline__ float probability(float score, float lse, float residual_2) {
  return ptx::exp2(fmaf(score - lse, kLog2E, -residual_2));
}

struct LogSumExp {
  // Of the largest score, and the logarithm of the sum of e^(score - largest).
  __device__ LogSumExp(float largest, float log_of_sum) : value(largest + log_of_sum) {
    const float added = value - largest;
    const float lost = (largest - (value - added)) + (log_of_sum - added);
    residual = fabsf(value) < INFINITY ? lost : 0.0f;
  }

  float value, residual;
};

}  // namespace gcrl_kernels
