#pragma once

#include <cstdint>

#include "common/products.cuh"
#include "common/ptx.cuh"
#include "common/softmax.cuh"
#include "contrastive/embeddings.cuh"

namespace gcrl_kernels::contrastive {

inline constexpr int kWarpRows = 16;
inline constexpr int kColumns = 64;  // of a tile
inline constexpr int kMostWarps = 8;
inline constexpr int kStages = 4;  // steps whose tiles are in shared memory, or on their way
inline constexpr int kColumnTiles = kColumns / 8;

// Features of a step: a tile's row in shared memory is 128 bytes.
template <typename T>
inline constexpr int kStep = 128 / static_cast<int>(sizeof(T));

template <typename T>
using StepTile = Tile<T, kStep<T>>;
template <typename T>
using StepProducts = Products<T, kStep<T>>;

// Who is a candidate of an anchor, of those of its own batch.
enum class Candidates : int { kOthers, kNegatives, kOtherHalf };

// Which rows meet which columns.
struct Meeting {
  int64_t rows, columns;
  int64_t anchors;   // columns before this one are anchors too
  int64_t diagonal;  // the column where the rows' own batch begins; negative: it is not there
  Candidates candidates;

  // The columns that have candidates of rows begin to end.
  __device__ int64_t first_column(int64_t begin, int64_t end) const {
    const bool first_half = halves() && begin < end && end <= rows / 2 && diagonal == 0;
    return first_half ? rows / 2 : 0;
  }
  __device__ int64_t last_column(int64_t begin) const {
    const bool second_half = halves() && begin >= rows / 2 && diagonal == 0 && columns == rows;
    return second_half ? rows / 2 : columns;
  }

 private:
  __device__ bool halves() const { return candidates == Candidates::kOtherHalf; }
};

// A place among the columns of a tile, which are numbered from 0, or one before or after them.
static __device__ __forceinline__ int within_tile(int64_t number) {
  return static_cast<int>(max(int64_t{-1}, min(number, int64_t{kColumns})));
}

// What a row has to heed in the tile that begins at a column.
struct Rules {
  __device__ Rules(const Meeting& meeting, int64_t row, int64_t column, int end_) : end(end_) {
    if (meeting.diagonal < 0) return;
    const int64_t own = meeting.diagonal - column, half = meeting.rows / 2;
    partner = within_tile(own + (row < half ? row + half : row - half));
    if (meeting.candidates == Candidates::kOtherHalf) {
      const int64_t begin = own + (row < half ? 0 : half);
      from = within_tile(begin);
      to = within_tile(begin + half);
    } else {
      from = within_tile(own + row);
      to = within_tile(own + row + 1);
      if (meeting.candidates == Candidates::kNegatives) excluded = partner;
    }
  }

  __device__ bool plain() const {
    return end == kColumns && from >= to && (excluded < 0 || excluded == kColumns);
  }
  __device__ bool candidate(int j) const {
    return j < end && (j < from || j >= to) && j != excluded;
  }
  // Of a row without classes.
  __device__ bool has_partner() const { return partner >= 0 && partner < kColumns; }

  int partner = -1, end;

 private:
  int from = -1, to = -1;  // no candidates, and neither is this one
  int excluded = -1;
};

// Calls a function for each number of a warp's scores, with its places n and e in the registers,
// which of the lane's two rows it belongs to, and its column in the tile.
template <typename Function>
__device__ __forceinline__ void for_scores(const Function& function) {
  const Lane lane;
#pragma unroll
  for (int n = 0; n < kColumnTiles; ++n) {
#pragma unroll
    for (int e = 0; e < 4; ++e) function(n, e, e / 2, 8 * n + lane.column() + e % 2);
  }
}

// Calls a function for each of a lane's columns, with n and which of the two that it has there.
template <typename Function>
__device__ __forceinline__ void for_columns(const Function& function) {
  const Lane lane;
#pragma unroll
  for (int n = 0; n < kColumnTiles; ++n) {
#pragma unroll
    for (int i = 0; i < 2; ++i) function(n, i, 8 * n + lane.column() + i);
  }
}

// The way of a block, all of whose threads take part, through the columns. For each tile come the
// steps of the scores, then those of the columns' values: `values` of them from `first_value` on.
// The rows stay in shared memory where that holds their steps, and else come with each step.
template <typename T>
class Steps {
 public:
  static constexpr int kColumnBytes = kColumns * 128;
  static __host__ __device__ int row_bytes(int warps) { return warps * kWarpRows * 128; }
  static __host__ __device__ int count(int width) { return (width + kStep<T> - 1) / kStep<T>; }
  static __host__ int shared_bytes(int width, int warps) {
    return min(count(width), kStages) * row_bytes(warps) + kStages * kColumnBytes;
  }

