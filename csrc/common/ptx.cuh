#pragma once

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <cstdint>

// The instructions that CUDA C++ has no name for, as the PTX manual defines them. A place in shared
// memory is an offset in bytes from the start of the block's dynamic shared memory.
namespace gcrl_kernels::ptx {

// Tiles that are addressed by exclusive-or start at multiples of their rows.
inline constexpr int kSharedAlignment = 1024;

static __device__ __forceinline__ unsigned char* shared_memory() {
  extern __shared__ __align__(kSharedAlignment) unsigned char memory[];
  return memory;
}

static __device__ __forceinline__ uint32_t shared_address(unsigned offset) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(shared_memory())) + offset;
}

// threadIdx.x, read anew at each call, so that what follows from it need not stay in registers.
static __device__ __forceinline__ unsigned thread_number() {
  unsigned number;
  asm volatile("mov.u32 %0, %%tid.x;" : "=r"(number));
  return number;
}

// ldmatrix: four 8x8 matrices of 16-bit numbers. Lane l gives the place of row l % 8 of matrix
// l / 8, 16 bytes, and receives of each matrix the numbers 2 (l % 4) and 2 (l % 4) + 1 of row l
// / 4.
static __device__ __forceinline__ void load_matrices(uint32_t (&matrices)[4], unsigned row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(matrices[0]), "=r"(matrices[1]), "=r"(matrices[2]), "=r"(matrices[3])
               : "r"(shared_address(row)));
}

// The same of the transposed matrices.
static __device__ __forceinline__ void load_matrices_transposed(uint32_t (&matrices)[4],
                                                                unsigned row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(matrices[0]), "=r"(matrices[1]), "=r"(matrices[2]), "=r"(matrices[3])
               : "r"(shared_address(row)));
}

// mma.m16n8k16: c [16, 8] += a [16, 16] b [16, 8], summed in float32. With g = lane / 4 and
// t = lane % 4 a lane holds c at (g, 2t), (g, 2t+1), (g+8, 2t), (g+8, 2t+1); two numbers to a
// register, a at (g, 2t), (g+8, 2t), (g, 2t+8), (g+8, 2t+8) and the next column; b at (2t, g),
// (2t+8, g) and the next row.
template <typename T>
__device__ void multiply_add(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1);

template <>
__device__ __forceinline__ void multiply_add<torch::headeronly::BFloat16>(float (&c)[4],
                                                                          const uint32_t (&a)[4],
                                                                          uint32_t b0,
                                                                          uint32_t b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

template <>
__device__ __forceinline__ void multiply_add<torch::headeronly::Half>(float (&c)[4],
                                                                      const uint32_t (&a)[4],
                                                                      uint32_t b0, uint32_t b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// Two numbers rounded to nearest even, the first in the lower half.
template <typename T>
__device__ uint32_t pack(float low, float high);

template <>
__device__ __forceinline__ uint32_t pack<torch::headeronly::BFloat16>(float low, float high) {
  uint32_t packed;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
  return packed;
}

template <>
__device__ __forceinline__ uint32_t pack<torch::headeronly::Half>(float low, float high) {
  uint32_t packed;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
  return packed;
}

// The rounded product, which is never made one with a sum that it is part of.
static __device__ __forceinline__ float multiply(float a, float b) { return __fmul_rn(a, b); }

// 2^x to about two units in the last place; minus infinity gives 0.
static __device__ __forceinline__ float exp2(float x) {
  float power;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(power) : "f"(x));
  return power;
}

// cp.async: 16 bytes of device memory, past the registers and the L1 cache; zeros instead where
// they lie outside. There once the thread has waited for the copy's group.
static __device__ __forceinline__ void copy_async(unsigned to, const void* from, bool inside) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(to)),
               "l"(__cvta_generic_to_global(from)), "r"(inside ? 16 : 0)
               : "memory");
}

// Makes a group of the copies since the last one.
static __device__ __forceinline__ void commit_copies() {
  asm volatile("cp.async.commit_group;" ::: "memory");
}

// Waits until no more than the `kGroups` youngest groups are under way.
template <int kGroups>
__device__ __forceinline__ void wait_for_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kGroups) : "memory");
}

}  // namespace gcrl_kernels::ptx
