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
  int64_t residuals;  // how far they lie behind each lse
  float* dbias;       // [slots, N, N], zeros at first, or null
  uint32_t slots;     // a row adds to slot `row % slots`; the heads divide the slots
};

// Positions of a row in shared memory: as queries, Q and dO; as keys, K and V.
template <typename T, int kFeatures>
struct Side {
  Tile<T, kFeatures> first, second;

  __device__ Side from(int position) const { return {first.from(position), second.from(position)}; }
};

// Numbers of 16 queries in shared memory, so near one another that one address leads to all: lse,
// infinity where there is no such query or it has no key, so that its probabilities are zero; its
// residual, in base 2; and delta = sum P dP.
struct QueryNumbers {
  template <typename T>
  __device__ void read(int i, const BackwardArguments<T>& arguments, const RowPlace& place,
                       int query) {
    const StridedRows<float>& saved = arguments.lse;
    const bool exists = query < arguments.options.length;
    const float* from = saved.at(place) + query * saved.along;
    const float value = exists ? from[0] : -INFINITY;
    lse[i] = value == -INFINITY ? INFINITY : value;
    residual[i] = exists ? from[arguments.residuals] * kLog2E : 0.0f;
  }

  float lse[kWarpPositions], residual[kWarpPositions], delta[kWarpPositions];
};

__device__ __forceinline__ QueryNumbers* shared_numbers(unsigned start) {
  return reinterpret_cast<QueryNumbers*>(ptx::shared_memory() + start);
}

// A warp's 16 positions, its own, against 8 kTiles others of the same row. Its own are queries and
// the others keys, or with kOwnKeys the reverse, and everything is transposed. The numbers of the
// queries begin with the first one at hand.
template <typename T, int kFeatures, bool kOwnKeys>
struct Gradients {
  using Product = Products<T, kFeatures>;
  using Positions = Side<T, kFeatures>;

  // P, into zeros.
  template <int kTiles>
  static __device__ __forceinline__ void probabilities(float (&p)[kTiles][4], const Positions& own,
                                                       const Positions& others,
                                                       const Additions& additions, int own_begin,
                                                       int others_begin,
                                                       const QueryNumbers* numbers) {
    Product::scores(p, own.first, others.first, additions.features);
    to_logits<kOwnKeys>(p, additions, own_begin, others_begin);
    const Place place;
#pragma unroll
    for (int n = 0; n < kTiles; ++n) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const QueryNumbers& from = numbers[place.group(n)];
        const int i = place.in_group(n, e);
        p[n][e] = probability(p[n][e], from.lse[i], from.residual[i]);
      }
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
                                                   const QueryNumbers* numbers) {
    const Place place;
#pragma unroll
    for (int n = 0; n < kTiles; ++n) {
#pragma unroll
      for (int e = 0; e < 4; ++e)
        dp[n][e] = p[n][e] * (dp[n][e] - numbers[place.group(n)].delta[place.in_group(n, e)]);
    }
  }

 private:
  // Where the query of score (n, e) is: among the groups of 16, and in its group.
  struct Place {
    __device__ Place() {
      const Lane lane = Lane::anew();
      first = kOwnKeys ? lane.column() : lane.row();
    }
    static constexpr int group(int n) { return kOwnKeys ? n / 2 : 0; }
    __device__ int in_group(int n, int e) const {
      return first + (kOwnKeys ? n % 2 * 8 + e % 2 : e / 2 * 8);
    }

    int first;
  };
};

// Adds dS of a warp's queries to the gradient of the bias, [N, N].
template <int kTiles>
__device__ __forceinline__ void add_to_bias(float* dbias, const float (&ds)[kTiles][4], int query,
                                            int key, int length) {
  const Lane lane = Lane::anew();
#pragma unroll
  for (int n = 0; n < kTiles; ++n) {
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      const int i = query + lane.row() + e / 2 * 8, j = key + 8 * n + lane.column() + e % 2;
      if (i < length && j < length) dbias[i * length + j] += ds[n][e];
    }
  }
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
