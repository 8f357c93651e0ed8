#pragma once

#include <cmath>
#include <cstdint>

#include "color_cross_entropy/logits.cuh"
#include "common/softmax.cuh"

// The softmax cross-entropy of rows of logits and its gradient; the formulas are in reference.py. A
// row is held in registers between its one reading and its one writing.
namespace gcrl_kernels::color_cross_entropy {

inline constexpr int kRepeats = kPixels;  // rows that a thread takes part in, one after another

struct Smoothing {
  float label_smoothing, z_loss;
};

template <typename T>
struct SoftmaxArguments {
  Logits<T> logits, gradient;  // the gradient may be the logits; none where its data is null
  const uint8_t* mask;         // [M], or null
  Smoothing smoothing;
  int64_t rows;
  int colors, lanes;
  float *loss, *z_term;   // [M]
  float* lse;             // [2, M], or null
  int64_t lse_residuals;  // how far they lie behind each lse
  int64_t* tokens;        // [M], or null
};

template <typename T>
struct GradientArguments {
  Logits<T> logits, gradient;
  const uint8_t* mask;
  Smoothing smoothing;
  int64_t rows;
  int colors, lanes;
  const float *grad, *lse;
  int64_t grad_stride, lse_residuals;  // how far these lie behind each lse
  const int64_t* tokens;
};

// -1 for a token that is no colour's.
static __device__ __forceinline__ int32_t valid_token(int64_t token, int colors) {
  return token >= 0 && token < colors ? static_cast<int32_t>(token) : -1;
}

// Targets that are given.
struct Tokens {
  __device__ void find(int64_t first, int64_t rows, int colors, const Lanes& lanes,
                       int32_t (&found)[kRepeats]) const {
#pragma unroll
    for (int r = 0; r < kRepeats; ++r) {
      const int64_t row = first + r * lanes.groups();
      found[r] = row < rows ? valid_token(tokens[row], colors) : 0;
    }
  }

  const int64_t* tokens;
};

// The nearest colours of pixels; the lanes of a row share the palette.
template <typename Pixel, typename Color>
struct NearestColors {
  template <typename Distance>
  __device__ void find_in(int64_t first, int64_t rows, int colors, const Lanes& lanes,
                          int32_t (&found)[kRepeats]) const {
    Search<Distance> search;
#pragma unroll
    for (int r = 0; r < kRepeats; ++r) {
      const int64_t row = first + r * lanes.groups();
      search.begin(r, pixels, row, row < rows);
    }
    search.run(palette, colors, lanes.number, lanes.count);
#pragma unroll
    for (int r = 0; r < kRepeats; ++r) {
      search.nearest[r] =
          over_lanes(search.nearest[r], lanes,
                     [](const auto& one, const auto& other) { return one.nearer(other); });
      found[r] = search.index(r);
    }
  }

  __device__ void find(int64_t first, int64_t rows, int colors, const Lanes& lanes,
                       int32_t (&found)[kRepeats]) const {
    if constexpr (sizeof(Pixel) > 1) {
      find_in<Pixel>(first, rows, colors, lanes, found);
    } else if (is_exact_palette(palette, colors)) {
      find_in<float>(first, rows, colors, lanes, found);
    } else {
      find_in<uint64_t>(first, rows, colors, lanes, found);
    }
  }

