// Runs CUDA kernels on the CPU, one block after another: as much of the language as they use.

#pragma once

#include <algorithm>
#include <cstdint>

#include "fibers.h"

#define __global__
#define __device__
#define __host__
#define __shared__ static
#define __forceinline__ inline
#define __grid_constant__
#define __launch_bounds__(...)

struct dim3 {
  dim3(unsigned x_, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
  unsigned x, y, z;
};

struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
inline uint4 make_uint4(uint32_t x, uint32_t y, uint32_t z, uint32_t w) { return {x, y, z, w}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

inline dim3 threadIdx{0}, blockIdx{0}, blockDim{1}, gridDim{1};

namespace emulator {

inline int multiprocessors = 1;
inline size_t most_shared = 227 << 10;  // bytes of dynamic shared memory of a block
inline constexpr unsigned kMostThreads = 1024, kMostBlocks = (1u << 31) - 1;

// Refuses what a GPU does not launch; the kernels' blocks have one dimension.
inline void check(const dim3& grid, const dim3& block, size_t shared_bytes) {
  const auto check_number = [](const char* of, size_t number, size_t least, size_t most) {
    if (least <= number && number <= most) return;
    throw std::runtime_error("CUDA emulator: expected " + std::to_string(least) + " to " +
                             std::to_string(most) + " " + of + ", got " + std::to_string(number));
  };
  check_number("blocks", grid.x, 1, kMostBlocks);
  check_number("threads", block.x, 1, kMostThreads);
  check_number("bytes of shared memory", shared_bytes, 0, most_shared);
  for (const unsigned other : {grid.y, grid.z, block.y, block.z}) {
    check_number("in the other dimensions", other, 1, 1);
  }
}

inline void Block::set_thread(int thread) { threadIdx.x = static_cast<unsigned>(thread); }

template <typename... Parameters, typename... Arguments>
void launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared_bytes,
            const Arguments&... arguments) {
  check(grid, block, shared_bytes);
  static Block runner;
  gridDim = grid;
  blockDim = block;
  for (unsigned b = 0; b < grid.x; ++b) {
    blockIdx.x = b;
    runner.run(static_cast<int>(block.x), shared_bytes, [&] { kernel(arguments...); });
  }
}

}  // namespace emulator

inline void __syncthreads() { emulator::Block::current().barrier("__syncthreads"); }

inline int __syncthreads_and(int agrees) {
  return emulator::Block::current().barrier("__syncthreads_and", agrees != 0);
}

inline void __syncwarp() {
  int nothing = 0;
  emulator::Block::current().warp("__syncwarp", nothing, [](int**, int) {});
}

namespace emulator {

template <typename T>
struct Shuffled {
  T value;
  int source;
};

template <typename T>
T shuffle(const char* what, T value, int source) {
  Shuffled<T> own = {value, source};
  Block::current().warp(what, own, [](Shuffled<T>** lanes, int count) {
    T values[kWarp];
    for (int l = 0; l < count; ++l) values[l] = lanes[l]->value;
    for (int l = 0; l < count; ++l) lanes[l]->value = values[lanes[l]->source];
  });
  return own.value;
}

}  // namespace emulator

template <typename T>
T __shfl_sync(unsigned, T value, int source) {
  return emulator::shuffle("__shfl_sync", value, source % emulator::kWarp);
}

template <typename T>
T __shfl_xor_sync(unsigned, T value, int distance) {
  return emulator::shuffle("__shfl_xor_sync", value, emulator::Block::current().lane() ^ distance);
}

inline uint32_t __umulhi(uint32_t a, uint32_t b) {
  return static_cast<uint32_t>(uint64_t{a} * b >> 32);
}

using std::max;
using std::min;
