#pragma once

#include <cstdint>

#include "contrastive/weights.cuh"

namespace gcrl_kernels::contrastive {

// The rows' gradients, those before `split` in the first tensor; contiguous.
template <typename T>
struct GradientRows {
  T *first, *second;
  int64_t split;
  int features;

  __device__ T* row(int64_t i) const {
    return i < split ? first + i * features : second + (i - split) * features;
  }
};

template <typename T>
struct BackwardArguments {
  Embeddings<T> rows, columns;
  Meeting meeting;
  Scale scale;
  Anchors row_anchors, column_anchors;  // the latter's only before column meeting.anchors
  const Common* common;
  bool normalize;
  GradientRows<T> gradient;
  float* dscale;       // of each row
  int feature_blocks;  // that each row's gradient is cut into
};

// A warp has 16 rows and goes over all columns, with kValues steps of the rows' gradients in its
// registers.
template <typename T, int kValues>
__global__ void __launch_bounds__(kMostWarps* kWarp, 1)
    contrast_backward(const __grid_constant__ BackwardArguments<T> a) {
  using Product = StepProducts<T>;
  const Lane lane;
  const int feature_block = static_cast<int>(blockIdx.x % a.feature_blocks);
  const int64_t block = int64_t{blockIdx.x / a.feature_blocks} * (blockDim.x / kWarp * kWarpRows);
  const int64_t begin = block + threadIdx.x / kWarp * kWarpRows;
  const bool works = begin < a.meeting.rows;
  const int64_t row[2] = {begin + lane.row(), begin + lane.row() + 8};
  const bool one_exponential = a.common->one_exponential;
  const float middle = a.common->middle;
  float factor[2], weight[2], lse[2], residual[2] = {}, push[2] = {}, all[2] = {}, anchored[2] = {};
  int32_t row_class[2] = {};
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const Anchors& own = a.row_anchors;
    factor[half] = number_at(a.rows.factor, row[half], own.count) * a.scale();
    weight[half] = number_at(one_exponential ? own.weight : own.pull, row[half], own.count);
    lse[half] = one_exponential ? middle : number_at(own.lse, row[half], own.count);
    if (!one_exponential)
      residual[half] = number_at(own.lse_residual, row[half], own.count) * kLog2E;
    if (own.push) push[half] = number_at(own.push, row[half], own.count);
    if (own.classes) row_class[half] = number_at(own.classes, row[half], own.count);
  }

  float sums[kValues][Product::kSums][4];
#pragma unroll
  for (int v = 0; v < kValues; ++v) zero(sums[v]);
  const int first_value = feature_block * kValues;
  const int values = min(kValues, Steps<T>::count(a.rows.width) - first_value);
  Steps<T> steps(a.rows, a.columns, a.meeting, block, first_value, values);
#pragma unroll 1
  for (int64_t column = steps.first; column < steps.last; column += kColumns) {
    float s[kColumnTiles][4];
    find_products(s, steps, works);
    if (works) {
      const Anchors& others = a.column_anchors;
      const int end = within_tile(steps.last - column);
      const int anchors = min(within_tile(a.meeting.anchors - column), end);
      const int self[2] = {within_tile(row[0] - column), within_tile(row[1] - column)};
      const float* weights = (one_exponential ? others.weight : others.pull) + column;
      const Rules rules[2] = {{a.meeting, row[0], column, end}, {a.meeting, row[1], column, end}};
      float part[2] = {}, anchored_part[2] = {};
      for_columns([&](int n, int i, int j) {
        const float column_factor = number_at(a.columns.factor + column, j, end);
        const float column_weight = number_at(weights, j, anchors);
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          float& number = s[n][2 * half + i];
          const float product = number;
          const float score = ptx::multiply(product, factor[half] * column_factor);
          float w;
          if (one_exponential) {
            w = exp_of_difference(score, middle) * (weight[half] + column_weight);
          } else {
            w = weight[half] * probability(score, lse[half], residual[half]);
            if (j < anchors) {
              const float column_residual = others.lse_residual[column + j] * kLog2E;
              w += column_weight * probability(score, others.lse[column + j], column_residual);
            }
          }
          if (!rules[half].candidate(j)) w = 0.0f;
          if (others.push) {
            const bool positive = others.classes ? j != self[half] && j < anchors &&
                                                       others.classes[column + j] == row_class[half]
                                                 : j == rules[half].partner;
            if (positive && j < anchors) w -= push[half] + others.push[column + j];
          }
          w *= column_factor;
          part[half] = fmaf(w, product, part[half]);
          if (j < anchors) anchored_part[half] = fmaf(w, product, anchored_part[half]);
          number = w;
        }
      });
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        all[half] += part[half];
        anchored[half] += anchored_part[half];
      }
    }
#pragma unroll
    for (int v = 0; v < kValues; ++v) {
      if (v >= values) break;
      steps.advance();
      if (!works) continue;
      if constexpr (sizeof(T) == sizeof(float)) {
        float part[Product::kSums][4];
        zero(part);
        Product::accumulate(part, s, steps.columns());
        add(sums[v], part);
      } else {
        Product::accumulate(sums[v], s, steps.columns());
      }
    }
  }
  if (!works) return;

#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const bool inside = row[half] < a.meeting.rows;
    const float own_factor = number_at(a.rows.factor, row[half], a.meeting.rows);
    const float power = 1.0f / a.common->power;
    const float total = sum_over_row(all[half]) * own_factor * power;
    const float among_anchors = sum_over_row(anchored[half]) * own_factor * power;
    if (!inside) continue;
    if (feature_block == 0 && lane.column() == 0) a.dscale[row[half]] = total - among_anchors / 2;
    const float divisor = a.normalize ? a.rows.divisor[row[half]] : 1.0f;
    // z · Σ_k W z_k, unless the row was divided by the constant.
    const float radial = a.normalize && divisor > kLeastNorm ? total * own_factor : 0.0f;
    const float by = a.scale() / divisor;
    const T* z = a.rows.row(row[half]);
    T* to = a.gradient.row(row[half]);
#pragma unroll
    for (int v = 0; v < kValues; ++v) {
#pragma unroll
      for (int n = 0; n < Product::kSums; ++n) {
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          if (Product::row_half(n, e) != half) continue;
          const int feature = (first_value + v) * kStep<T> + Product::feature(n, e);
          if (feature >= a.gradient.features) continue;
          const float along = static_cast<float>(z[feature]) * radial;
          to[feature] = static_cast<T>((sums[v][n][e] * power - along) * by);
        }
      }
    }
  }
}

}  // namespace gcrl_kernels::contrastive
