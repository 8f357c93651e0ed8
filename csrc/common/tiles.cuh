#pragma once

#include <cstdint>

#include "common/ptx.cuh"

namespace gcrl_kernels {

inline constexpr int kWarp = 32;
inline constexpr int kChunkBytes = 16;  // what one thread loads and stores at a time

template <typename T>
inline constexpr int kChunk = kChunkBytes / static_cast<int>(sizeof(T));

// [positions, kFeatures] in shared memory. The 16-byte chunks of a position are exchanged so that
// those of eight neighbouring positions lie in different banks.
template <typename T, int kFeatures>
struct Tile {
  static constexpr int kRowBytes = kFeatures * static_cast<int>(sizeof(T));
  static constexpr int kChunks = kRowBytes / kChunkBytes;
  static_assert(kChunks == 4 || kChunks % 8 == 0);
  static_assert(kChunks <= kWarp, "a warp loads whole positions");

  // By what the numbers of a position's chunks are exclusive-ored.
  static __device__ int exchange(int position) {
    return kChunks == 4 ? (position >> 1) & 3 : position & 7;
  }
  // The place of a chunk; `start` is a multiple of eight positions.
  __device__ unsigned chunk(int position, int chunk) const {
    return start + position * kRowBytes + (chunk ^ exchange(position)) * kChunkBytes;
  }
  __device__ Tile from(int position) const { return {start + position * kRowBytes}; }

  unsigned start;
};

// A thread's place in its warp, and in the accumulators of a product.
struct Lane {
  __device__ Lane() : Lane(threadIdx.x) {}
  // Read anew, so that what follows from it need not stay in registers.
  static __device__ Lane anew() { return Lane(ptx::thread_number()); }
  __device__ int row() const { return number / 4; }         // and 8 more
  __device__ int column() const { return number % 4 * 2; }  // and the next

  int number;

 private:
  explicit __device__ Lane(unsigned thread) : number(static_cast<int>(thread % kWarp)) {}
};

template <int kTiles>
__device__ __forceinline__ void zero(float (&numbers)[kTiles][4]) {
#pragma unroll
  for (int n = 0; n < kTiles; ++n) {
#pragma unroll
    for (int e = 0; e < 4; ++e) numbers[n][e] = 0.0f;
  }
}

inline constexpr unsigned kWholeWarp = 0xffffffff;

// Over the four lanes that share a row.
__device__ __forceinline__ float sum_over_row(float value) {
  value += __shfl_xor_sync(kWholeWarp, value, 1);
  return value + __shfl_xor_sync(kWholeWarp, value, 2);
}

__device__ __forceinline__ float maximum_over_row(float value) {
  value = fmaxf(value, __shfl_xor_sync(kWholeWarp, value, 1));
  return fmaxf(value, __shfl_xor_sync(kWholeWarp, value, 2));
}

}  // namespace gcrl_kernels
