#pragma once

#include <cmath>
#include <cstdint>

#include "axial_attention/logits.cuh"
#include "axial_attention/tiles.cuh"
#include "common/products.cuh"

namespace gcrl_kernels::axial_attention {

template <typename T>
struct ForwardArguments {
  RowNumbers rows;
  Options options;
  Division division;
  int query_tiles;  // blocks for each row; more than one only where a block has one row
  int key_tiles;
  StridedRows<T> q, k, v, out;
  StridedRows<float> lse;
  int64_t residuals;  // how far they lie behind each lse
};

// The block's shared memory: the queries, one or two buffers of keys and values, and for each row
// which keys are left out.
template <typename T, int kFeatures, int kColumns>
struct ForwardMemory {
  static constexpr int kRowBytes = Tile<T, kFeatures>::kRowBytes;

  __host__ __device__ ForwardMemory(const Division& division, int key_tiles)
      : queries(division.warps * kWarpPositions),
        row_bytes((queries + (key_tiles > 1 ? 4 : 2) * kColumns) * kRowBytes),
        blocked(division.rows * row_bytes),
        padded(key_tiles * kColumns),
        bytes(blocked + division.rows * padded * static_cast<int>(sizeof(float))) {}

  int queries;         // of a row
  unsigned row_bytes;  // of a row's tiles
  unsigned blocked;    // where the floats begin
  int padded;
  int bytes;
};

// A warp has 16 queries of a row, and goes over the row's keys in tiles of kColumns; with kWhole a
// row is one tile.
template <typename T, int kFeatures, int kColumns, bool kWhole, int kThreads, int kBlocks>
__global__ void __launch_bounds__(kThreads, kBlocks)
    axial_forward(const __grid_constant__ ForwardArguments<T> a) {
  using Product = Products<T, kFeatures>;
  using Rows = Tile<T, kFeatures>;
  constexpr int kTiles = kColumns / 8;
  const ForwardMemory<T, kFeatures, kColumns> memory(a.division, kWhole ? 1 : a.key_tiles);
  const int length = a.options.length, features = a.options.features;
  const uint32_t group = kWhole ? blockIdx.x : blockIdx.x / a.query_tiles;
  const int first_query =
      kWhole ? 0 : static_cast<int>(blockIdx.x - group * a.query_tiles) * memory.queries;
  const uint32_t first_row = group * a.division.rows;

  // What this thread loads.
  const Loader<T, kFeatures> loader(a.division, features);
  const bool loads = first_row + loader.row() < a.rows.rows;
  const RowPlace loaded = a.rows.place(loads ? first_row + loader.row() : 0);
  const T *k_row = a.k.at(loaded), *v_row = a.v.at(loaded);
  const unsigned loaded_start = loader.row() * memory.row_bytes;
  const auto buffer = [&](unsigned row_start, int tile) {
    const int place = memory.queries + tile % 2 * 2 * kColumns;
    return Rows{row_start + place * Rows::kRowBytes};
  };
  // What a key that is left out holds must not matter, were it NaN: 0 * NaN is NaN.
  const KeyMask taken = a.options.keys(loaded);
  const auto load_keys = [&](int tile) {
    const Rows keys = buffer(loaded_start, tile);
    const int begin = tile * kColumns;
    loader.load(keys, a.k, k_row, loads, begin, kColumns, length, taken);
    loader.load(keys.from(kColumns), a.v, v_row, loads, begin, kColumns, length, taken);
    ptx::commit_copies();
  };
  loader.load(Rows{loaded_start}, a.q, a.q.at(loaded), loads, first_query, memory.queries, length);
  load_keys(0);

  // What this warp computes.
  const Lane lane;
  const int warp = static_cast<int>(threadIdx.x) / kWarp;
  const int of_block = a.division.row_of(warp), of_row = warp - of_block * a.division.warps;
  const int query = first_query + of_row * kWarpPositions;
  const uint32_t row = first_row + of_block;
  const RowPlace place = a.rows.place(row < a.rows.rows ? row : 0);
  const bool works = row < a.rows.rows && query < length;
  const unsigned start = of_block * memory.row_bytes;
  const Rows queries = Rows{start}.from(of_row * kWarpPositions);
  const unsigned blocked = memory.blocked + of_block * memory.padded * sizeof(float);
  fill_blocked(blocked, a.options, place, of_row * kWarp + lane.number, a.division.warps * kWarp,
               memory.padded);
  const Additions additions(a.options, place, blocked, length == memory.padded);

  float sums[Product::kSums][4] = {};
  float maximum[2] = {-INFINITY, -INFINITY}, total[2] = {};
  int tiles = kWhole ? 1 : a.key_tiles;
  if (!kWhole && a.options.causal) {
    const int last = min(first_query + memory.queries, length) - 1;
    tiles = min(tiles, last / kColumns + 1);
  }
#pragma unroll 1
  for (int tile = 0; tile < tiles; ++tile) {
    if (tile + 1 < tiles) {
      load_keys(tile + 1);
      ptx::wait_for_copies<1>();
    } else {
      ptx::wait_for_copies<0>();
    }
    __syncthreads();
    const bool seen = kWhole || !a.options.causal || tile * kColumns < query + kWarpPositions;
    if (works && seen) {
      const Rows keys = buffer(start, tile);
      float s[kTiles][4] = {};
      Product::scores(s, queries, keys, features);
      to_logits<false>(s, additions, query, tile * kColumns);
      float shrink[2];
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float largest = maximum[half];
#pragma unroll
        for (int n = 0; n < kTiles; ++n) {
          largest = fmaxf(largest, fmaxf(s[n][2 * half], s[n][2 * half + 1]));
        }
        largest = maximum_over_row(largest);
        const float base = largest == -INFINITY ? 0.0f : largest;
        shrink[half] = exp_of_difference(maximum[half], base);
        maximum[half] = largest;
        float sum = 0.0f;
#pragma unroll
        for (int n = 0; n < kTiles; ++n) {
#pragma unroll
          for (int e = 2 * half; e < 2 * half + 2; ++e) {
            s[n][e] = exp_of_difference(s[n][e], base);
            sum += s[n][e];
          }
        }
        total[half] = fmaf(total[half], shrink[half], sum);
      }
      if (tile > 0) {
#pragma unroll
        for (int n = 0; n < Product::kSums; ++n) {
#pragma unroll
          for (int e = 0; e < 4; ++e) sums[n][e] *= shrink[Product::row_half(n, e)];
        }
      }
      Product::accumulate(sums, s, keys.from(kColumns));
    }
    if (tile + 1 < tiles) __syncthreads();  // the next tile but one comes into this buffer
  }
  if (!works) return;

  float factor[2];
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    total[half] = sum_over_row(total[half]);
    factor[half] = total[half] == 0.0f ? 0.0f : 1.0f / total[half];
    const int position = query + lane.row() + 8 * half;
    if (lane.column() == 0 && position < length) {
      const LogSumExp lse(maximum[half], logf(total[half]));
      float* to = a.lse.at(place) + position * a.lse.along;
      to[0] = lse.value;
      to[a.residuals] = lse.residual;
    }
  }
  Product::store(sums, factor, a.out, a.out.at(place), query, length, features);
}

}  // namespace gcrl_kernels::axial_attention
