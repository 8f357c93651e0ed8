#pragma once

#include <stdint.h>

#include "common/element_type.h"

namespace gcrl_kernels {

// What all rows of a call have in common: a row has `colors` logits, side by side.
struct SoftmaxShape {
  ElementType type;
  int64_t colors;
  float label_smoothing, z_loss;
};

struct SoftmaxLoss {
  float loss, z_term;       // the loss has the z-loss part in it
  float lse, lse_residual;  // the log-sum-exp, and what its rounding lost
};

// One instruction set's kernels, on one row each. A token outside 0 to colors - 1 gives NaN.
struct SoftmaxKernels {
  SoftmaxLoss (*forward)(const SoftmaxShape& shape, const void* logits, int64_t token);
  // `grad` times the gradient of the loss; dlogits may be the logits.
  void (*backward)(const SoftmaxShape& shape, const void* logits, int64_t token, float lse,
                   float lse_residual, float grad, void* dlogits);
  // Both at once for float32 logits, which the gradient of the loss takes the place of.
  SoftmaxLoss (*differentiate)(const SoftmaxShape& shape, float* logits, int64_t token);
  // Adds rows [count, colors] to columns begin to end of sums [colors].
  void (*add_rows)(const float* rows, int64_t count, int64_t colors, int64_t begin, int64_t end,
                   float* sums);
};

namespace portable {
extern const SoftmaxKernels softmax_kernels;
}
namespace avx2 {
extern const SoftmaxKernels softmax_kernels;
}
namespace avx512 {
extern const SoftmaxKernels softmax_kernels;
}

}  // namespace gcrl_kernels
