// faults NAME: runs a kernel with a fault. Prints "wrong" if its results show it; the emulator
// throws where it notices a fault itself.

#include <cstdio>
#include <stdexcept>
#include <string>

#include "common/ptx.cuh"
#include "cuda.h"

namespace ptx = gcrl_kernels::ptx;

constexpr int kThreads = 64;
alignas(16) float numbers[4 * kThreads];

float* shared() { return reinterpret_cast<float*>(ptx::shared_memory()); }

// Each thread gives a number to the one in the other warp.
void give(float* to, bool wait) {
  shared()[threadIdx.x] = static_cast<float>(threadIdx.x);
  if (wait) __syncthreads();
  to[threadIdx.x] = shared()[threadIdx.x ^ 32];
}

// Each thread gives a number to its neighbour.
void give_in_warp(float* to, bool wait) {
  shared()[threadIdx.x] = static_cast<float>(threadIdx.x);
  if (wait) __syncwarp();
  to[threadIdx.x] = shared()[threadIdx.x ^ 1];
}

// Each thread copies four numbers and reads them, in the second of two groups.
void copy(float* to, bool wait) {
  const unsigned own = 16 * threadIdx.x;
  ptx::copy_async(own + 16 * kThreads, numbers + 4 * threadIdx.x, false);
  ptx::commit_copies();
  ptx::copy_async(own, numbers + 4 * threadIdx.x, true);
  ptx::commit_copies();
  if (wait) {
    ptx::wait_for_copies<0>();
  } else {
    ptx::wait_for_copies<1>();
  }
  to[threadIdx.x] = shared()[4 * threadIdx.x];
}

// Each thread copies over what its neighbour reads.
void copy_over(float* to, bool wait) {
  shared()[4 * threadIdx.x] = numbers[4 * threadIdx.x];
  __syncthreads();
  to[threadIdx.x] = shared()[4 * (threadIdx.x ^ 32)];
  if (wait) __syncthreads();
  ptx::copy_async(16 * threadIdx.x, numbers, false);
  ptx::commit_copies();
  ptx::wait_for_copies<0>();
}

void shuffle_in_a_branch(float* to, bool wait) {
  float value = 1.0f;
  if (wait || threadIdx.x % 2 == 0) value = __shfl_xor_sync(~0u, value, 2);
  to[threadIdx.x] = value;
}

void meet_apart(float*, bool wait) {
  if (wait || threadIdx.x % 2 == 0) {
    __syncwarp();
  } else {
    __shfl_xor_sync(~0u, 0.0f, 1);
  }
}

void load_outside(float*, bool wait) {
  uint32_t matrices[4];
  ptx::load_matrices(matrices, wait ? 0 : 32 * kThreads);
}

void load_misaligned(float*, bool wait) {
  uint32_t matrices[4];
  ptx::load_matrices_transposed(matrices, wait ? 0 : 8);
}

void copy_misaligned(float*, bool wait) {
  ptx::copy_async(16 * threadIdx.x, numbers + (wait ? 4 : 1), true);
  ptx::wait_for_copies<0>();
}

void nothing(float*, bool) {}

struct Case {
  const char* name;
  void (*kernel)(float*, bool);
  // How the fault is launched.
  dim3 grid{1}, block{kThreads};
  size_t shared = 32 * kThreads;
};
const Case kCases[] = {
    {"give", give},
    {"give_in_warp", give_in_warp},
    {"copy", copy},
    {"copy_over", copy_over},
    {"shuffle_in_a_branch", shuffle_in_a_branch},
    {"meet_apart", meet_apart},
    {"load_outside", load_outside},
    {"load_misaligned", load_misaligned},
    {"copy_misaligned", copy_misaligned},
    {"no_blocks", nothing, dim3(0)},
    {"many_blocks", nothing, dim3(1u << 31)},
    {"blocks_in_two_dimensions", nothing, dim3(1, 2)},
    {"no_threads", nothing, dim3(1), dim3(0)},
    {"many_threads", nothing, dim3(1), dim3(1025)},
    {"much_shared_memory", nothing, dim3(1), dim3(kThreads), emulator::most_shared + 1}};

// What a kernel gives, or what the emulator says of it.
std::string run(const Case& one, bool faulty) {
  for (int i = 0; i < 4 * kThreads; ++i) numbers[i] = static_cast<float>(i);
  float results[kThreads] = {};
  const Case launched = faulty ? one : Case{one.name, one.kernel};
  try {
    emulator::launch(launched.kernel, launched.grid, launched.block, launched.shared, &results[0],
                     !faulty);
  } catch (const std::runtime_error& error) {
    return error.what();
  }
  std::string text;
  for (const float result : results) text += std::to_string(result) + " ";
  return text;
}

int main(int, char** arguments) {
  for (const Case& one : kCases) {
    if (one.name != std::string(arguments[1])) continue;
    const std::string right = run(one, false), faulty = run(one, true);
    if (right.find("emulator") != std::string::npos) return 1;
    std::puts(faulty.find("emulator") != std::string::npos ? faulty.c_str()
              : faulty == right                            ? "right"
                                                           : "wrong");
    return 0;
  }
  return 2;
}
