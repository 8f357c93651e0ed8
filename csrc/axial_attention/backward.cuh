#pragma once

#include <cstdint>

#include "axial_attention/gradients.cuh"

namespace gcrl_kernels::axial_attention {

// The block's shared memory: Q, K, V and dO of each of its rows; then for every position of each
// row the query's numbers, and a float that says whether the key is left out.
template <typename T, int kFeatures, int kColumns>
struct BackwardMemory {
  __host__ __device__ BackwardMemory(const Division& division, int tiles)
      : padded(tiles * kColumns),
        tile_bytes(padded * Tile<T, kFeatures>::kRowBytes),
        numbers(division.rows * 4 * tile_bytes),
        blocked(numbers + division.rows * padded / kWarpPositions * sizeof(QueryNumbers)),
        bytes(static_cast<int>(blocked + division.rows * padded * sizeof(float))) {}

  int padded;
  unsigned tile_bytes;
  unsigned numbers, blocked;  // where they begin
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
    // What this warp computes, found anew for each row, so that it need not stay in registers.
    const Lane lane = Lane::anew();
    const int warp = static_cast<int>(ptx::thread_number()) / kWarp;
    const int of_block = a.division.row_of(warp), of_row = warp - of_block * a.division.warps;
    const int own = of_row * kWarpPositions;
    const uint32_t slot = blockIdx.x * a.division.rows + of_block;
    const unsigned start = of_block * 4 * memory.tile_bytes;
    const Side<T, kFeatures> queries = {Rows{start}, Rows{start + 3 * memory.tile_bytes}};
    const Side<T, kFeatures> keys = {Rows{start + memory.tile_bytes},
                                     Rows{start + 2 * memory.tile_bytes}};
    const unsigned blocked = memory.blocked + of_block * memory.padded * sizeof(float);
    QueryNumbers* numbers = shared_numbers(
        memory.numbers + of_block * memory.padded / kWarpPositions * sizeof(QueryNumbers));
    const uint32_t row = first + of_block;
    const bool works = slot < a.slots && row < a.rows.rows;
    const RowPlace place = a.rows.place(works ? row : 0);
    const int thread = own * 2 + lane.number, threads = a.division.warps * kWarp;
    fill_blocked(blocked, a.options, place, thread, threads, memory.padded);
    for (int i = thread; i < memory.padded; i += threads) {
      numbers[i / kWarpPositions].read(i % kWarpPositions, a, place, i);
      numbers[i / kWarpPositions].delta[i % kWarpPositions] = 0.0f;
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
        AsQueries::probabilities(p, mine, others, additions, own, tile * kColumns,
                                 numbers + of_row);
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
        if (lane.column() == 0) numbers[of_row].delta[lane.row() + 8 * half] = sum[half];
      }
      __syncwarp();
      float dq[Product::kSums][4] = {};
#pragma unroll 1
      for (int tile = 0; tile < seen; ++tile) {
        if (!kWhole) scores(tile);
        AsQueries::of_logits(dp, p, numbers + of_row);
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
                              numbers + tile * (kColumns / kWarpPositions));
        Product::accumulate(dv, p, others.second);
        if (!kWhole) __syncwarp();  // dP must not begin before: registers would not suffice
        if (kWhole) Product::store(dv, one, a.dv, a.dv.at(place), own, length, features);
        AsKeys::of_probabilities(dp, mine, others, additions);
        AsKeys::of_logits(dp, p, numbers + tile * (kColumns / kWarpPositions));
        Product::accumulate(dk, dp, others.first);
      }
      if (!kWhole) Product::store(dv, one, a.dv, a.dv.at(place), own, length, features);
      Product::store(dk, scale, a.dk, a.dk.at(place), own, length, features);
    }
    __syncthreads();
  }
}

}  // namespace gcrl_kernels::axial_attention
