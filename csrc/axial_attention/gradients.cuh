#pragma once

#include <cstdint>

#include "axial_attention/logits.cuh"
#include "axial_attention/tiles.cuh"
#include "common/products.cuh"

namespace gcrl_kernels::axial_attention {

template <typename T>
struct BackwardArguments {
  RowNumbers rows;
  Options options;
  Division division;
  int tiles;  // of kColumns positions in a row
  StridedRows<T> grad, q, k, v, out, dq, dk, dv;
  StridedRows<float> lse;
  float* dbias;    // [slots, N, N], zeros at first, or null
  uint32_t slots;  // a row adds to slot `row % slots`; the heads divide the slots
};

// Positions of a row in shared memory: as queries, Q and dO; as keys, K and V.
template <typename T, int kFeatures>
struct Side {
  Tile<T, kFeatures> first, second;

  __device__ Side from(int position) const { return {first.from(position), second.from(position)}; }
};

// A warp's 16 positions, its own, against 8 kTiles others of the same row. Its own are queries and
// the others keys, or with kOwnKeys the reverse, and everything is transposed. The numbers lse, in
// base 2, and delta = sum P dP lie in shared memory, beginning with the first query at hand.
template <typename T, int kFeatures, bool kOwnKeys>
struct Gradients {
  using Product = Products<T, kFeatures>;
  using Positions = Side<T, kFeatures>;

  // P, into zeros.
  template <int kTiles>
  static __device__ __forceinline__ void probabilities(float (&p)[kTiles][4], const Positions& own,
                                                       const Positions& others,
                                                       const Additions& additions, int own_begin,
                                                       int others_begin, const float* lse) {
    Product::scores(p, own.first, others.first, additions.features);
    const auto minus = [&](int n, int e) { return lse[query(n, e)]; };
    to_logits<kOwnKeys>(p, additions, own_begin, others_begin, minus);
#pragma unroll
    for (int n = 0; n < kTiles; ++n) {
#pragma unroll
      for (int e = 0; e < 4; ++e) p[n][e] = ptx::exp2(p[n][e]);
    }
  }

  // dP, into zeros.
  template <int kTiles>
  static __device__ __forceinline__ void of_probabilities(float (&dp)[kTiles][4],
                                                          const Positions& own,
                                                          const Positions& others,
                                                          const Additions& additions) {
    Product::scores(dp, own.second, others.second, additions.features);
  }

  // dS = P (dP - delta), in dP's place.
  template <int kTiles>
  static __device__ __forceinline__ void of_logits(float (&dp)[kTiles][4],
                                                   const float (&p)[kTiles][4],
                                                   const float* delta) {
#pragma unroll
    for (int n = 0; n < kTiles; ++n) {
#pragma unroll
      for (int e = 0; e < 4; ++e) dp[n][e] = p[n][e] * (dp[n][e] - delta[query(n, e)]);
    }
  }

 private:
  static __device__ int query(int n, int e) {
    const Lane lane;
    return kOwnKeys ? 8 * n + lane.column() + e % 2 : lane.row() + e / 2 * 8;
  }
};

// Adds dS of a warp's queries to the gradient of the bias, [N, N].
template <int kTiles>
__device__ __forceinline__ void add_to_bias(float* dbias, const float (&ds)[kTiles][4], int query,
                                            int key, int length) {
  const Lane lane;
#pragma unroll
  for (int n = 0; n < kTiles; ++n) {
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      const int i = query + lane.row() + e / 2 * 8, j = key + 8 * n + lane.column() + e % 2;
      if (i < length && j < length) dbias[i * length + j] += ds[n][e];
    }
  }
}

// The lse of a query in base 2; infinity where there is no such query, or it has no key, so that
// its probabilities are zero.
__device__ __forceinline__ float base_2(const float* lse, int64_t along, int query, int length) {
  const float value = query < length ? lse[query * along] : -INFINITY;
  return value == -INFINITY ? INFINITY : value * kLog2E;
}

// dbias [heads, N, N]: the sum of its slots, in their order.
static __global__ void sum_slots(const float* slots, uint32_t count, int heads, int64_t size,
                                 float* dbias) {
  const int64_t i = int64_t{blockIdx.x} * blockDim.x + threadIdx.x, all = heads * size;
  if (i >= all) return;
  float sum = 0.0f;
  for (uint32_t slot = 0; slot < count; slot += heads) sum += slots[slot * size + i];
  dbias[i] = sum;
}

}  // namespace gcrl_kernels::axial_attention
