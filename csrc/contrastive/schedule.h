#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "contrastive/tiles.h"

namespace gcrl_kernels {

// Rows that make one side of a tile.
struct Block {
  int64_t begin, count;
};

// The blocks of rows begin to end.
inline std::vector<Block> blocks_of(int64_t begin, int64_t end, int64_t size) {
  std::vector<Block> blocks;
  for (int64_t row = begin; row < end; row += size) {
    blocks.push_back({row, std::min(size, end - row)});
  }
  return blocks;
}

// Two blocks, by their numbers, that meet.
struct Meeting {
  int64_t rows, columns;
  Diagonal diagonal;
};

// Each block at most once, so that the meetings may be held at the same time.
using Round = std::vector<Meeting>;

// Rounds in which every one of the blocks meets itself, then every other one once. `half` blocks on
// lie the partners; 0: there are none.
inline std::vector<Round> everybody(int64_t blocks, int64_t half) {
  std::vector<Round> rounds(1);
  for (int64_t b = 0; b < blocks; ++b) rounds[0].push_back({b, b, Diagonal::kSelf});
  const int64_t circle = (blocks + 1) / 2 * 2 - 1;  // they turn around the one that stays
  for (int64_t turn = 0; blocks > 1 && turn < circle; ++turn) {
    Round round;
    for (int64_t i = 0; i <= circle / 2; ++i) {
      const int64_t a = (turn + i) % circle;
      const int64_t b = i == 0 ? circle : (turn + circle - i) % circle;
      if (std::max(a, b) >= blocks) continue;  // of an odd number one waits
      const bool partners = half > 0 && std::abs(a - b) == half;
      round.push_back(
          {std::min(a, b), std::max(a, b), partners ? Diagonal::kPartner : Diagonal::kNone});
    }
    rounds.push_back(round);
  }
  return rounds;
}

// Rounds in which each of the first half's blocks meets each of the other's.
inline std::vector<Round> both_halves(int64_t half) {
  std::vector<Round> rounds;
  for (int64_t turn = 0; turn < half; ++turn) {
    Round round;
    for (int64_t a = 0; a < half; ++a) {
      round.push_back(
          {a, half + (a + turn) % half, turn == 0 ? Diagonal::kPartner : Diagonal::kNone});
    }
    rounds.push_back(round);
  }
  return rounds;
}

}  // namespace gcrl_kernels
