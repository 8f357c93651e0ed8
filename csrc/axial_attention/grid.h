#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <cstdint>

namespace gcrl_kernels {

constexpr int kMostOuter = 4;  // batch, two dimensions of the grid, heads

// A tensor's strides in elements: along the rows, and over what tells the rows apart.
struct GridStrides {
  int64_t along = 0;
  int64_t outer[kMostOuter] = {};
};

// A row's indices in the dimensions that tell the rows apart.
struct GridPlace {
  int64_t outer[kMostOuter] = {};

  // Of its first element in a tensor, in elements.
  int64_t offset(const GridStrides& strides) const {
    int64_t offset = 0;
    for (int d = 0; d < kMostOuter; ++d) offset += outer[d] * strides.outer[d];
    return offset;
  }
};

// The rows of [B, *grid, heads, D] along one axis of the grid, numbered with the heads of a line
// side by side.
class Grid {
 public:
  Grid(const torch::stable::Tensor& q, int64_t axis) : axis_(axis + 1), length_(q.size(axis + 1)) {
    STD_TORCH_CHECK(q.dim() >= 4 && q.dim() <= 6, "q: expected [B, *grid, heads, D]");
    for (int64_t d = 0; d < q.dim() - 1; ++d) {
      if (d == axis_) continue;
      sizes_[outer_] = q.size(d);
      rows_ *= sizes_[outer_++];
    }
  }

  int64_t length() const { return length_; }
  int64_t rows() const { return rows_; }
  int64_t heads() const { return sizes_[outer_ - 1]; }

  // The dimensions that tell the rows apart; the heads are the last.
  int outer() const { return outer_; }
  int64_t size(int dimension) const { return sizes_[dimension]; }

  // Of a tensor [B, *grid, heads, D], [B, *grid, heads], or [B, *grid], which has no stride over
  // heads.
  GridStrides strides(const torch::stable::Tensor& tensor) const {
    GridStrides strides;
    strides.along = tensor.stride(axis_);
    int found = 0;
    for (int64_t d = 0; d < tensor.dim() && found < outer_; ++d) {
      if (d != axis_) strides.outer[found++] = tensor.stride(d);
    }
    return strides;
  }

  // Where a row lies.
  GridPlace place(int64_t row) const {
    GridPlace place;
    for (int d = outer_ - 1; d >= 0; --d) {
      place.outer[d] = row % sizes_[d];
      row /= sizes_[d];
    }
    return place;
  }

 private:
  int64_t axis_, length_, rows_ = 1;
  int64_t sizes_[kMostOuter] = {};
  int outer_ = 0;
};

}  // namespace gcrl_kernels
