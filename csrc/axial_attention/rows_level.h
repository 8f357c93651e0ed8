// The kernels of one instruction set, included once by a file for each, which defines
//   LEVEL         its namespace
//   VECTOR_BYTES  the size of its vector registers
//   TILE_ROWS, TILE_VECTORS  the part of a product that is held in registers
// Only what is compiled in this namespace may come in: inline code from elsewhere would carry the
// instruction set's code into files that run without it.
//
// A row's tensors are brought into scratch memory as float32, so that strides and dtypes end there;
// every product is then one function, with the left factor broadcast and the right one in vectors.

#include "axial_attention/rows.h"
#include "common/vectors_level.h"

namespace gcrl_kernels::LEVEL {
namespace {

constexpr int64_t kQueries = 64;  // whose scores are in scratch memory at a time

int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

int64_t whole_vectors(int64_t count) { return (count + kLanes - 1) / kLanes * kLanes; }

Floats& at(float* data) { return *reinterpret_cast<Floats*>(data); }
const Floats& at(const float* data) { return *reinterpret_cast<const Floats*>(data); }

// Positions begin to begin + count of a row, to [count, width] with zeros after the features.
template <typename Type>
void pack(const Row& row, int64_t begin, int64_t count, int64_t features, float scale,
          float* packed, int64_t width) {
  const auto* data = static_cast<const typename Type::Element*>(row.data) + begin * row.stride;
  for (int64_t i = 0; i < count; ++i, data += row.stride, packed += width) {
    for (int64_t d = 0; d < width; d += kLanes) {
      at(packed + d) = load_part<Type>(data + d, features - d) * scale;
    }
  }
}

// [length, width] to a row.
template <typename Type>
void unpack(const float* packed, int64_t width, const Row& row, int64_t length, int64_t features) {
  auto* data = static_cast<typename Type::Element*>(row.data);
  for (int64_t i = 0; i < length; ++i, data += row.stride, packed += width) {
    for (int64_t d = 0; d < features; d += kLanes) {
      store_part<Type>(data + d, at(packed + d), features - d);
    }
  }
}

// Where lane i of a vector comes from when squares of kStep exchange halves: a lane of the first
// vector, or, kLanes on, of the second.
template <int kStep, bool kSecond>
inline Ints exchanged() {
  Ints index;
#pragma GCC unroll 16
  for (int i = 0; i < kLanes; ++i) {
    const bool upper = (i & kStep) != 0;
    index[i] = kSecond ? (upper ? i + kLanes : i + kStep) : (upper ? i - kStep + kLanes : i);
  }
  return index;
}

// One vector a row; on return one a column.
template <int kStep = 1>
inline void transpose(Floats (&square)[kLanes]) {
  if constexpr (kStep < kLanes) {
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; ++i) {
      if (i & kStep) continue;
      const Floats a = square[i], b = square[i + kStep];
      square[i] = __builtin_shuffle(a, b, exchanged<kStep, false>());
      square[i + kStep] = __builtin_shuffle(a, b, exchanged<kStep, true>());
    }
    transpose<2 * kStep>(square);
  }
}

// kLanes positions' features from d on to columns of [features, stride]. kWhole: there are kLanes
// positions and features; else zeros stand in for those that are not there.
template <typename Type, bool kWhole>
inline void transpose_square(const typename Type::Element* data, int64_t row_stride,
                             int64_t positions, int64_t features, float* packed, int64_t stride) {
  Floats square[kLanes];
#pragma GCC unroll 16
  for (int i = 0; i < kLanes; ++i) {
    if constexpr (kWhole) {
      square[i] = Type::load(data + i * row_stride);
    } else {
      square[i] = i < positions ? load_part<Type>(data + i * row_stride, features) : Floats{};
    }
  }
  transpose(square);
#pragma GCC unroll 16
  for (int i = 0; i < kLanes; ++i) {
    if (kWhole || i < features) at(packed + i * stride) = square[i];
  }
}

// A row of `length` positions to [features, stride], with zeros after the positions.
template <typename Type>
void pack_transposed(const Row& row, int64_t length, int64_t features, float* packed,
                     int64_t stride) {
  const auto* data = static_cast<const typename Type::Element*>(row.data);
  for (int64_t i = 0; i < length; i += kLanes) {
    for (int64_t d = 0; d < features; d += kLanes) {
      const bool whole = length - i >= kLanes && features - d >= kLanes;
      const auto square = whole ? transpose_square<Type, true> : transpose_square<Type, false>;
      square(data + i * row.stride + d, row.stride, length - i, features - d,
             packed + d * stride + i, stride);
    }
  }
}

// Brings the rows that come next into the cache, so many lines with each tile of a product.
template <typename Type>
class Prefetch {
 public:
  Prefetch(const Row* rows, int count, int lines, const RowShape& shape)
      : row_(rows), end_(rows + count), length_(shape.length), features_(shape.features) {
    const int64_t lines_each = (features_ + kLine - 1) / kLine;
    positions_ = (lines + lines_each - 1) / lines_each;
    if (count > 0 && row_->data == nullptr) row_ = end_;
  }

