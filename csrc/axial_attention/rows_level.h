// The kernels of one instruction set, included once by a file for each (see common/vectors_level.h
// and common/products_level.h for what that file defines).
//
// A row's tensors are brought into scratch memory as float32, so that strides and dtypes end there;
// every product is then one function, with the left factor broadcast and the right one in vectors.

#include "axial_attention/rows.h"
#include "common/products_level.h"
#include "common/vectors_level.h"

namespace gcrl_kernels::LEVEL {
namespace {

constexpr int64_t kQueries = 64;  // whose scores are in scratch memory at a time

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

// Where a product goes: straight to positions of a row, times a factor for each or one for all.
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
    for (int64_t j = 0; j < keys; j += kLanes) {
      const Floats may = at(allowed + j);
      at(scores + j) = may < 0 ? may : at(scores + j);
    }
  }
  const Floats nothing = Floats{} - kInfinity;
  if (keys % kLanes != 0) {
    Floats& edge = at(scores + keys / kLanes * kLanes);
    edge = lanes() < static_cast<int32_t>(keys % kLanes) ? edge : nothing;
  }
  for (int64_t j = whole_vectors(keys); j < columns; j += kLanes) at(scores + j) = nothing;
}

// Zeros for the packed keys and values that are masked: zero times what is not finite is NaN.
void clear_masked(const float* allowed, int64_t length, int64_t width, float* k, float* v) {
  if (allowed == nullptr) return;
  for (int64_t i = 0; i < length; ++i) {
    if (allowed[i] == 0) continue;
    for (int64_t d = 0; d < width; d += kLanes) {
      at(k + i * width + d) = at(v + i * width + d) = Floats{};
    }
  }
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
  float* q = packed[row.before % 2];
  float *k = q + n * width, *v = k + n * width;
  if (row.before == 0) Packing<Type>(row.inputs, 3, nullptr, 0, shape, packed[0], width).finish();
  clear_masked(row.allowed, n, width, k, v);
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
      const float log_sum = __builtin_logf(sum), lse = maximum + log_sum;
      const float residual = (maximum - lse) + log_sum;
      row.lse[query * row.lse_stride] = lse;
      row.lse_residual[query * row.lse_stride] = is_finite(residual) ? residual : 0;
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
  float* first = packed[row.before % 2];
  float *k = first + n * width, *v = k + n * width, *first_grad = v + n * width;
  if (row.before == 0) Packing<Type>(row.inputs, 4, nullptr, 0, shape, packed[0], width).finish();
  clear_masked(row.allowed, n, width, k, v);
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
      const float residual = row.lse_residual[query * row.lse_stride];
      Floats dot = {};
      for (int64_t j = 0; j < allowed_keys; j += kLanes) {
        at(p_row + j) = exp((at(p_row + j) - shift) - residual);
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
    case ElementType::kFloat32:
      return forward_of<Float32>(shape, row, scratch);
    case ElementType::kFloat16:
      return forward_of<Float16>(shape, row, scratch);
    case ElementType::kBFloat16:
      return forward_of<BFloat16>(shape, row, scratch);
  }
}

void backward(const RowShape& shape, const BackwardRow& row, float* scratch) {
  switch (shape.type) {
    case ElementType::kFloat32:
      return backward_of<Float32>(shape, row, scratch);
    case ElementType::kFloat16:
      return backward_of<Float16>(shape, row, scratch);
    case ElementType::kBFloat16:
      return backward_of<BFloat16>(shape, row, scratch);
  }
}

}  // namespace

extern const RowKernels row_kernels = {forward_scratch, backward_scratch, forward, backward};

}  // namespace gcrl_kernels::LEVEL
