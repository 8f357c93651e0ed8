// Matrix products of one instruction set, whose file also defines
//   TILE_ROWS, TILE_VECTORS  the part of a product that is held in registers
#pragma once

#include "common/vectors_level.h"

namespace gcrl_kernels::LEVEL {
namespace {

// A factor of a product: element (i, k) is data[i * row + k * column].
struct Factor {
  const float* data;
  int64_t row, column;
};

// Where a product goes: to scratch memory, perhaps added to what is there.
struct Packed {
  float* data;
  int64_t stride;
  bool add = false;

  Packed part(int64_t i, int64_t j) const { return {data + i * stride + j, stride, add}; }
  Floats before(int i, int j) const { return add ? at(data + i * stride + j * kLanes) : Floats{}; }
  void write(int i, int j, Floats values) const { at(data + i * stride + j * kLanes) = values; }
};

// out[i, j] = Σ_k left(i, k) right[k, j], for kRows rows i and kVectors vectors of columns j; at
// each k, meanwhile takes a step.
template <int kRows, int kVectors, typename Out, typename Meanwhile>
void multiply_tile(const Factor& left, const float* right, int64_t right_stride, int64_t depth,
                   const Out& out, Meanwhile& meanwhile) {
  Floats sum[kRows][kVectors];
#pragma GCC unroll 16
  for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 4
    for (int j = 0; j < kVectors; ++j) {
      sum[i][j] = out.before(i, j);
    }
  }
  const float* a = left.data;
  for (int64_t k = 0; k < depth; ++k, a += left.column, right += right_stride) {
    meanwhile.step(k);
    Floats b[kVectors];
#pragma GCC unroll 4
    for (int j = 0; j < kVectors; ++j) b[j] = at(right + j * kLanes);
#pragma GCC unroll 16
    for (int i = 0; i < kRows; ++i) {
      const float factor = a[i * left.row];
#pragma GCC unroll 4
      for (int j = 0; j < kVectors; ++j) sum[i][j] += factor * b[j];
    }
  }
#pragma GCC unroll 16
  for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 4
    for (int j = 0; j < kVectors; ++j) out.write(i, j, sum[i][j]);
  }
}

// multiply_tile for a number of rows known only here.
template <int kVectors, int kRows = TILE_ROWS, typename Out, typename Meanwhile>
void multiply_rows(int64_t rows, const Factor& left, const float* right, int64_t right_stride,
                   int64_t depth, const Out& out, Meanwhile& meanwhile) {
  if constexpr (kRows > 0) {
    if (rows == kRows) {
      multiply_tile<kRows, kVectors>(left, right, right_stride, depth, out, meanwhile);
    } else {
      multiply_rows<kVectors, kRows - 1>(rows, left, right, right_stride, depth, out, meanwhile);
    }
  }
}

}  // namespace
}  // namespace gcrl_kernels::LEVEL
