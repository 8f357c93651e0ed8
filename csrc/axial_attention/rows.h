#pragma once

#include <stdint.h>

#include "common/element_type.h"

namespace gcrl_kernels {

// What all rows of a call have in common: `length` positions that attend to one another, with
// `features` numbers each.
struct RowShape {
  ElementType type;
  int64_t length, features;
  bool causal;
  float scale;
};

// One head's row in a tensor: its first element, and how many elements lie between positions. The
// features of a position lie side by side. No data: there is no such row.
struct Row {
  void* data;
  int64_t stride;
};

// The rows of one head at one place, and what is added to their scores. Padded means that a row has
// padded(length) numbers. `next` are the inputs that the thread has after these, and `before` how
// many it had already: while it computes the one, it brings the other into its scratch memory.
struct ForwardRow {
  Row inputs[3];   // q, k, v
  Row outputs[1];  // out
  Row next[3];
  int64_t before;
  float *lse, *lse_residual;  // [length], lse_stride apart; the residual is what rounding lost
  int64_t lse_stride;
  const float* bias;     // [length, padded], or null
  const float* allowed;  // [padded], 0 or minus infinity for each key, or null
};

struct BackwardRow {
  Row inputs[4];   // q, k, v, grad
  Row outputs[3];  // dq, dk, dv
  Row next[4];
  int64_t before;
  const float *lse, *lse_residual;
  int64_t lse_stride;
  const float* bias;
  const float* allowed;
  float* dbias;  // [length, padded], which the gradient is added to, or null
};

// One instruction set's kernels. They work in float32, in scratch memory that is aligned to 64
// bytes, belongs to one thread, and is left alone between its rows.
struct RowKernels {
  int64_t (*forward_scratch)(const RowShape& shape);  // in floats, a multiple of 16
  int64_t (*backward_scratch)(const RowShape& shape);
  void (*forward)(const RowShape& shape, const ForwardRow& row, float* scratch);
  void (*backward)(const RowShape& shape, const BackwardRow& row, float* scratch);
};

// How far apart rows of `length` numbers lie in scratch memory: whole vectors of every instruction
// set, and no multiple of 1 KB, so that a column of them does not fall on a few cache lines.
constexpr int64_t padded(int64_t length) {
  const int64_t whole = (length + 15) / 16 * 16;
  return whole % 256 == 0 ? whole + 16 : whole;
}

namespace portable {
extern const RowKernels row_kernels;
}
namespace avx2 {
extern const RowKernels row_kernels;
}
namespace avx512 {
extern const RowKernels row_kernels;
}

}  // namespace gcrl_kernels
