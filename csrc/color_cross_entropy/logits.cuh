#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "color_cross_entropy/lanes.cuh"
#include "common/ptx.cuh"

namespace gcrl_kernels::color_cross_entropy {

inline constexpr int kHeld = 16;  // of a row's logits in a thread's registers
inline constexpr int kMostLogits = kHeld * kBlockThreads;

// How many of a dtype's logits a thread loads and stores at a time.
template <typename T>
inline constexpr int kWide = 16 / static_cast<int>(sizeof(T));

// Logits [M, K], or their gradient.
template <typename T>
struct Logits {
  __device__ T* row(int64_t number) const { return data + number * strides[0]; }

  T* data = nullptr;
  int64_t strides[2] = {};
};

// One thread's part of a row: pieces of kWidth neighbouring logits, a row's lanes side by side.
template <typename T, int kWidth>
struct Part {
  static constexpr int kPieces = kHeld / kWidth;

  __device__ static int column(int piece, const Lanes& lanes) {
    return (piece * lanes.count + lanes.number) * kWidth;
  }

  __device__ void load(const Logits<T>& logits, int64_t row, int colors, const Lanes& lanes,
                       bool counts) {
    const T* begin = logits.row(row);
#pragma unroll
    for (int p = 0; p < kPieces; ++p) {
      const int first = column(p, lanes);
      if (!counts || first >= colors) continue;
      if constexpr (kWidth > 1) {
        wide[p] = *reinterpret_cast<const uint4*>(begin + first);
      } else {
        narrow[p] = begin[first * logits.strides[1]];
      }
    }
  }

  // -inf beyond the row, or where it does not count.
  __device__ void widen(float (&values)[kHeld], int colors, const Lanes& lanes, bool counts) const {
#pragma unroll
    for (int p = 0; p < kPieces; ++p) {
      const bool inside = counts && column(p, lanes) < colors;
      T numbers[kWidth];
      if constexpr (kWidth > 1) {
        std::memcpy(numbers, &wide[p], sizeof numbers);
      } else {
        numbers[0] = narrow[p];
      }
#pragma unroll
      for (int e = 0; e < kWidth; ++e) {
        values[p * kWidth + e] = inside ? static_cast<float>(numbers[e]) : -INFINITY;
      }
    }
  }

  __device__ static void store(const float (&values)[kHeld], const Logits<T>& logits, int64_t row,
                               int colors, const Lanes& lanes) {
    T* begin = logits.row(row);
#pragma unroll
    for (int p = 0; p < kPieces; ++p) {
      const int first = column(p, lanes);
      if (first >= colors) continue;
      const float* numbers = values + p * kWidth;
      if constexpr (kWidth == 1) {
        begin[first * logits.strides[1]] = T(numbers[0]);
      } else if constexpr (sizeof(T) == 4) {
        *reinterpret_cast<float4*>(begin + first) =
            make_float4(numbers[0], numbers[1], numbers[2], numbers[3]);
      } else {
        *reinterpret_cast<uint4*>(begin + first) =
            make_uint4(ptx::pack<T>(numbers[0], numbers[1]), ptx::pack<T>(numbers[2], numbers[3]),
                       ptx::pack<T>(numbers[4], numbers[5]), ptx::pack<T>(numbers[6], numbers[7]));
      }
    }
  }

  // One of the two is used.
  uint4 wide[kWidth > 1 ? kPieces : 1];
  T narrow[kWidth > 1 ? 1 : kPieces];
};

}  // namespace gcrl_kernels::color_cross_entropy