  const Pixel* pixels;
  const Color* palette;
};

// From probabilities times 1 + 2 w lse to the gradient of the loss times `scale`.
template <typename T, int kWidth>
__device__ void subtract_target(float (&values)[kHeld], int32_t target, float scale, bool counts,
                                int colors, const Lanes& lanes, const Smoothing& smoothing) {
  const float evenly = smoothing.label_smoothing / static_cast<float>(colors);
#pragma unroll
  for (int i = 0; i < kHeld; ++i) {
    const int column = Part<T, kWidth>::column(i / kWidth, lanes) + i % kWidth;
    float value = values[i] - evenly;
    if (column == target) value -= 1.0f - smoothing.label_smoothing;
    values[i] = counts ? value * scale : 0.0f;
  }
}

template <typename T, int kWidth, typename Targets>
__global__ void __launch_bounds__(kBlockThreads, kWidth == 8 ? 3 : 2)
    softmax_forward(const SoftmaxArguments<T> arguments, const Targets targets) {
  const auto& a = arguments;
  const auto first_row = [&](const Lanes& lanes) {
    return int64_t{blockIdx.x} * lanes.groups() * kRepeats + lanes.group;
  };
  const auto counts = [&](int64_t row) {
    return row < a.rows && (a.mask == nullptr || a.mask[row] != 0);
  };
  Part<T, kWidth> part;
  int32_t found[kRepeats];
  {
    const Lanes lanes(a.lanes);
    const int64_t first = first_row(lanes);
    part.load(a.logits, first, a.colors, lanes, counts(first));  // on its way during the search
    targets.find(first, a.rows, a.colors, lanes, found);
  }

#pragma unroll 1
  for (int r = 0; r < kRepeats; ++r) {
    const Lanes lanes(a.lanes);
    const int64_t row = first_row(lanes) + r * lanes.groups();
    int32_t target = found[0];
#pragma unroll
    for (int other = 1; other < kRepeats; ++other) {
      if (other == r) target = found[other];
    }
    const bool counted = counts(row), valid = target >= 0;
    float values[kHeld];
    part.widen(values, a.colors, lanes, counted);
    if (r + 1 < kRepeats) {
      const int64_t next = row + lanes.groups();
      part.load(a.logits, next, a.colors, lanes, counts(next));
    }

    float highest = -INFINITY;
#pragma unroll
    for (int i = 0; i < kHeld; ++i) highest = fmaxf(highest, values[i]);
    highest = maximum_over(highest, lanes);
    // Relative to the highest, so that the loss of large logits keeps its precision.
    float total = 0.0f, at_target = 0.0f, sum = 0.0f;
#pragma unroll
    for (int i = 0; i < kHeld; ++i) {
      const int column = Part<T, kWidth>::column(i / kWidth, lanes) + i % kWidth;
      const float value = values[i] - highest;
      if (column == target) at_target = value;
      if (column < a.colors) sum += value;
      values[i] = exp_of_difference(values[i], highest);
      total += values[i];
    }
    total = sum_over(total, lanes);
    at_target = sum_over(at_target, lanes);
    const Smoothing smoothing = a.smoothing;
    const float log_total = logf(total);
    const LogSumExp lse(highest, log_total);
    const float z_term = smoothing.z_loss * lse.value * lse.value;
    float loss = log_total - (1.0f - smoothing.label_smoothing) * at_target + z_term;
    if (smoothing.label_smoothing != 0.0f) {
      loss -= smoothing.label_smoothing / static_cast<float>(a.colors) * sum_over(sum, lanes);
    }
    if (lanes.number == 0 && row < a.rows) {
      a.loss[row] = !counted ? 0.0f : valid ? loss : NAN;
      a.z_term[row] = counted ? z_term : 0.0f;
      if (a.lse != nullptr) {
        a.lse[row] = counted ? lse.value : 0.0f;
        a.lse[row + a.lse_residuals] = counted ? lse.residual : 0.0f;
      }
      if (a.tokens != nullptr) a.tokens[row] = target;
    }
    if (a.gradient.data == nullptr || row >= a.rows) continue;
    const float scale = (1.0f + 2.0f * smoothing.z_loss * lse.value) / total;
#pragma unroll
    for (int i = 0; i < kHeld; ++i) values[i] *= scale;
    subtract_target<T, kWidth>(values, target, valid ? 1.0f : NAN, counted, a.colors, lanes,
                               smoothing);
    Part<T, kWidth>::store(values, a.gradient, row, a.colors, lanes);
  }
}

template <typename T, int kWidth>
__global__ void __launch_bounds__(kBlockThreads, kWidth == 8 ? 6 : 3)
    softmax_backward(const GradientArguments<T> arguments) {
  const auto& a = arguments;
  const Lanes lanes(a.lanes);
  const int64_t row = int64_t{blockIdx.x} * lanes.groups() + lanes.group;
  if (row >= a.rows) return;
  const bool counted = a.mask == nullptr || a.mask[row] != 0;
  Part<T, kWidth> part;
  part.load(a.logits, row, a.colors, lanes, counted);
  const int32_t target = valid_token(a.tokens[row], a.colors);
  const float lse = a.lse[row], residual_2 = a.lse[row + a.lse_residuals] * kLog2E;
  const float grad = a.grad[row * a.grad_stride];
  const float factor = 1.0f + 2.0f * a.smoothing.z_loss * lse;
  float values[kHeld];
  part.widen(values, a.colors, lanes, counted);
#pragma unroll
  for (int i = 0; i < kHeld; ++i) values[i] = probability(values[i], lse, residual_2) * factor;
  subtract_target<T, kWidth>(values, target, target >= 0 ? grad : NAN, counted, a.colors, lanes,
                             a.smoothing);
  Part<T, kWidth>::store(values, a.gradient, row, a.colors, lanes);
}

}  // namespace gcrl_kernels::color_cross_entropy