  void advance() {
    if (row_ == end_) return;
    const int64_t last = least(length_, position_ + positions_);
    const auto* data = static_cast<const typename Type::Element*>(row_->data);
    for (; position_ < last; ++position_) {
      const auto* position = data + position_ * row_->stride;
      for (int64_t d = 0; d < features_; d += kLine) __builtin_prefetch(position + d, 0, 3);
    }
    if (position_ == length_) {
      position_ = 0;
      ++row_;
    }
  }

 private:
  static constexpr int64_t kLine = 64 / sizeof(typename Type::Element);
  const Row *row_, *end_;
  int64_t length_, features_, positions_, position_ = 0;
};

// A factor of a product: element (i, k) is data[i * row + k * column].
struct Factor {
  const float* data;
  int64_t row, column;
};

// Where a product goes: to scratch memory, perhaps added to what is there,
struct Packed {
  float* data;
  int64_t stride;
  bool add = false;

  Packed part(int64_t i, int64_t j) const { return {data + i * stride + j, stride, add}; }
  Floats before(int i, int j) const { return add ? at(data + i * stride + j * kLanes) : Floats{}; }
  void write(int i, int j, Floats values) const { at(data + i * stride + j * kLanes) = values; }
};

// or straight to positions of a row, times a factor for each or one for all.
template <typename Type>
struct Unpacked {
  typename Type::Element* data;
  int64_t stride, features;
  const float* factors;
  float factor;

  Unpacked(const Row& row, int64_t position, int64_t features, const float* factors, float factor)
      : data(static_cast<typename Type::Element*>(row.data) + position * row.stride),
        stride(row.stride),
        features(features),
        factors(factors),
        factor(factor) {}

  Unpacked part(int64_t i, int64_t j) const {
    Unpacked part = *this;
    part.data += i * stride + j;
    part.features -= j;
    if (factors != nullptr) part.factors += i;
    return part;
  }
  Floats before(int, int) const { return Floats{}; }
  void write(int i, int j, Floats values) const {
    const float scale = factors == nullptr ? factor : factors[i];
    store_part<Type>(data + i * stride + j * kLanes, values * scale, features - j * kLanes);
  }
};

// out[i, j] = Σ_k left(i, k) right[k, j], for kRows rows i and kVectors vectors of columns j.
template <int kRows, int kVectors, typename Out>
void multiply_tile(const Factor& left, const float* right, int64_t right_stride, int64_t depth,
                   const Out& out) {
  Floats sum[kRows][kVectors];
#pragma GCC unroll 16
  for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 4
    for (int j = 0; j < kVectors; ++j) {
      sum[i][j] = out.before(i, j);
    }
  }
  const float* a = left.data;
  for (int64_t k = 0; k < depth; ++k, a += left.column, right += right_stride) {
    Floats b[kVectors];
#pragma GCC unroll 4
    for (int j = 0; j < kVectors; ++j) b[j] = at(right + j * kLanes);
#pragma GCC unroll 16
    for (int i = 0; i < kRows; ++i) {
      const float factor = a[i * left.row];
#pragma GCC unroll 4
      for (int j = 0; j < kVectors; ++j) sum[i][j] += factor * b[j];
    }
  }
#pragma GCC unroll 16
  for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 4
    for (int j = 0; j < kVectors; ++j) out.write(i, j, sum[i][j]);
  }
}

