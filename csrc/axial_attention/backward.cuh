#pragma once

#include <cstdint>

#include "axial_attention/gradients.cuh"

namespace gcrl_kernels::axial_attention {

// The block's shared memory: Q, K, V and dO of each of its rows; then of each row three floats for
// every position: whether the key is left out, lse and delta.
template <typename T, int kFeatures, int kColumns>
struct BackwardMemory {
  __host__ __device__ BackwardMemory(const Division& division, int tiles)
      : padded(tiles * kColumns),
        tile_bytes(padded * Tile<T, kFeatures>::kRowBytes),
        floats(division.rows * 4 * tile_bytes),
        bytes(floats + division.rows * 3 * padded * static_cast<int>(sizeof(float))) {}

  int padded;
  unsigned tile_bytes;
  unsigned floats;  // where they begin
  int bytes;
};

// Rows that lie whole in shared memory: each of q, k, v and dO is read once, `out` is not. A warp
// has 16 positions of a row: as queries it computes delta and dq, then as keys dk and dv from the
// transposed scores. With kWhole the scores of a row are one tile, held in registers between delta
// and dq; otherwise they are computed once more.
template <typename T, int kFeatures, int kColumns, bool kWhole, int kThreads, int kBlocks>
__global__ void __launch_bounds__(kThreads, kBlocks)
    axial_backward(const __grid_constant__ BackwardArguments<T> a) {
  using Rows = Tile<T, kFeatures>;
  using Product = Products<T, kFeatures>;
  using AsQueries = Gradients<T, kFeatures, false>;
  using AsKeys = Gradients<T, kFeatures, true>;
  constexpr int kTiles = kColumns / 8;
  const BackwardMemory<T, kFeatures, kColumns> memory(a.division, kWhole ? 1 : a.tiles);
  const int length = a.options.length, features = a.options.features;
  const int tiles = kWhole ? 1 : a.tiles;

  const Lane lane;
  const int warp = static_cast<int>(threadIdx.x) / kWarp;
  const int of_block = a.division.row_of(warp), of_row = warp - of_block * a.division.warps;
  const int own = of_row * kWarpPositions;
  const uint32_t slot = blockIdx.x * a.division.rows + of_block;
  // Of the warp's row.
  const unsigned start = of_block * 4 * memory.tile_bytes;
  const Side<T, kFeatures> queries = {Rows{start}, Rows{start + 3 * memory.tile_bytes}};
  const Side<T, kFeatures> keys = {Rows{start + memory.tile_bytes},
                                   Rows{start + 2 * memory.tile_bytes}};
  const unsigned blocked = memory.floats + of_block * 3 * memory.padded * sizeof(float);
  float* lse = shared_floats(blocked) + memory.padded;
  float* delta = lse + memory.padded;

#pragma unroll 1
  for (uint32_t first = blockIdx.x * a.division.rows; first < a.rows.rows; first += a.slots) {
    {
      const Loader<T, kFeatures> loader(a.division, features);
      const uint32_t row = first + loader.row();
      const bool loads = row < a.rows.rows;
      const RowPlace place = a.rows.place(loads ? row : 0);
      const auto load = [&](const StridedRows<T>& tensor, int number, const auto& taken) {
        const Rows to{(loader.row() * 4 + number) * memory.tile_bytes};
        loader.load(to, tensor, tensor.at(place), loads, 0, memory.padded, length, taken);
      };
      load(a.q, 0, Everything());
      load(a.k, 1, a.options.keys(place));
      load(a.v, 2, a.options.keys(place));
      load(a.grad, 3, Everything());
      ptx::commit_copies();
    }
    const uint32_t row = first + of_block;
    const bool works = slot < a.slots && row < a.rows.rows;
    const RowPlace place = a.rows.place(works ? row : 0);
    const int thread = own * 2 + lane.number, threads = a.division.warps * kWarp;
    fill_blocked(blocked, a.options, place, thread, threads, memory.padded);
    const float* row_lse = a.lse.at(place);
    for (int i = thread; i < memory.padded; i += threads) {
      lse[i] = base_2(row_lse, a.lse.along, i, length);
      delta[i] = 0.0f;
    }
    ptx::wait_for_copies<0>();
    __syncthreads();

    const Additions additions(a.options, place, blocked, length == memory.padded);
    const float scale[2] = {a.options.scale, a.options.scale}, one[2] = {1.0f, 1.0f};
    if (works) {
      const Side<T, kFeatures> mine = queries.from(own);
      const int last = own + kWarpPositions - 1;
      const int seen = !kWhole && a.options.causal ? min(tiles, last / kColumns + 1) : tiles;
      float p[kTiles][4], dp[kTiles][4];
      const auto scores = [&](int tile) {
        const Side<T, kFeatures> others = keys.from(tile * kColumns);
        zero(p);
        zero(dp);
        AsQueries::probabilities(p, mine, others, additions, own, tile * kColumns, lse + own);
        AsQueries::of_probabilities(dp, mine, others, additions);
      };
      float sum[2] = {};
#pragma unroll 1
      for (int tile = 0; tile < seen; ++tile) {
        scores(tile);
#pragma unroll
        for (int n = 0; n < kTiles; ++n) {
#pragma unroll
          for (int e = 0; e < 4; ++e) sum[e / 2] = fmaf(p[n][e], dp[n][e], sum[e / 2]);
        }
      }
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        sum[half] = sum_over_row(sum[half]);
        if (lane.column() == 0) delta[own + lane.row() + 8 * half] = sum[half];
      }
      __syncwarp();
      float dq[Product::kSums][4] = {};
#pragma unroll 1
      for (int tile = 0; tile < seen; ++tile) {
        if (!kWhole) scores(tile);
        AsQueries::of_logits(dp, p, delta + own);
        if (a.dbias != nullptr) {
          add_to_bias(a.dbias + int64_t{slot} * length * length, dp, own, tile * kColumns, length);
        }
        Product::accumulate(dq, dp, keys.first.from(tile * kColumns));
      }
      Product::store(dq, scale, a.dq, a.dq.at(place), own, length, features);
    }
    __syncthreads();
    if (works) {
      const Side<T, kFeatures> mine = keys.from(own);
      const int unseen = !kWhole && a.options.causal ? own / kColumns : 0;
      float dv[Product::kSums][4] = {}, dk[Product::kSums][4] = {};
#pragma unroll 1
      for (int tile = unseen; tile < tiles; ++tile) {
        const Side<T, kFeatures> others = queries.from(tile * kColumns);
        float p[kTiles][4] = {}, dp[kTiles][4] = {};
        AsKeys::probabilities(p, mine, others, additions, own, tile * kColumns,
                              lse + tile * kColumns);
        Product::accumulate(dv, p, others.second);
        if (!kWhole) __syncwarp();  // dP must not begin before: registers would not suffice
        if (kWhole) Product::store(dv, one, a.dv, a.dv.at(place), own, length, features);
        AsKeys::of_probabilities(dp, mine, others, additions);
        AsKeys::of_logits(dp, p, delta + tile * kColumns);
        Product::accumulate(dk, dp, others.first);
      }
      if (!kWhole) Product::store(dv, one, a.dv, a.dv.at(place), own, length, features);
      Product::store(dk, scale, a.dk, a.dk.at(place), own, length, features);
    }
    __syncthreads();
  }
}

}  // namespace gcrl_kernels::axial_attention
