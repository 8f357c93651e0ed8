#pragma once

#include <cstdint>

#include "axial_attention/grid.h"

namespace gcrl_kernels::axial_attention {

// Divides numbers below 2^31 by one that is known at the launch.
class Divider {
 public:
  Divider() = default;
  explicit Divider(uint32_t divisor) : divisor_(divisor) {
    while ((uint64_t{1} << shift_) < divisor) ++shift_;
    if (divisor > 1) {
      const uint64_t power = uint64_t{1} << (31 + shift_);
      multiplier_ = static_cast<uint32_t>((power + divisor - 1) / divisor);
    }
  }

  __device__ uint32_t quotient(uint32_t number) const {
    return divisor_ == 1 ? number : __umulhi(number, multiplier_) >> (shift_ - 1);
  }
  __device__ uint32_t divisor() const { return divisor_; }

 private:
  uint32_t divisor_ = 1, multiplier_ = 0, shift_ = 0;
};

// A row's indices in the dimensions that tell the rows apart; the last is its head.
struct RowPlace {
  uint32_t outer[kMostOuter];
  __device__ int head() const { return static_cast<int>(outer[kMostOuter - 1]); }
};

// The rows of a call, numbered as Grid does.
struct RowNumbers {
  explicit RowNumbers(const Grid& grid) : rows(static_cast<uint32_t>(grid.rows())) {
    const int missing = kMostOuter - grid.outer();
    for (int d = 0; d < grid.outer(); ++d) {
      sizes[missing + d] = Divider(static_cast<uint32_t>(grid.size(d)));
    }
  }

  __device__ RowPlace place(uint32_t row) const {
    RowPlace place;
#pragma unroll
    for (int d = kMostOuter - 1; d > 0; --d) {
      const uint32_t quotient = sizes[d].quotient(row);
      place.outer[d] = row - quotient * sizes[d].divisor();
      row = quotient;
    }
    place.outer[0] = row;
    return place;
  }

  uint32_t rows;
  Divider sizes[kMostOuter];
};

// The rows of a tensor in device memory, in elements.
template <typename T>
struct StridedRows {
  T* data = nullptr;
  int64_t along = 0;
  int64_t outer[kMostOuter] = {};
  bool wide = false;  // every position lies at a multiple of 16 bytes

  __device__ T* at(const RowPlace& place) const {
    int64_t offset = 0;
#pragma unroll
    for (int d = 0; d < kMostOuter; ++d) offset += place.outer[d] * outer[d];
    return data + offset;
  }
};

}  // namespace gcrl_kernels::axial_attention