// multiply_tile for a number of rows known only here.
template <int kVectors, int kRows = TILE_ROWS, typename Out>
void multiply_rows(int64_t rows, const Factor& left, const float* right, int64_t right_stride,
                   int64_t depth, const Out& out) {
  if constexpr (kRows > 0) {
    if (rows == kRows) {
      multiply_tile<kRows, kVectors>(left, right, right_stride, depth, out);
    } else {
      multiply_rows<kVectors, kRows - 1>(rows, left, right, right_stride, depth, out);
    }
  }
}

// Which elements of the left factor of a causal product are zero, and which of its results nobody
// reads; rows and columns count from the same position.
enum class Causal {
  kNo,
  kResult,      // nobody reads out[i, j] for j > i
  kLower,       // left(i, k) is zero for k > i
  kTransposed,  // left(i, k) is zero for k < i
};

// out[rows, columns] = left[rows, depth] right[depth, columns]. Columns are whole vectors. `first`
// is the position of the left factor's row 0 (for kTransposed: of its column 0).
template <typename Type, typename Out>
void multiply(Causal causal, int64_t first, const Factor& left, const float* right,
              int64_t right_stride, int64_t rows, int64_t depth, int64_t columns, const Out& out,
              Prefetch<Type>& prefetch) {
  const int64_t blocks = (rows + TILE_ROWS - 1) / TILE_ROWS;
  constexpr int64_t kPanel = TILE_VECTORS * kLanes;
  for (int64_t j = 0; j < columns; j += kPanel) {
    for (int64_t block = 0; block < blocks; ++block) {
      const int64_t begin = rows * block / blocks, end = rows * (block + 1) / blocks;
      int64_t from = 0, to = depth;
      if (causal == Causal::kResult && j >= first + end) continue;
      if (causal == Causal::kLower) to = least(depth, first + end);
      if (causal == Causal::kTransposed && begin > first) from = least(depth, begin - first);
      const Factor part = {left.data + begin * left.row + from * left.column, left.row,
                           left.column};
      prefetch.advance();
      const float* panel = right + from * right_stride + j;
      if (columns - j >= kPanel) {
        multiply_rows<TILE_VECTORS>(end - begin, part, panel, right_stride, to - from,
                                    out.part(begin, j));
      } else {
        for (int64_t v = 0; v < columns - j; v += kLanes) {
          multiply_rows<1>(end - begin, part, panel + v, right_stride, to - from,
                           out.part(begin, j + v));
        }
      }
    }
  }
}

// One query's scores [columns], with bias and mask; minus infinity for keys from `keys` on.
void complete_scores(float* scores, int64_t keys, int64_t columns, const float* bias,
                     const float* allowed) {
  if (bias != nullptr) {
    for (int64_t j = 0; j < keys; j += kLanes) at(scores + j) += at(bias + j);
  }
  if (allowed != nullptr) {
    for (int64_t j = 0; j < keys; j += kLanes) at(scores + j) += at(allowed + j);
  }
  const Floats nothing = Floats{} - kInfinity;
  if (keys % kLanes != 0) {
    Floats& edge = at(scores + keys / kLanes * kLanes);
    edge = lanes() < static_cast<int32_t>(keys % kLanes) ? edge : nothing;
  }
  for (int64_t j = whole_vectors(keys); j < columns; j += kLanes) at(scores + j) = nothing;
}

// Scores to exp(score - maximum), in place; their sum and the maximum (0 where nothing is allowed).
void exponentiate(float* scores, int64_t columns, float* maximum, float* sum) {
  Floats largest = at(scores);
  for (int64_t j = kLanes; j < columns; j += kLanes) {
    const Floats s = at(scores + j);
    largest = s > largest ? s : largest;
  }
  *maximum = largest_of(largest);
  if (*maximum == -kInfinity) *maximum = 0;
  Floats total = {};
  for (int64_t j = 0; j < columns; j += kLanes) {
    const Floats p = exp(at(scores + j) - *maximum);
    at(scores + j) = p;
    total += p;
  }
  *sum = sum_of(total);
}

