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

namespace gcrl_kernels::LEVEL {
namespace {

typedef float Floats __attribute__((vector_size(VECTOR_BYTES)));
typedef float LooseFloats __attribute__((vector_size(VECTOR_BYTES), aligned(4), may_alias));
typedef int32_t Ints __attribute__((vector_size(VECTOR_BYTES)));
typedef uint32_t Words __attribute__((vector_size(VECTOR_BYTES)));
typedef uint16_t LooseHalves __attribute__((vector_size(VECTOR_BYTES / 2), aligned(2), may_alias));

#define ALWAYS_INLINE inline __attribute__((always_inline))

constexpr int kLanes = VECTOR_BYTES / sizeof(float);
constexpr int64_t kQueries = 64;  // whose scores are in scratch memory at a time
constexpr float kInfinity = __builtin_inff();

int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

int64_t whole_vectors(int64_t count) { return (count + kLanes - 1) / kLanes * kLanes; }

// The numbers from 0 to kLanes - 1, with every bit of kFlip turned over.
template <int kFlip = 0>
inline Ints lanes() {
  Ints index;
#pragma GCC unroll 16
  for (int i = 0; i < kLanes; ++i) index[i] = i ^ kFlip;
  return index;
}

Floats& at(float* data) { return *reinterpret_cast<Floats*>(data); }
const Floats& at(const float* data) { return *reinterpret_cast<const Floats*>(data); }

// Over all lanes, in halves.
template <int kStep = kLanes / 2>
inline float sum_of(Floats values) {
  if constexpr (kStep == 0) return values[0];
  return sum_of<kStep / 2>(values + __builtin_shuffle(values, lanes<kStep>()));
}

template <int kStep = kLanes / 2>
inline float largest_of(Floats values) {
  if constexpr (kStep == 0) return values[0];
  const Floats other = __builtin_shuffle(values, lanes<kStep>());
  return largest_of<kStep / 2>(other > values ? other : values);
}

// exp to about one unit in the last place; 0 below the least normal number. 2^n e^r with
// |r| <= ln(2)/2, where e^r - 1 - r is r² times a polynomial (a minimax fit).
Floats exp(Floats x) {
  constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding it leaves an integer in the low bits
  const Floats shifted = x * 1.44269504f + kRound;
  const Floats n = shifted - kRound;
  const Floats r = (x - n * 0.693145752f) - n * 1.42860677e-6f;
  Floats p = r * 0.0013814467f + 0.008368781f;
  p = p * r + 0.041668393f;
  p = p * r + 0.1666652f;
  p = p * r + 0.49999994f;
  const Floats e = (p * r) * r + r + 1.0f;
  const Floats power = (Floats)(((Ints)shifted - (Ints)(Floats{} + kRound) + 127) << 23);
  return x < -87.3f ? Floats{} : e * power;
}

// Elements of memory as vectors of float32, and back (to nearest, ties to even).
struct Float32 {
  typedef float Element;
  static float widen(float element) { return element; }
  static Floats load(const float* data) {
    return (Floats) * reinterpret_cast<const LooseFloats*>(data);
  }
  static void store(float* data, Floats values) {
    *reinterpret_cast<LooseFloats*>(data) = (LooseFloats)values;
  }
};

struct BFloat16 {
  typedef uint16_t Element;
  static Floats load(const uint16_t* data) {
    const LooseHalves halves = *reinterpret_cast<const LooseHalves*>(data);
    return (Floats)(__builtin_convertvector(halves, Words) << 16);
  }
  static void store(uint16_t* data, Floats values) {
    const Words bits = (Words)values;
    const Words rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
    const Words result = values == values ? rounded : (bits >> 16 | 0x40);
    *reinterpret_cast<LooseHalves*>(data) = __builtin_convertvector(result, LooseHalves);
  }
};

struct Float16 {
  typedef uint16_t Element;
  static Floats load(const uint16_t* data) {
    const LooseHalves halves = *reinterpret_cast<const LooseHalves*>(data);
    const Words bits = __builtin_convertvector(halves, Words);
    const Words shifted = (bits & 0x7fff) << 13;
    // A product by 2^112 moves the exponent, and makes a subnormal number normal.
    const Words finite = (Words)((Floats)shifted * 0x1p112f);
    const Words magnitude = shifted >= 0x0f800000u ? (shifted | 0x7f800000u) : finite;
    return (Floats)(magnitude | (bits & 0x8000u) << 16);
  }
  static void store(uint16_t* data, Floats values) {
    const Words bits = (Words)values, sign = bits >> 16 & 0x8000u, magnitude = bits & 0x7fffffffu;
    const Words normal = (magnitude - 0x38000000u + 0xfff + (magnitude >> 13 & 1)) >> 13;
    // Below 2^-14 the last place is 2^-24: adding 0.5 rounds to it.
    const Words subnormal = (Words)((Floats)magnitude + 0.5f) - (Words)(Floats{} + 0.5f);
    const Words nan = 0x7e00u + Words{}, infinity = 0x7c00u + Words{};
    Words result = magnitude < 0x38800000u ? subnormal : normal;
    result = magnitude >= 0x477ff000u ? infinity : result;
    result = magnitude > 0x7f800000u ? nan : result;
    *reinterpret_cast<LooseHalves*>(data) = __builtin_convertvector(result | sign, LooseHalves);
  }
};

// The first `count` of a vector's elements, zeros after them.
template <typename Type>
Floats load_part(const typename Type::Element* data, int64_t count) {
  if (count >= kLanes) return Type::load(data);
  typename Type::Element padded[kLanes] = {};
  for (int64_t i = 0; i < count; ++i) padded[i] = data[i];
  return Type::load(padded);
}

template <typename Type>
void store_part(typename Type::Element* data, Floats values, int64_t count) {
  if (count >= kLanes) return Type::store(data, values);
  typename Type::Element whole[kLanes];
  Type::store(whole, values);
  for (int64_t i = 0; i < count; ++i) data[i] = whole[i];
}

// A position of a row, times a factor, to [width] with zeros after the features.
template <typename Type>
void pack(const typename Type::Element* data, int64_t features, float factor, float* packed,
          int64_t width) {
  for (int64_t d = 0; d < width; d += kLanes) {
    at(packed + d) = load_part<Type>(data + d, features - d) * factor;
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

// [length, width] to [features, stride], with zeros after the positions.
void transpose(const float* packed, int64_t width, int64_t length, int64_t features,
               float* transposed, int64_t stride) {
  for (int64_t i = 0; i < length; i += kLanes) {
    for (int64_t d = 0; d < features; d += kLanes) {
      Floats square[kLanes];
#pragma GCC unroll 16
      for (int j = 0; j < kLanes; ++j) {
        square[j] = i + j < length ? at(packed + (i + j) * width + d) : Floats{};
      }
      transpose(square);
#pragma GCC unroll 16
      for (int j = 0; j < kLanes; ++j) {
        if (d + j < features) at(transposed + (d + j) * stride + i) = square[j];
      }
    }
  }
}

// Brings rows into the cache: those that are written to next, then those that are read after them.
// It does so by positions, evenly, from within the products' loops: memory is waited for by nobody
// then.
class Fetch {
 public:
  Fetch(const Row* outputs, int output_count, const Row* inputs, int input_count, int64_t element,
        const RowShape& shape)
      : outputs_(outputs),
        outputs_end_(outputs + output_count),
        inputs_(inputs),
        inputs_end_(inputs + input_count),
        element_(element),
        bytes_(shape.features * element),
        length_(shape.length) {}

  // In step k of a product's loop.
  ALWAYS_INLINE void step(int64_t k) {
    if (k % 4 != 0) return;
    if (left_ == 0) {
      if (outputs_ != outputs_end_) {
        begin(*outputs_++);
      } else if (inputs_ != inputs_end_) {
        begin(*inputs_++);
        of_input_ = 1;
      } else {
        return;
      }
    }
    for (int64_t byte = 0; byte < bytes_; byte += 64) __builtin_prefetch(next_ + byte);
    next_ += stride_;
    --left_;
    input_positions_ += of_input_;
  }

  // That have been fetched so far, of all inputs.
  int64_t input_positions() const { return input_positions_; }

 private:
  void begin(const Row& row) {
    next_ = static_cast<const char*>(row.data);
    stride_ = row.stride * element_;
    left_ = length_;
  }

  const Row *outputs_, *outputs_end_, *inputs_, *inputs_end_;
  int64_t element_, bytes_, length_;
  const char* next_ = nullptr;
  int64_t stride_ = 0, left_ = 0, of_input_ = 0, input_positions_ = 0;
};

// Packs rows to [rows, length, width], the first of them times the scale, while products run: what
// they have fetched is packed between their tiles. A row of a tensor has its positions at powers of
// two, which fall on few cache lines, so it must not stay there for long.
template <typename Type>
class Packing {
 public:
  Packing(const Row* rows, int count, const Row* outputs, int output_count, const RowShape& shape,
          float* packed, int64_t width)
      : row_(rows),
        end_(rows->data == nullptr ? rows : rows + count),
        fetch_(outputs, output_count, row_, end_ - row_, sizeof(typename Type::Element), shape),
        length_(shape.length),
        features_(shape.features),
        factor_(shape.scale),
        packed_(packed),
        width_(width) {}

  Fetch& fetch() { return fetch_; }

  // What has been on its way for some time.
  void advance() { pack_until(fetch_.input_positions() - 4); }

  void finish() { pack_until(length_ * (end_ - row_) + done_ - position_); }

 private:
  void pack_until(int64_t last) {
    for (; done_ < last; ++done_, packed_ += width_) {
      const auto* data = static_cast<const typename Type::Element*>(row_->data);
      pack<Type>(data + position_ * row_->stride, features_, factor_, packed_, width_);
      if (++position_ == length_) {
        position_ = 0;
        factor_ = 1;
        ++row_;
      }
    }
  }

  const Row *row_, *end_;
  Fetch fetch_;
  int64_t length_, features_;
  float factor_;
  float* packed_;
  int64_t width_, position_ = 0, done_ = 0;
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
                   const Out& out, Fetch& fetch) {
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
    fetch.step(k);
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
                   int64_t depth, const Out& out, Fetch& fetch) {
  if constexpr (kRows > 0) {
    if (rows == kRows) {
      multiply_tile<kRows, kVectors>(left, right, right_stride, depth, out, fetch);
    } else {
      multiply_rows<kVectors, kRows - 1>(rows, left, right, right_stride, depth, out, fetch);
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
              Packing<Type>& packing) {
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
      packing.advance();
      const float* panel = right + from * right_stride + j;
      if (columns - j >= kPanel) {
        multiply_rows<TILE_VECTORS>(end - begin, part, panel, right_stride, to - from,
                                    out.part(begin, j), packing.fetch());
      } else {
        for (int64_t v = 0; v < columns - j; v += kLanes) {
          multiply_rows<1>(end - begin, part, panel + v, right_stride, to - from,
                           out.part(begin, j + v), packing.fetch());
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
  return 2 * aligned(3 * n * d) + aligned(shape.features * keys) + aligned(queries * keys) +
         aligned(queries);
}

template <typename Type>
void forward_of(const RowShape& shape, const ForwardRow& row, float* memory) {
  const int64_t n = shape.length, features = shape.features;
  const int64_t width = padded(features), keys = padded(n), columns = whole_vectors(n);
  const int64_t most = least(n, kQueries);
  Scratch scratch = {memory};
  float* packed[2] = {scratch.take(3 * n * width), scratch.take(3 * n * width)};
  float* k_transposed = scratch.take(features * keys);
  float* scores = scratch.take(most * keys);
  float* factors = scratch.take(most);
  const float* q = packed[row.before % 2];
  const float *k = q + n * width, *v = k + n * width;
  if (row.before == 0) Packing<Type>(row.inputs, 3, nullptr, 0, shape, packed[0], width).finish();
  Packing<Type> packing(row.next, 3, row.outputs, most == n ? 1 : 0, shape,
                        packed[(row.before + 1) % 2], width);
  transpose(k, width, n, features, k_transposed, keys);

  for (int64_t begin = 0; begin < n; begin += most) {
    const int64_t queries = least(most, n - begin);
    multiply(shape.causal ? Causal::kResult : Causal::kNo, begin, {q + begin * width, width, 1},
             k_transposed, keys, queries, features, columns, Packed{scores, keys}, packing);
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
             Unpacked<Type>(row.outputs[0], begin, features, factors, 1), packing);
  }
  packing.finish();
}

// Rows longer than a block of queries sum their dk and dv in scratch memory.
int64_t backward_scratch(const RowShape& shape) {
  const int64_t n = shape.length, d = padded(shape.features), keys = padded(n);
  const int64_t queries = least(n, kQueries);
  return 2 * aligned(4 * n * d) + 2 * aligned(shape.features * keys) + 2 * aligned(queries * keys) +
         2 * aligned(n * d);
}

template <typename Type>
void backward_of(const RowShape& shape, const BackwardRow& row, float* memory) {
  const int64_t n = shape.length, features = shape.features;
  const int64_t width = padded(features), keys = padded(n), columns = whole_vectors(n);
  const int64_t used = whole_vectors(features), most = least(n, kQueries);
  Scratch scratch = {memory};
  float* packed[2] = {scratch.take(4 * n * width), scratch.take(4 * n * width)};
  float* k_transposed = scratch.take(features * keys);
  float* v_transposed = scratch.take(features * keys);
  float* p = scratch.take(most * keys);
  float* ds = scratch.take(most * keys);
  float* dk = scratch.take(n * width);
  float* dv = scratch.take(n * width);
  const float* first = packed[row.before % 2];
  const float *k = first + n * width, *v = k + n * width, *first_grad = v + n * width;
  if (row.before == 0) Packing<Type>(row.inputs, 4, nullptr, 0, shape, packed[0], width).finish();
  Packing<Type> packing(row.next, 4, row.outputs, most == n ? 3 : 0, shape,
                        packed[(row.before + 1) % 2], width);
  transpose(k, width, n, features, k_transposed, keys);
  transpose(v, width, n, features, v_transposed, keys);
  const Causal result = shape.causal ? Causal::kResult : Causal::kNo;
  const Causal lower = shape.causal ? Causal::kLower : Causal::kNo;
  const Causal transposed = shape.causal ? Causal::kTransposed : Causal::kNo;

  for (int64_t begin = 0; begin < n; begin += most) {
    const int64_t queries = least(most, n - begin);
    const float *q = first + begin * width, *grad = first_grad + begin * width;
    multiply(result, begin, {q, width, 1}, k_transposed, keys, queries, features, columns,
             Packed{p, keys}, packing);
    multiply(result, begin, {grad, width, 1}, v_transposed, keys, queries, features, columns,
             Packed{ds, keys}, packing);
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
             Unpacked<Type>(row.outputs[0], begin, features, nullptr, shape.scale), packing);
    const Factor p_transposed = {p, 1, keys}, ds_transposed = {ds, 1, keys};
    if (most == n) {
      multiply(transposed, 0, p_transposed, grad, width, n, n, used,
               Unpacked<Type>(row.outputs[2], 0, features, nullptr, 1), packing);
      multiply(transposed, 0, ds_transposed, q, width, n, n, used,
               Unpacked<Type>(row.outputs[1], 0, features, nullptr, 1), packing);
    } else {
      multiply(transposed, begin, p_transposed, grad, width, n, queries, used,
               Packed{dv, width, begin > 0}, packing);
      multiply(transposed, begin, ds_transposed, q, width, n, queries, used,
               Packed{dk, width, begin > 0}, packing);
    }
  }
  packing.finish();
  if (most < n) {
    unpack<Type>(dk, width, row.outputs[1], n, features);
    unpack<Type>(dv, width, row.outputs[2], n, features);
  }
}

void forward(const RowShape& shape, const ForwardRow& row, float* scratch) {
  switch (shape.type) {
    case RowType::kFloat32:
      return forward_of<Float32>(shape, row, scratch);
    case RowType::kFloat16:
      return forward_of<Float16>(shape, row, scratch);
    case RowType::kBFloat16:
      return forward_of<BFloat16>(shape, row, scratch);
  }
}

void backward(const RowShape& shape, const BackwardRow& row, float* scratch) {
  switch (shape.type) {
    case RowType::kFloat32:
      return backward_of<Float32>(shape, row, scratch);
    case RowType::kFloat16:
      return backward_of<Float16>(shape, row, scratch);
    case RowType::kBFloat16:
      return backward_of<BFloat16>(shape, row, scratch);
  }
}

}  // namespace

extern const RowKernels row_kernels = {forward_scratch, backward_scratch, forward, backward};

}  // namespace gcrl_kernels::LEVEL
