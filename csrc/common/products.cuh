#pragma once

#include <cstdint>

#include "common/ptx.cuh"
#include "common/tiles.cuh"

namespace gcrl_kernels {

// The products of a warp's 16 rows. Scores [16, 8 kTiles] lie in registers as mma.m16n8k16 leaves
// them: s[n][e] is row `lane / 4 + 8 (e / 2)`, column `8n + 2 (lane % 4) + e % 2`. Sums [16,
// kFeatures] are laid out as each type likes it best; row_half says which of a lane's two rows a
// number belongs to, and feature where it is in its row.
template <typename T, int kFeatures>
struct Products {
  static constexpr int kRowBytes = Tile<T, kFeatures>::kRowBytes;
  static constexpr int kSums = kFeatures / 8;

  static constexpr int row_half(int /*n*/, int e) { return e / 2; }
  static __device__ int feature(int n, int e) { return 8 * n + Lane().column() + e % 2; }

  // scores += rows [16, kFeatures] columns [8 kTiles, kFeatures]ᵀ
  template <int kTiles>
  static __device__ __forceinline__ void scores(float (&s)[kTiles][4], Tile<T, kFeatures> rows,
                                                Tile<T, kFeatures> columns, int /*features*/) {
    const int lane = static_cast<int>(ptx::thread_number() % kWarp);
    const unsigned row = rows.chunk(lane % 16, lane / 16);
    const unsigned column = columns.chunk(lane % 8 + lane / 16 * 8, lane / 8 % 2);
#pragma unroll
    for (int k = 0; k < kFeatures / 16; ++k) {
      uint32_t a[4];
      ptx::load_matrices(a, row ^ (k * 2 * kChunkBytes));
      const unsigned column_k = column ^ (k * 2 * kChunkBytes);
#pragma unroll
      for (int n = 0; n < kTiles; n += 2) {
        uint32_t b[4];
        ptx::load_matrices(b, column_k + n * 8 * kRowBytes);
        ptx::multiply_add<T>(s[n], a, b[0], b[1]);
        ptx::multiply_add<T>(s[n + 1], a, b[2], b[3]);
      }
    }
  }

  // sums += weights [16, 8 kTiles] columns [8 kTiles, kFeatures]
  template <int kTiles>
  static __device__ __forceinline__ void accumulate(float (&sums)[kSums][4],
                                                    const float (&weights)[kTiles][4],
                                                    Tile<T, kFeatures> columns) {
    const int lane = static_cast<int>(ptx::thread_number() % kWarp);
    const unsigned column = columns.chunk(lane % 16, lane / 16);
#pragma unroll
    for (int k = 0; k < kTiles / 2; ++k) {
      const uint32_t a[4] = {ptx::pack<T>(weights[2 * k][0], weights[2 * k][1]),
                             ptx::pack<T>(weights[2 * k][2], weights[2 * k][3]),
                             ptx::pack<T>(weights[2 * k + 1][0], weights[2 * k + 1][1]),
                             ptx::pack<T>(weights[2 * k + 1][2], weights[2 * k + 1][3])};
#pragma unroll
      for (int n = 0; n < kSums; n += 2) {
        uint32_t b[4];
        ptx::load_matrices_transposed(b, (column ^ (n * kChunkBytes)) + k * 16 * kRowBytes);
        ptx::multiply_add<T>(sums[n], a, b[0], b[1]);
        ptx::multiply_add<T>(sums[n + 1], a, b[2], b[3]);
      }
    }
  }

  // Writes sums times `factor` of each row into positions from `begin` of a row in device memory.
  template <typename Rows>
  static __device__ __forceinline__ void store(const float (&sums)[kSums][4],
                                               const float (&factor)[2], const Rows& tensor, T* row,
                                               int begin, int length, int features) {
    const Lane lane;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int position = begin + lane.row() + 8 * half;
      T* to = row + position * tensor.along;
#pragma unroll
      for (int n = 0; n < kSums; n += 4) {
        uint32_t words[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          words[i] = ptx::pack<T>(sums[n + i][2 * half] * factor[half],
                                  sums[n + i][2 * half + 1] * factor[half]);
        }
        transpose_over_row(words, lane.number % 4);
        const int feature = (n + lane.number % 4) * kChunk<T>;
        if (position < length && feature < features) write(to + feature, words, tensor.wide);
      }
    }
  }

 private:
  // Word i of a row's lane j changes places with word j of lane i.
  static __device__ __forceinline__ void transpose_over_row(uint32_t (&words)[4], int lane) {
    exchange(words[0], words[1], lane & 1, 1);
    exchange(words[2], words[3], lane & 1, 1);
    exchange(words[0], words[2], lane & 2, 2);
    exchange(words[1], words[3], lane & 2, 2);
  }

