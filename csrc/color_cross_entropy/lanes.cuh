#pragma once

#include <cmath>
#include <cstdint>

#include "color_cross_entropy/nearest_color.cuh"
#include "common/ptx.cuh"

namespace gcrl_kernels::color_cross_entropy {

inline constexpr int kBlockThreads = 256;
inline constexpr int kWarpLanes = 32;
inline constexpr unsigned kAllLanes = 0xffffffff;

// A row of logits belongs to as many neighbouring threads as it needs, a power of two: lanes of
// one warp, or whole warps. Made anew where it is needed, it does not stay in registers.
struct Lanes {
  __device__ explicit Lanes(int count_) : count(count_) {
    const int thread = static_cast<int>(ptx::thread_number());
    number = thread & (count - 1);
    group = thread / count;
  }
  __device__ int groups() const { return kBlockThreads / count; }

  int count, number;  // this thread's among those of its row
  int group;          // its row's among those of the block
};

static __device__ __forceinline__ float from_lane(float value, int distance) {
  return __shfl_xor_sync(kAllLanes, value, distance);
}

template <typename Distance>
__device__ __forceinline__ Candidate<Distance> from_lane(const Candidate<Distance>& value,
                                                         int distance) {
  return {__shfl_xor_sync(kAllLanes, value.distance, distance),
          __shfl_xor_sync(kAllLanes, value.index, distance)};
}

// Combines the values of a row's lanes, in an order that does not vary; each gets the result. All
// threads of the block come here.
template <typename Value, typename Combine>
__device__ Value over_lanes(Value value, const Lanes& lanes, const Combine& combine) {
  for (int distance = 1; distance < min(lanes.count, kWarpLanes); distance *= 2) {
    value = combine(value, from_lane(value, distance));
  }
  if (lanes.count > kWarpLanes) {
    __shared__ Value of_warps[kBlockThreads / kWarpLanes];
    const int warps = lanes.count / kWarpLanes;
    __syncthreads();
    if (threadIdx.x % kWarpLanes == 0) of_warps[threadIdx.x / kWarpLanes] = value;
    __syncthreads();
    value = of_warps[lanes.group * warps];
    for (int w = 1; w < warps; ++w) value = combine(value, of_warps[lanes.group * warps + w]);
  }
  return value;
}

static __device__ __forceinline__ float sum_over(float value, const Lanes& lanes) {
  return over_lanes(value, lanes, [](float a, float b) { return a + b; });
}

static __device__ __forceinline__ float maximum_over(float value, const Lanes& lanes) {
  return over_lanes(value, lanes, [](float a, float b) { return fmaxf(a, b); });
}

}  // namespace gcrl_kernels::color_cross_entropy
