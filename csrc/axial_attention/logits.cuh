#pragma once

#include <cmath>
#include <cstdint>

#include "axial_attention/tiles.cuh"
#include "common/ptx.cuh"
#include "common/softmax.cuh"

namespace gcrl_kernels::axial_attention {

// What all rows of a call have in common.
struct Options {
  __device__ KeyMask keys(const RowPlace& place) const {
    return {mask.data == nullptr ? nullptr : mask.at(place), mask.along};
  }

  const float* bias;                // [heads, N, N], or null
  StridedRows<const uint8_t> mask;  // no data: every key may be attended to
  int length, features;
  float scale;
  bool causal;
};

// The additions to the scores of one row.
struct Additions {
  const float* bias;  // [N, N], or null
  unsigned blocked;   // in shared memory, float [keys]: minus infinity for a key that is left out
  int length, features;
  float scale;
  bool causal;
  bool leaves_out;  // there may be keys that a query must not attend to

  // `whole` says that the tiles have no positions beyond the row's length.
  __device__ Additions(const Options& options, const RowPlace& place, unsigned blocked_keys,
                       bool whole)
      : blocked(blocked_keys),
        length(options.length),
        features(options.features),
        scale(options.scale),
        causal(options.causal),
        leaves_out(!whole || options.causal || options.mask.data != nullptr) {
    const int64_t size = int64_t{length} * length;
    bias = options.bias == nullptr ? nullptr : options.bias + place.head() * size;
  }
};

__device__ __forceinline__ float* shared_floats(unsigned start) {
  return reinterpret_cast<float*>(ptx::shared_memory() + start);
}

// Scores to logits, in their place: scale, bias, mask and causality. They are rounded in the same
// way each time. The tile begins at `row` and `column`; its rows are queries and its columns keys,
// or with kTransposed the reverse.
template <bool kTransposed, int kTiles>
__device__ __forceinline__ void to_logits(float (&s)[kTiles][4], const Additions& additions,
                                          int row, int column) {
  const Lane lane = Lane::anew();
  row += lane.row();
  column += lane.column();
#pragma unroll
  for (int n = 0; n < kTiles; ++n) {
#pragma unroll
    for (int e = 0; e < 4; ++e) s[n][e] = ptx::multiply(s[n][e], additions.scale);
  }
  if (additions.bias != nullptr) {
#pragma unroll
    for (int n = 0; n < kTiles; ++n) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const int r = row + e / 2 * 8, c = column + 8 * n + e % 2;
        if (r < additions.length && c < additions.length) {
          const int at = kTransposed ? c * additions.length + r : r * additions.length + c;
          s[n][e] += additions.bias[at];
        }
      }
    }
  }
  if (!additions.leaves_out) return;
  const float* blocked = shared_floats(additions.blocked);
#pragma unroll
  for (int n = 0; n < kTiles; ++n) {
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      const int r = row + e / 2 * 8, c = column + 8 * n + e % 2;
      const int key = kTransposed ? r : c, query = kTransposed ? c : r;
      const bool future = additions.causal && key > query;
      if (blocked[key] < 0.0f || future) s[n][e] = -INFINITY;
    }
  }
}

// Fills the shared numbers that say which keys of a row are left out: those of the mask, and those
// from the row's length up to `padded`. The threads of the row's warps share the work.
__device__ __forceinline__ void fill_blocked(unsigned blocked, const Options& options,
                                             const RowPlace& place, int thread, int threads,
                                             int padded) {
  const KeyMask keys = options.keys(place);
  for (int key = thread; key < padded; key += threads) {
    const bool allowed = key < options.length && keys(key);
    shared_floats(blocked)[key] = allowed ? 0.0f : -INFINITY;
  }
}

}  // namespace gcrl_kernels::axial_attention
