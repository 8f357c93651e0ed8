#pragma once

#include <cmath>
#include <cstdint>

#include "contrastive/meeting.cuh"

namespace gcrl_kernels::contrastive {

template <typename T>
struct ForwardArguments {
  Embeddings<T> rows, columns;
  Meeting meeting;
  Scale scale;
  const int32_t* classes;  // whose equals are positives; null: the partner is
  const float* share;      // with classes: 1 / positives, or 0 where there are none
  float* losses;           // null: they are not asked for
  float *lse, *lse_residual;
};

// A warp has 16 rows and goes over all columns: each lane has the sums of a quarter of them.
template <typename T>
__global__ void __launch_bounds__(kMostWarps* kWarp, sizeof(T) == sizeof(float) ? 1 : 2)
    contrast_forward(const __grid_constant__ ForwardArguments<T> a) {
  const Lane lane;
  const int64_t block = int64_t{blockIdx.x} * (blockDim.x / kWarp * kWarpRows);
  const int64_t begin = block + threadIdx.x / kWarp * kWarpRows;
  const bool works = begin < a.meeting.rows;
  const int64_t row[2] = {begin + lane.row(), begin + lane.row() + 8};
  float factor[2], maximum[2] = {-INFINITY, -INFINITY}, sum[2] = {}, positive[2] = {};
  int32_t row_class[2] = {};
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    factor[half] = number_at(a.rows.factor, row[half], a.meeting.rows) * a.scale();
    if (a.classes) row_class[half] = number_at(a.classes, row[half], a.meeting.rows);
  }

  Steps<T> steps(a.rows, a.columns, a.meeting, block, 0, 0);
#pragma unroll 1
  for (int64_t column = steps.first; column < steps.last; column += kColumns) {
    float s[kColumnTiles][4];
    find_products(s, steps, works);
    if (!works) continue;
    const int end = within_tile(steps.last - column);
    for_columns([&](int n, int i, int j) {
      const float column_factor = number_at(a.columns.factor + column, j, end);
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float& score = s[n][2 * half + i];
        score = ptx::multiply(score, factor[half] * column_factor);
      }
    });
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const Rules rules(a.meeting, row[half], column, end);
      if (a.classes) {
        const int anchors = within_tile(a.meeting.anchors - column);
        const int self = within_tile(row[half] - column);
        const int32_t* classes = a.classes + column;
        for_columns([&](int n, int i, int j) {
          const bool same = j < anchors && j != self && classes[j] == row_class[half];
          positive[half] += same ? s[n][2 * half + i] : 0.0f;
        });
      } else if (a.losses && rules.has_partner()) {
        for_columns([&](int n, int i, int j) {
          if (j == rules.partner) positive[half] = s[n][2 * half + i];
        });
      }
      if (!rules.plain()) {
        for_columns([&](int n, int i, int j) {
          if (!rules.candidate(j)) s[n][2 * half + i] = -INFINITY;
        });
      }
      float larger = maximum[half];
      for_columns([&](int n, int i, int) { larger = fmaxf(larger, s[n][2 * half + i]); });
      const float base = larger == -INFINITY ? 0.0f : larger;
      float part = 0.0f;
      for_columns([&](int n, int i, int) { part += exp_of_difference(s[n][2 * half + i], base); });
      sum[half] = fmaf(sum[half], exp_of_difference(maximum[half], base), part);
      maximum[half] = larger;
    }
  }
  if (!works) return;

#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const float largest = maximum_over_row(maximum[half]);
    const float base = largest == -INFINITY ? 0.0f : largest;
    const float total = sum_over_row(sum[half] * exp_of_difference(maximum[half], base));
    const float mean = sum_over_row(positive[half]);
    if (lane.column() != 0 || row[half] >= a.meeting.rows) continue;
    const LogSumExp lse(base, logf(total));
    a.lse[row[half]] = lse.value;
    a.lse_residual[row[half]] = lse.residual;
    if (a.losses) {
      const float share = a.share ? a.share[row[half]] : 1.0f;
      a.losses[row[half]] = share == 0.0f ? 0.0f : (lse.value - mean * share) + lse.residual;
    }
  }
}

}  // namespace gcrl_kernels::contrastive