  // The lower lane's `high` and the upper lane's `low` change places.
  static __device__ __forceinline__ void exchange(uint32_t& low, uint32_t& high, int upper,
                                                  int distance) {
    const uint32_t received = __shfl_xor_sync(kWholeWarp, upper ? low : high, distance);
    low = upper ? received : low;
    high = upper ? high : received;
  }

  static __device__ __forceinline__ void write(T* to, const uint32_t (&words)[4], bool wide) {
    if (wide) {
      *reinterpret_cast<uint4*>(to) = make_uint4(words[0], words[1], words[2], words[3]);
      return;
    }
    uint16_t* numbers = reinterpret_cast<uint16_t*>(to);
#pragma unroll
    for (int i = 0; i < kChunk<T>; ++i) {
      numbers[i] = static_cast<uint16_t>(words[i / 2] >> (i % 2 * 16));
    }
  }
};

// In float32 by plain multiplications and additions. Sums: sums[n][e] is row `lane / 4 + 8 (n %
// 2)`, feature `16 (n / 2) + 4 (lane % 4) + e`.
template <int kFeatures>
struct Products<float, kFeatures> {
  static constexpr int kSums = kFeatures / 8;

  static constexpr int row_half(int n, int /*e*/) { return n % 2; }
  static __device__ int feature(int n, int e) { return n / 2 * 16 + Lane().number % 4 * 4 + e; }

  template <int kTiles>
  static __device__ __forceinline__ void scores(float (&s)[kTiles][4], Tile<float, kFeatures> rows,
                                                Tile<float, kFeatures> columns, int features) {
    const Lane lane;
    const int chunks = features / kChunk<float>;
#pragma unroll 1
    for (int k = 0; k < chunks; ++k) {
      const float4 a[2] = {read(rows, lane.row(), k), read(rows, lane.row() + 8, k)};
#pragma unroll
      for (int n = 0; n < kTiles; ++n) {
        const float4 b[2] = {read(columns, 8 * n + lane.column(), k),
                             read(columns, 8 * n + lane.column() + 1, k)};
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          const float4 &x = a[e / 2], &y = b[e % 2];
          s[n][e] = fmaf(x.x, y.x, fmaf(x.y, y.y, fmaf(x.z, y.z, fmaf(x.w, y.w, s[n][e]))));
        }
      }
    }
  }

  template <int kTiles>
  static __device__ __forceinline__ void accumulate(float (&sums)[kSums][4],
                                                    const float (&weights)[kTiles][4],
                                                    Tile<float, kFeatures> columns) {
    const int lane = static_cast<int>(ptx::thread_number() % kWarp);
    // Two neighbouring columns of weights are in one lane of each row.
#pragma unroll 1
    for (int pair = 0; pair < 4; ++pair) {
      const int source = lane / 4 * 4 + pair;
#pragma unroll
      for (int n = 0; n < kTiles; ++n) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const float weight[2] = {__shfl_sync(kWholeWarp, weights[n][i], source),
                                   __shfl_sync(kWholeWarp, weights[n][2 + i], source)};
          const int position = 8 * n + 2 * pair + i;
#pragma unroll
          for (int j = 0; j < kSums; j += 2) {
            const float4 value = read(columns, position, 2 * j + lane % 4);
#pragma unroll
            for (int half = 0; half < 2; ++half) {
              float (&sum)[4] = sums[j + half];
              sum[0] = fmaf(weight[half], value.x, sum[0]);
              sum[1] = fmaf(weight[half], value.y, sum[1]);
              sum[2] = fmaf(weight[half], value.z, sum[2]);
              sum[3] = fmaf(weight[half], value.w, sum[3]);
            }
          }
        }
      }
    }
  }

  template <typename Rows>
  static __device__ __forceinline__ void store(const float (&sums)[kSums][4],
                                               const float (&factor)[2], const Rows& tensor,
                                               float* row, int begin, int length, int features) {
    const Lane lane;
#pragma unroll
    for (int n = 0; n < kSums; ++n) {
      const int position = begin + lane.row() + 8 * (n % 2);
      const int feature = n / 2 * 16 + lane.number % 4 * kChunk<float>;
      if (position >= length || feature >= features) continue;
      float* to = row + position * tensor.along + feature;
      const float4 value = make_float4(sums[n][0] * factor[n % 2], sums[n][1] * factor[n % 2],
                                       sums[n][2] * factor[n % 2], sums[n][3] * factor[n % 2]);
      if (tensor.wide) {
        *reinterpret_cast<float4*>(to) = value;
      } else {
        to[0] = value.x;
        to[1] = value.y;
        to[2] = value.z;
        to[3] = value.w;
      }
    }
  }

 private:
  static __device__ __forceinline__ float4 read(Tile<float, kFeatures> tile, int position,
                                                int chunk) {
    return *reinterpret_cast<const float4*>(ptx::shared_memory() + tile.chunk(position, chunk));
  }
};

}  // namespace gcrl_kernels
