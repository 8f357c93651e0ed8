#pragma once

#include <cstdint>

#include "axial_attention/row_numbers.cuh"
#include "common/ptx.cuh"

namespace gcrl_kernels {

inline constexpr int kWarp = 32;
inline constexpr int kChunkBytes = 16;  // what one thread loads and stores at a time

template <typename T>
inline constexpr int kChunk = kChunkBytes / static_cast<int>(sizeof(T));

// How a block divides its work: `rows` rows side by side, `warps` warps for each of them, and 16
// positions of the row for each warp.
inline constexpr int kWarpPositions = 16;
struct Division {
  Division() = default;
  Division(int rows_, int warps_)
      : rows(rows_),
        warps(warps_),
        by_rows(static_cast<uint32_t>(rows_)),
        by_warps(static_cast<uint32_t>(warps_)) {}

  // Which of the block's rows a warp works on.
  __device__ int row_of(int warp) const {
    return static_cast<int>(by_warps.quotient(static_cast<uint32_t>(warp)));
  }

  int rows = 1, warps = 1;
  Divider by_rows, by_warps;
};

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

// Loads a block's rows: neighbouring threads load neighbouring chunks of a position, then the same
// position of the next row, which is the next head of the line, or the same head of the next line.
template <typename T, int kFeatures>
class Loader {
 public:
  static constexpr int kChunks = Tile<T, kFeatures>::kChunks;

  __device__ Loader(const Division& division, int features) {
    const unsigned thread = ptx::thread_number();
    chunk_ = static_cast<int>(thread % kChunks);
    first_ = static_cast<int>(division.by_rows.quotient(thread / kChunks));
    row_ = static_cast<int>(thread / kChunks) - first_ * division.rows;
    step_ = division.warps * kWarp / kChunks;
    filled_ = chunk_ * kChunk<T> < features;
  }

  // Which of the block's rows this thread loads.
  __device__ int row() const { return row_; }

  // Copies positions begin to begin + count of a row into a tile; zeros stand for positions from
  // `length` on, and for features that the row lacks. There after the wait for the copies.
  __device__ void load(Tile<T, kFeatures> tile, const StridedRows<T>& tensor, const T* row,
                       bool exists, int begin, int count, int length) const {
#pragma unroll 1
    for (int i = first_; i < count; i += step_) {
      const bool inside = exists && filled_ && begin + i < length;
      const T* from = inside ? row + (begin + i) * tensor.along + chunk_ * kChunk<T> : tensor.data;
      if (tensor.wide) {
        ptx::copy_async(tile.chunk(i, chunk_), from, inside);
      } else {
        copy_one_by_one(tile.chunk(i, chunk_), from, inside);
      }
    }
  }

 private:
  static __device__ void copy_one_by_one(unsigned to, const T* from, bool inside) {
    T* numbers = reinterpret_cast<T*>(ptx::shared_memory() + to);
#pragma unroll
    for (int i = 0; i < kChunk<T>; ++i) numbers[i] = inside ? from[i] : T(0.0f);
  }

  int chunk_, row_, first_, step_;
  bool filled_;
};

// A thread's place in its warp, and in the accumulators of a product.
struct Lane {
  __device__ Lane() : number(static_cast<int>(threadIdx.x) % kWarp) {}
  __device__ int row() const { return number / 4; }         // and 8 more
  __device__ int column() const { return number % 4 * 2; }  // and the next

  int number;
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
