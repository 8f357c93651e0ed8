// Runs CUDA kernels on the CPU, one block after another, its threads as threads: enough of the
// language for kernels of plain arithmetic, shared memory and barriers.

#pragma once

#include <algorithm>
#include <atomic>
#include <barrier>
#include <cstdint>
#include <thread>
#include <vector>

#define __global__
#define __device__
#define __shared__ static
#define __launch_bounds__(threads)

struct Index {
  unsigned x;
};
inline thread_local Index threadIdx, blockIdx;

namespace emulator {

inline std::barrier<>* threads_of_block;
inline std::atomic<bool> all_agree;

template <typename... Parameters, typename... Arguments>
void launch(void (*kernel)(Parameters...), unsigned blocks, unsigned threads,
            Arguments... arguments) {
  for (unsigned block = 0; block < blocks; ++block) {
    std::barrier<> barrier(threads);
    threads_of_block = &barrier;
    std::vector<std::thread> running;
    for (unsigned thread = 0; thread < threads; ++thread) {
      running.emplace_back([=] {
        threadIdx.x = thread;
        blockIdx.x = block;
        kernel(arguments...);
      });
    }
    for (std::thread& thread : running) thread.join();
  }
}

}  // namespace emulator

inline void __syncthreads() { emulator::threads_of_block->arrive_and_wait(); }

inline int __syncthreads_and(int agrees) {
  __syncthreads();
  emulator::all_agree = true;
  __syncthreads();
  if (!agrees) emulator::all_agree = false;
  __syncthreads();
  return emulator::all_agree;
}

using std::min;
