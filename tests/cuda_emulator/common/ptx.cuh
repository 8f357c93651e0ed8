// The functions of csrc/common/ptx.cuh in C++, as the PTX manual defines the instructions.

#pragma once

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

#include "cuda.h"

namespace gcrl_kernels::ptx {

inline unsigned char* shared_memory() { return emulator::Block::current().shared(); }

inline unsigned thread_number() { return threadIdx.x; }

namespace emulated {

using Matrix = uint16_t[8][8];

struct Load {
  unsigned row;
  uint32_t* matrices;
};

inline void load(const char* what, uint32_t (&matrices)[4], unsigned row, bool transposed) {
  emulator::Block& block = emulator::Block::current();
  block.shared(row, 16);
  Load own = {row, matrices};
  block.warp(what, own, [&](Load** lanes, int) {
    Matrix read[4];
    for (int l = 0; l < emulator::kWarp; ++l) {
      std::memcpy(read[l / 8][l % 8], block.shared(lanes[l]->row, 16), 16);
    }
    for (int l = 0; l < emulator::kWarp; ++l) {
      for (int m = 0; m < 4; ++m) {
        const int i = l / 4, j = l % 4 * 2;
        const uint32_t low = transposed ? read[m][j][i] : read[m][i][j];
        const uint32_t high = transposed ? read[m][j + 1][i] : read[m][i][j + 1];
        lanes[l]->matrices[m] = low | high << 16;
      }
    }
  });
}

template <typename T>
float half_of(uint32_t packed, int which) {
  const auto bits = static_cast<uint16_t>(packed >> (16 * which));
  T number;
  static_assert(sizeof number == sizeof bits);
  std::memcpy(&number, &bits, sizeof bits);
  return static_cast<float>(number);
}

struct Multiply {
  float* c;
  const uint32_t* a;
  uint32_t b[2];
};

}  // namespace emulated

inline void load_matrices(uint32_t (&matrices)[4], unsigned row) {
  emulated::load("ldmatrix", matrices, row, false);
}

inline void load_matrices_transposed(uint32_t (&matrices)[4], unsigned row) {
  emulated::load("ldmatrix.trans", matrices, row, true);
}

template <typename T>
void multiply_add(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  emulated::Multiply own = {c, a, {b0, b1}};
  emulator::Block::current().warp("mma", own, [](emulated::Multiply** lanes, int) {
    float a_whole[16][16], b_whole[16][8];
    for (int l = 0; l < emulator::kWarp; ++l) {
      const int group = l / 4, in_group = l % 4;
      for (int i = 0; i < 8; ++i) {  // a0 to a7
        const int row = i / 2 % 2 == 0 ? group : group + 8;
        const int column = in_group * 2 + i % 2 + (i < 4 ? 0 : 8);
        a_whole[row][column] = emulated::half_of<T>(lanes[l]->a[i / 2], i % 2);
      }
      for (int i = 0; i < 4; ++i) {  // b0 to b3
        const int row = in_group * 2 + i % 2 + (i < 2 ? 0 : 8);
        b_whole[row][group] = emulated::half_of<T>(lanes[l]->b[i / 2], i % 2);
      }
    }
    for (int l = 0; l < emulator::kWarp; ++l) {
      for (int i = 0; i < 4; ++i) {  // c0 to c3
        const int row = i < 2 ? l / 4 : l / 4 + 8, column = l % 4 * 2 + i % 2;
        double sum = lanes[l]->c[i];
        for (int k = 0; k < 16; ++k) sum += double{a_whole[row][k]} * b_whole[k][column];
        lanes[l]->c[i] = static_cast<float>(sum);
      }
    }
  });
}

template <typename T>
uint32_t pack(float low, float high) {
  const T numbers[2] = {T(low), T(high)};
  uint32_t packed;
  static_assert(sizeof numbers == sizeof packed);
  std::memcpy(&packed, numbers, sizeof packed);
  return packed;
}

inline float multiply(float a, float b) {
  volatile float product = a * b;
  return product;
}

inline float exp2(float x) {
  const float power = std::exp2(x);
  return power < std::numeric_limits<float>::min() ? 0.0f : power;
}

namespace emulated {

inline void deliver(const emulator::Copy& copy) {
  if (copy.from == nullptr) {
    std::memset(copy.to, 0, 16);
  } else {
    std::memcpy(copy.to, copy.from, 16);
  }
}

}  // namespace emulated

// A copy is done at any time between now and the wait: here at the one or the other.
inline void copy_async(unsigned to, const void* from, bool inside) {
  emulator::Block& block = emulator::Block::current();
  if (reinterpret_cast<uintptr_t>(from) % 16 != 0) block.fail("cp.async: misaligned source");
  const emulator::Copy copy = {block.shared(to, 16), inside ? from : nullptr};
  if (block.random(2) == 0) {
    emulated::deliver(copy);
  } else {
    block.fiber().uncommitted.push_back(copy);
  }
}

inline void commit_copies() {
  emulator::Fiber& fiber = emulator::Block::current().fiber();
  fiber.groups.push_back(std::move(fiber.uncommitted));
  fiber.uncommitted.clear();
}

template <int kGroups>
void wait_for_copies() {
  auto& groups = emulator::Block::current().fiber().groups;
  while (groups.size() > kGroups) {
    for (const emulator::Copy& copy : groups.front()) emulated::deliver(copy);
    groups.erase(groups.begin());
  }
}

}  // namespace gcrl_kernels::ptx