int64_t aligned(int64_t floats) { return (floats + 15) / 16 * 16; }

// Scratch memory, handed out piece by piece.
struct Scratch {
  float* next;
  float* take(int64_t floats) {
    float* piece = next;
    next += aligned(floats);
    return piece;
  }
};

int64_t forward_scratch(const RowShape& shape) {
  const int64_t n = shape.length, d = padded(shape.features), keys = padded(n);
  const int64_t queries = least(n, kQueries);
  return shape.features * keys + n * d + queries * (d + keys + 1) + 5 * 16;
}

template <typename Type>
void forward_of(const RowShape& shape, const ForwardRow& row, float* memory) {
  const int64_t n = shape.length, features = shape.features;
  const int64_t width = padded(features), keys = padded(n), columns = whole_vectors(n);
  const int64_t most = least(n, kQueries);
  Scratch scratch = {memory};
  float* k_transposed = scratch.take(features * keys);
  float* v = scratch.take(n * width);
  float* q = scratch.take(most * width);
  float* scores = scratch.take(most * keys);
  float* factors = scratch.take(most);
  Prefetch<Type> prefetch(row.next, 3, 32, shape);
  pack_transposed<Type>(row.k, n, features, k_transposed, keys);
  pack<Type>(row.v, 0, n, features, 1, v, width);

  for (int64_t begin = 0; begin < n; begin += most) {
    const int64_t queries = least(most, n - begin);
    pack<Type>(row.q, begin, queries, features, shape.scale, q, width);
    multiply(shape.causal ? Causal::kResult : Causal::kNo, begin, {q, width, 1}, k_transposed, keys,
             queries, features, columns, Packed{scores, keys}, prefetch);
    for (int64_t i = 0; i < queries; ++i) {
      const int64_t query = begin + i;
      complete_scores(scores + i * keys, shape.causal ? query + 1 : n, columns,
                      row.bias == nullptr ? nullptr : row.bias + query * keys, row.allowed);
      float maximum, sum;
      exponentiate(scores + i * keys, columns, &maximum, &sum);
      factors[i] = sum == 0 ? 0 : 1 / sum;
      row.lse[query * row.lse_stride] = sum == 0 ? -kInfinity : maximum + __builtin_logf(sum);
    }
    multiply(shape.causal ? Causal::kLower : Causal::kNo, begin, {scores, keys, 1}, v, width,
             queries, n, whole_vectors(features),
             Unpacked<Type>(row.out, begin, features, factors, 1), prefetch);
  }
}

// Rows longer than a block of queries sum their dk and dv in scratch memory.
int64_t backward_scratch(const RowShape& shape) {
  const int64_t n = shape.length, d = padded(shape.features), keys = padded(n);
  const int64_t queries = least(n, kQueries);
  return 2 * shape.features * keys + 3 * n * d + queries * (2 * d + 2 * keys) + 9 * 16;
}

