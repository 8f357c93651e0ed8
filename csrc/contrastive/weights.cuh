#pragma once

#include <cmath>
#include <cstdint>

#include "contrastive/meeting.cuh"

namespace gcrl_kernels::contrastive {

inline constexpr int kSumThreads = 512;
inline constexpr int kAnchorThreads = 256;
inline constexpr float kOneExponentialLse = 80.0f;  // the spread of log-sum-exps that it serves
inline constexpr int kWeightExponent = 12;          // the weights stay below 2^15, which fp16 holds

// What a pair's weight in backward is made of,
//   W_ik = pull_i exp(s_ik - lse_i) + pull_k exp(s_ik - lse_k) - [positive] (push_i + push_k),
// of rows or of columns. A null pointer is of no concern.
struct Anchors {
  const float *lse, *lse_residual, *grad, *share;
  const int32_t* classes;
  int64_t count;
  // Made of them: pull and push times a power of two, and pull exp(middle - lse).
  float *pull, *push, *weight;
};

// What all pairs have in common.
struct Common {
  float middle;          // of the log-sum-exps
  bool one_exponential;  // serves a pair: W = exp(s - middle) (weight_i + weight_k) - ...
  float power;           // of two, that the weights are multiplied by
};

// The largest over a block of kSumThreads; NaN is passed over.
static __device__ __forceinline__ float largest_of_block(float value) {
  __shared__ float values[kSumThreads];
  const int thread = static_cast<int>(threadIdx.x);
  values[thread] = value;
  for (int distance = kSumThreads / 2; distance > 0; distance /= 2) {
    __syncthreads();
    if (thread < distance) values[thread] = fmaxf(values[thread], values[thread + distance]);
  }
  __syncthreads();
  const float largest = values[0];
  __syncthreads();
  return largest;
}

// One block.
static __global__ void __launch_bounds__(kSumThreads)
    find_common(Anchors rows, Anchors columns, Common* common) {
  float highest = -INFINITY, lowest = -INFINITY, grad = 0.0f;
  const auto look_at = [&](const Anchors& anchors) {
    for (int64_t i = threadIdx.x; i < anchors.count; i += kSumThreads) {
      highest = fmaxf(highest, anchors.lse[i]);
      lowest = fmaxf(lowest, -anchors.lse[i]);
      grad = fmaxf(grad, fabsf(anchors.grad[i]));
    }
  };
  look_at(rows);
  look_at(columns);
  highest = largest_of_block(highest);
  lowest = -largest_of_block(lowest);
  grad = largest_of_block(grad);
  if (threadIdx.x != 0) return;
  common->middle = lowest + (highest - lowest) / 2;
  common->one_exponential = highest - lowest <= kOneExponentialLse;
  const bool usual = grad > 0.0f && grad < INFINITY;
  const int exponent = usual ? kWeightExponent - ilogbf(grad) : 0;
  common->power = ldexpf(1.0f, max(-100, min(exponent, 100)));
}

static __global__ void __launch_bounds__(kAnchorThreads)
    weigh_anchors(Anchors anchors, const Common* common) {
  const int64_t i = int64_t{blockIdx.x} * kAnchorThreads + threadIdx.x;
  if (i >= anchors.count) return;
  const float share = anchors.share ? anchors.share[i] : 1.0f;
  const float grad = anchors.grad[i] * common->power;
  const float pull = share == 0.0f ? 0.0f : grad;
  anchors.pull[i] = pull;
  if (anchors.push) anchors.push[i] = grad * share;
  const float weight = expf((common->middle - anchors.lse[i]) - anchors.lse_residual[i]);
  anchors.weight[i] = common->one_exponential && pull != 0.0f ? pull * weight : 0.0f;
}

// One block: the sum of numbers, in an order that does not vary.
static __global__ void __launch_bounds__(kSumThreads)
    sum_numbers(const float* numbers, int64_t count, float* sum) {
  __shared__ double sums[kSumThreads];
  const int thread = static_cast<int>(threadIdx.x);
  double own = 0.0;
  for (int64_t i = thread; i < count; i += kSumThreads) own += numbers[i];
  sums[thread] = own;
  for (int distance = kSumThreads / 2; distance > 0; distance /= 2) {
    __syncthreads();
    if (thread < distance) sums[thread] += sums[thread + distance];
  }
  if (thread == 0) *sum = static_cast<float>(sums[0]);
}

}  // namespace gcrl_kernels::contrastive