  __device__ Steps(const Embeddings<T>& rows, const Embeddings<T>& columns, const Meeting& meeting,
                   int64_t row, int first_value, int values)
      : rows_(rows),
        columns_(columns),
        row_(row),
        row_end_(meeting.rows),
        scores_(count(rows.width)),
        first_value_(first_value),
        steps_(scores_ + values),
        warps_(static_cast<int>(blockDim.x) / kWarp) {
    first = next_column_ = meeting.first_column(row, min(row + warps_ * kWarpRows, row_end_));
    last = meeting.last_column(row);
    if (resident()) {
      for (int k = 0; k < scores_; ++k) load_rows(k, k);
    }
    for (int i = 0; i + 1 < kStages; ++i) load_next();
  }

  // Waits for the next step's tiles.
  __device__ void advance() {
    ptx::wait_for_copies<kStages - 2>();
    __syncthreads();
    stage_ = (stage_ + 1) % kStages;
    load_next();
  }

  // The rows of this warp at the step of the scores.
  __device__ StepTile<T> rows(int step) const {
    const StepTile<T> tile = {row_tile(resident() ? step : stage_)};
    return tile.from(static_cast<int>(ptx::thread_number()) / kWarp * kWarpRows);
  }
  __device__ StepTile<T> columns() const { return {column_tile(stage_)}; }
  __device__ int scores() const { return scores_; }

  int64_t first, last;  // columns

 private:
  __device__ bool resident() const { return scores_ <= kStages; }
  __device__ unsigned row_tile(int number) const {
    return static_cast<unsigned>(kStages * kColumnBytes + number * row_bytes(warps_));
  }
  static __device__ unsigned column_tile(int stage) {
    return static_cast<unsigned>(stage * kColumnBytes);
  }

  __device__ void load_next() {
    if (next_column_ < last) {
      const bool score = next_ < scores_;
      const int step = score ? next_ : first_value_ + next_ - scores_;
      if (score && !resident()) load_rows(load_stage_, step);
      copy(column_tile(load_stage_), columns_, next_column_, kColumns, last, step);
      if (++next_ == steps_) {
        next_ = 0;
        next_column_ += kColumns;
      }
      load_stage_ = (load_stage_ + 1) % kStages;
    }
    ptx::commit_copies();
  }

  __device__ void load_rows(int tile, int step) {
    copy(row_tile(tile), rows_, row_, warps_ * kWarpRows, row_end_, step);
  }

  static __device__ void copy(unsigned to, const Embeddings<T>& from, int64_t begin, int count,
                              int64_t end, int step) {
    constexpr int kChunks = StepTile<T>::kChunks;
    const StepTile<T> tile = {to};
    const int thread = static_cast<int>(ptx::thread_number()), chunk = thread % kChunks;
    const int feature = step * kStep<T> + chunk * kChunk<T>;
    for (int i = thread / kChunks; i < count; i += static_cast<int>(blockDim.x) / kChunks) {
      const bool inside = begin + i < end && feature < from.width;
      const T* data = inside ? from.row(begin + i) + feature : from.data;
      ptx::copy_async(tile.chunk(i, chunk), data, inside);
    }
  }

  const Embeddings<T>&rows_, &columns_;
  int64_t row_, row_end_, next_column_;
  int scores_, first_value_, steps_, warps_;
  int next_ = 0, load_stage_ = 0, stage_ = kStages - 1;
};

template <int kTiles>
__device__ __forceinline__ void add(float (&sums)[kTiles][4], const float (&part)[kTiles][4]) {
#pragma unroll
  for (int n = 0; n < kTiles; ++n) {
#pragma unroll
    for (int e = 0; e < 4; ++e) sums[n][e] += part[n][e];
  }
}

// Products of the rows and columns of the next tile as they are in memory, into `s`. In float32
// each step is summed by itself, which rounds less.
template <typename T>
__device__ __forceinline__ void find_products(float (&s)[kColumnTiles][4], Steps<T>& steps,
                                              bool works) {
  zero(s);
#pragma unroll 1
  for (int k = 0; k < steps.scores(); ++k) {
    steps.advance();
    if (!works) continue;
    if constexpr (sizeof(T) == sizeof(float)) {
      float part[kColumnTiles][4];
      zero(part);
      StepProducts<T>::scores(part, steps.rows(k), steps.columns(), kStep<T>);
      add(s, part);
    } else {
      StepProducts<T>::scores(s, steps.rows(k), steps.columns(), kStep<T>);
    }
  }
}

// The scale of all scores, a number or in device memory.
struct Scale {
  __device__ float operator()() const { return data == nullptr ? value : *data; }

  const float* data;
  float value;
};

template <typename Number, typename Place>
__device__ __forceinline__ Number number_at(const Number* numbers, Place place, Place end) {
  return place < end ? numbers[place] : Number(0);
}

}  // namespace gcrl_kernels::contrastive