template <typename Type>
void backward_of(const RowShape& shape, const BackwardRow& row, float* memory) {
  const int64_t n = shape.length, features = shape.features;
  const int64_t width = padded(features), keys = padded(n), columns = whole_vectors(n);
  const int64_t used = whole_vectors(features), most = least(n, kQueries);
  Scratch scratch = {memory};
  float* k_transposed = scratch.take(features * keys);
  float* v_transposed = scratch.take(features * keys);
  float* k = scratch.take(n * width);
  float* q = scratch.take(most * width);
  float* grad = scratch.take(most * width);
  float* p = scratch.take(most * keys);
  float* ds = scratch.take(most * keys);
  float* dk = scratch.take(n * width);
  float* dv = scratch.take(n * width);
  Prefetch<Type> prefetch(row.next, 4, 16, shape);
  pack_transposed<Type>(row.k, n, features, k_transposed, keys);
  pack_transposed<Type>(row.v, n, features, v_transposed, keys);
  pack<Type>(row.k, 0, n, features, 1, k, width);
  const Causal result = shape.causal ? Causal::kResult : Causal::kNo;
  const Causal lower = shape.causal ? Causal::kLower : Causal::kNo;
  const Causal transposed = shape.causal ? Causal::kTransposed : Causal::kNo;

  for (int64_t begin = 0; begin < n; begin += most) {
    const int64_t queries = least(most, n - begin);
    pack<Type>(row.q, begin, queries, features, shape.scale, q, width);
    pack<Type>(row.grad, begin, queries, features, 1, grad, width);
    multiply(result, begin, {q, width, 1}, k_transposed, keys, queries, features, columns,
             Packed{p, keys}, prefetch);
    multiply(result, begin, {grad, width, 1}, v_transposed, keys, queries, features, columns,
             Packed{ds, keys}, prefetch);
    for (int64_t i = 0; i < queries; ++i) {
      const int64_t query = begin + i, allowed_keys = shape.causal ? query + 1 : n;
      float *p_row = p + i * keys, *ds_row = ds + i * keys;
      complete_scores(p_row, allowed_keys, columns,
                      row.bias == nullptr ? nullptr : row.bias + query * keys, row.allowed);
      const float lse = row.lse[query * row.lse_stride];
      const float shift = lse == -kInfinity ? 0 : lse;
      Floats dot = {};
      for (int64_t j = 0; j < allowed_keys; j += kLanes) {
        at(p_row + j) = exp(at(p_row + j) - shift);
        dot += at(p_row + j) * at(ds_row + j);
      }
      const float delta = sum_of(dot);
      for (int64_t j = 0; j < allowed_keys; j += kLanes) {
        at(ds_row + j) = at(p_row + j) * (at(ds_row + j) - delta);
      }
      for (int64_t j = whole_vectors(allowed_keys); j < columns; j += kLanes) {
        at(p_row + j) = at(ds_row + j) = Floats{};
      }
      if (row.dbias != nullptr) {
        for (int64_t j = 0; j < allowed_keys; j += kLanes) {
          at(row.dbias + query * keys + j) += at(ds_row + j);
        }
      }
    }
    multiply(lower, begin, {ds, keys, 1}, k, width, queries, n, used,
             Unpacked<Type>(row.dq, begin, features, nullptr, shape.scale), prefetch);
    const Factor p_transposed = {p, 1, keys}, ds_transposed = {ds, 1, keys};
    if (most == n) {
      multiply(transposed, 0, p_transposed, grad, width, n, n, used,
               Unpacked<Type>(row.dv, 0, features, nullptr, 1), prefetch);
      multiply(transposed, 0, ds_transposed, q, width, n, n, used,
               Unpacked<Type>(row.dk, 0, features, nullptr, 1), prefetch);
    } else {
      multiply(transposed, begin, p_transposed, grad, width, n, queries, used,
               Packed{dv, width, begin > 0}, prefetch);
      multiply(transposed, begin, ds_transposed, q, width, n, queries, used,
               Packed{dk, width, begin > 0}, prefetch);
    }
  }
  if (most < n) {
    unpack<Type>(dk, width, row.dk, n, features);
    unpack<Type>(dv, width, row.dv, n, features);
  }
}

void forward(const RowShape& shape, const ForwardRow& row, float* scratch) {
  switch (shape.type) {
    case FloatType::kFloat32:
      return forward_of<Float32>(shape, row, scratch);
    case FloatType::kFloat16:
      return forward_of<Float16>(shape, row, scratch);
    case FloatType::kBFloat16:
      return forward_of<BFloat16>(shape, row, scratch);
  }
}

void backward(const RowShape& shape, const BackwardRow& row, float* scratch) {
  switch (shape.type) {
    case FloatType::kFloat32:
      return backward_of<Float32>(shape, row, scratch);
    case FloatType::kFloat16:
      return backward_of<Float16>(shape, row, scratch);
    case FloatType::kBFloat16:
      return backward_of<BFloat16>(shape, row, scratch);
  }
}

}  // namespace

extern const RowKernels row_kernels = {forward_scratch, backward_scratch, forward, backward};

}  // namespace gcrl_kernels::LEVEL
