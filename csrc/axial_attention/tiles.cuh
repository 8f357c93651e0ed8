#pragma once

#include <cstdint>

#include "axial_attention/row_numbers.cuh"
#include "common/tiles.cuh"

namespace gcrl_kernels::axial_attention {

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

// Which keys of a row may be attended to; any byte but zero stands for True.
struct KeyMask {
  __device__ bool operator()(int key) const { return data == nullptr || data[key * along] != 0; }

  const uint8_t* data;  // null: all
  int64_t along;
};

struct Everything {
  __device__ bool operator()(int /*position*/) const { return true; }
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
  // `length` on, for those that are not `taken`, and for features that the row lacks. There after
  // the wait for the copies.
  template <typename Taken = Everything>
  __device__ void load(Tile<T, kFeatures> tile, const StridedRows<T>& tensor, const T* row,
                       bool exists, int begin, int count, int length,
                       const Taken& taken = {}) const {
#pragma unroll 1
    for (int i = first_; i < count; i += step_) {
      const bool inside = exists && filled_ && begin + i < length && taken(begin + i);
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

}  // namespace gcrl_kernels::axial_attention
