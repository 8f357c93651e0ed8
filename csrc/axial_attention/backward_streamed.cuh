#pragma once

#include <cstdint>

#include "axial_attention/gradients.cuh"

namespace gcrl_kernels::axial_attention {

// The block's shared memory: two tiles of its own positions, two of the others that pass by, the
// numbers of the queries at hand, and a float for each of all keys that says if it is left out.
template <typename T, int kFeatures, int kColumns>
struct StreamedMemory {
  static constexpr int kRowBytes = Tile<T, kFeatures>::kRowBytes;

  __host__ __device__ StreamedMemory(const Division& division, int length)
      : own(division.warps * kWarpPositions),
        own_tiles((length + own - 1) / own),
        others(2 * own * kRowBytes),
        numbers(others + 2 * kColumns * kRowBytes),
        blocked(numbers + queries() / kWarpPositions * sizeof(QueryNumbers)),
        bytes(static_cast<int>(blocked + own_tiles * own * sizeof(float))) {}

  __host__ __device__ int queries() const { return own > kColumns ? own : kColumns; }

  int own, own_tiles;
  unsigned others, numbers, blocked;  // where they begin
  int bytes;
};

// Rows that are too long for the chip: a block owns some positions of a row, as queries or as keys,
// and the others pass by in tiles of kColumns. delta is the sum over the features of out dO.
template <typename T, int kFeatures, int kColumns>
class StreamedBlock {
  using Rows = Tile<T, kFeatures>;
  using Positions = Side<T, kFeatures>;
  using Product = Products<T, kFeatures>;
  static constexpr int kTiles = kColumns / 8;

 public:
  __device__ explicit StreamedBlock(const BackwardArguments<T>& arguments)
      : a(arguments),
        memory(arguments.division, arguments.options.length),
        loader(arguments.division, arguments.options.features),
        length(arguments.options.length),
        features(arguments.options.features) {
    const Positions own_tiles = {Rows{0}, Rows{memory.others / 2}};
    own = own_tiles;
    others = {Rows{memory.others}, Rows{(memory.others + memory.numbers) / 2}};
    warp = static_cast<int>(threadIdx.x) / kWarp * kWarpPositions;
    blocked = memory.blocked;
    numbers = shared_numbers(memory.numbers);
  }

  __device__ void own_queries(uint32_t row, int begin, uint32_t slot) {
    const RowPlace place = enter(row);
    load(own, place, a.q, a.grad, begin, memory.own, Everything());
    fill_numbers(place, own.second, begin, memory.own);
    const int end = a.options.causal ? min(length, begin + memory.own) : length;
    const Additions additions(a.options, place, blocked, length % memory.own == 0);
    float dq[Product::kSums][4] = {};
#pragma unroll 1
    for (int key = 0; key < end; key += kColumns) {
      load(others, place, a.k, a.v, key, kColumns, a.options.keys(place));
      using AsQueries = Gradients<T, kFeatures, false>;
      const Positions mine = own.from(warp);
      float p[kTiles][4] = {}, dp[kTiles][4] = {};
      AsQueries::probabilities(p, mine, others, additions, begin + warp, key,
                               numbers + warp / kWarpPositions);
      AsQueries::of_probabilities(dp, mine, others, additions);
      AsQueries::of_logits(dp, p, numbers + warp / kWarpPositions);
      if (a.dbias != nullptr) {
        add_to_bias(a.dbias + int64_t{slot} * length * length, dp, begin + warp, key, length);
      }
      Product::accumulate(dq, dp, others.first);
      __syncthreads();
    }
    const float scale[2] = {a.options.scale, a.options.scale};
    Product::store(dq, scale, a.dq, a.dq.at(place), begin + warp, length, features);
  }

  __device__ void own_keys(uint32_t row, int begin) {
    const RowPlace place = enter(row);
    load(own, place, a.k, a.v, begin, memory.own, a.options.keys(place));
    const Additions additions(a.options, place, blocked, length % memory.own == 0);
    float dk[Product::kSums][4] = {}, dv[Product::kSums][4] = {};
#pragma unroll 1
    for (int query = a.options.causal ? begin / kColumns * kColumns : 0; query < length;
         query += kColumns) {
      load(others, place, a.q, a.grad, query, kColumns, Everything());
      fill_numbers(place, others.second, query, kColumns);
      using AsKeys = Gradients<T, kFeatures, true>;
      const Positions mine = own.from(warp);
      float p[kTiles][4] = {}, dp[kTiles][4] = {};
      AsKeys::probabilities(p, mine, others, additions, begin + warp, query, numbers);
      Product::accumulate(dv, p, others.second);
      AsKeys::of_probabilities(dp, mine, others, additions);
      AsKeys::of_logits(dp, p, numbers);
      Product::accumulate(dk, dp, others.first);
      __syncthreads();
    }
    const float scale[2] = {a.options.scale, a.options.scale}, one[2] = {1.0f, 1.0f};
    Product::store(dk, scale, a.dk, a.dk.at(place), begin + warp, length, features);
    Product::store(dv, one, a.dv, a.dv.at(place), begin + warp, length, features);
  }

 private:
  // Finds a row, and which of its keys are left out.
  __device__ RowPlace enter(uint32_t row) {
    const RowPlace place = a.rows.place(row);
    fill_blocked(blocked, a.options, place, static_cast<int>(threadIdx.x),
                 static_cast<int>(blockDim.x), memory.own_tiles * memory.own);
    return place;
  }

  template <typename Taken>
  __device__ void load(const Positions& to, const RowPlace& place, const StridedRows<T>& first,
                       const StridedRows<T>& second, int begin, int count, const Taken& taken) {
    loader.load(to.first, first, first.at(place), true, begin, count, length, taken);
    loader.load(to.second, second, second.at(place), true, begin, count, length, taken);
    ptx::commit_copies();
    ptx::wait_for_copies<0>();
    __syncthreads();
  }

  // The numbers of `count` queries, of which `grad` has dO: two threads to a query.
  __device__ void fill_numbers(const RowPlace& place, Rows grad, int begin, int count) {
    const int thread = static_cast<int>(threadIdx.x), half = thread % 2;
    const T* row_out = a.out.at(place);
    for (int i = thread / 2; i < count; i += static_cast<int>(blockDim.x) / 2) {
      const int query = begin + i;
      float sum = 0.0f;
      if (query < length) {
        const T* out = row_out + query * a.out.along;
        for (int chunk = half; chunk * kChunk<T> < features; chunk += 2) {
          const T* other = reinterpret_cast<const T*>(ptx::shared_memory() + grad.chunk(i, chunk));
#pragma unroll
          for (int f = 0; f < kChunk<T>; ++f) {
            sum = fmaf(static_cast<float>(out[chunk * kChunk<T> + f]), static_cast<float>(other[f]),
                       sum);
          }
        }
      }
      sum += __shfl_xor_sync(kWholeWarp, sum, 1);
      if (half == 0) {
        QueryNumbers& group = numbers[i / kWarpPositions];
        group.read(i % kWarpPositions, a, place, query);
        group.delta[i % kWarpPositions] = sum;
      }
    }
    __syncthreads();
  }

  const BackwardArguments<T>& a;
  const StreamedMemory<T, kFeatures, kColumns> memory;
  const Loader<T, kFeatures> loader;
  const int length, features;
  Positions own, others;
  int warp;
  unsigned blocked;
  QueryNumbers* numbers;
};

// The blocks that own queries come first: one for each slot and tile of positions, which goes over
// the slot's rows; then those that own keys, one for each row and tile.
template <typename T, int kFeatures, int kColumns, int kThreads, int kBlocks>
__global__ void __launch_bounds__(kThreads, kBlocks)
    axial_backward_streamed(const __grid_constant__ BackwardArguments<T> a) {
  const StreamedMemory<T, kFeatures, kColumns> memory(a.division, a.options.length);
  StreamedBlock<T, kFeatures, kColumns> block(a);
  const uint32_t number = blockIdx.x / memory.own_tiles;
  const int begin = static_cast<int>(blockIdx.x % memory.own_tiles) * memory.own;
  if (number >= a.slots) {
    block.own_keys(number - a.slots, begin);
    return;
  }
#pragma unroll 1
  for (uint32_t row = number; row < a.rows.rows; row += a.slots) {
    block.own_queries(row, begin, number);
  }
}

}  // namespace gcrl_kernels::axial_attention
