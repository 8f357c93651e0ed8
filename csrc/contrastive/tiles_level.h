// The kernels of one instruction set, included once by a file for each (see common/vectors_level.h
// and common/products_level.h for what that file defines).
//
// A tile's scores lie in scratch memory with the columns as lines: score(k, i) of column k and row
// i is scores[k * kLine + i], so that a vector holds rows.

#include "common/products_level.h"
#include "common/vectors_level.h"
#include "contrastive/tiles.h"

namespace gcrl_kernels::LEVEL {
namespace {

// An odd number of cache lines, so that a column of numbers does not fall on a few of them.
constexpr int64_t kLine = kMostAnchors + 16;
constexpr int64_t kDepth = 256;           // of a product whose panels stay in the cache
constexpr float kLeastNorm = 1e-12f;      // as in torch.nn.functional.normalize
constexpr float kOneExponential = 60;     // how far scores may lie apart in one exponential
constexpr float kOneExponentialLse = 80;  // and log-sum-exps
constexpr float kExcluded = -kInfinity;

inline float largest(const float* values, int64_t count) {
  float result = -kInfinity;
  for (int64_t i = 0; i < count; ++i) result = values[i] > result ? values[i] : result;
  return result;
}

inline float smallest(const float* values, int64_t count) {
  float result = kInfinity;
  for (int64_t i = 0; i < count; ++i) result = values[i] < result ? values[i] : result;
  return result;
}

inline Floats load(const float* data, int64_t count) { return load_part<Float32>(data, count); }

inline void store(float* data, Floats values, int64_t count) {
  store_part<Float32>(data, values, count);
}

// Where a product is added to [rows, features] in memory of any alignment: each tile's sum by
// itself first, so that its small terms are not rounded to what came before.
struct Added {
  float* data;
  int64_t stride, features;

  Added part(int64_t i, int64_t j) const { return {data + i * stride + j, stride, features - j}; }
  Floats before(int, int) const { return Floats{}; }
  void write(int i, int j, Floats values) const {
    float* at = data + i * stride + j * kLanes;
    const int64_t left = features - j * kLanes;
    store(at, load(at, left) + values, left);
  }
};

struct Nothing {
  void step(int64_t) const {}
};

// out[rows, columns] = left[rows, depth] right[depth, columns], columns in whole vectors.
template <typename Out>
void multiply(const Factor& left, const float* right, int64_t right_stride, int64_t rows,
              int64_t depth, int64_t columns, const Out& out) {
  const Nothing nothing;
  const int64_t blocks = (rows + TILE_ROWS - 1) / TILE_ROWS;
  constexpr int64_t kPanel = TILE_VECTORS * kLanes;
  for (int64_t j = 0; j < columns; j += kPanel) {
    for (int64_t block = 0; block < blocks; ++block) {
      const int64_t begin = rows * block / blocks, end = rows * (block + 1) / blocks;
      const Factor part = {left.data + begin * left.row, left.row, left.column};
      if (columns - j >= kPanel) {
        multiply_rows<TILE_VECTORS>(end - begin, part, right + j, right_stride, depth,
                                    out.part(begin, j), nothing);
      } else {
        for (int64_t v = j; v < columns; v += kLanes) {
          multiply_rows<1>(end - begin, part, right + v, right_stride, depth, out.part(begin, v),
                           nothing);
        }
      }
    }
  }
}

// The scratch memory of a tile.
struct Memory {
  float *transposed, *scores, *row_numbers[2], *column_numbers[2];

  Memory(const TileShape& shape, float* memory) {
    Scratch scratch = {memory};
    transposed = scratch.take(shape.features * kLine);
    scores = scratch.take(kMostAnchors * kLine);
    for (float*& numbers : row_numbers) numbers = scratch.take(kLine);
    for (float*& numbers : column_numbers) numbers = scratch.take(kLine);
  }
};

int64_t tile_scratch(const TileShape& shape) { return (shape.features + kMostAnchors + 4) * kLine; }

// Calls a function for each vector of scores, with the column, the first row and the score.
template <typename Function>
ALWAYS_INLINE void for_scores(const Side& rows, const Side& columns, float* scores,
                              const Function& function) {
  for (int64_t k = 0; k < columns.count; ++k) {
    for (int64_t i = 0; i < rows.count; i += kLanes) function(k, i, at(scores + k * kLine + i));
  }
}

void find_scores(const TileShape& shape, const Side& rows, const Side& columns,
                 const Memory& memory) {
  const int64_t lanes = whole_vectors(rows.count);
  transpose(rows.z, shape.width, rows.count, shape.features, memory.transposed, kLine);
  for (int64_t d = 0; d < shape.features; d += kDepth) {
    multiply({columns.z + d, shape.width, 1}, memory.transposed + d * kLine, kLine, columns.count,
             least(kDepth, shape.features - d), lanes, Packed{memory.scores, kLine, d > 0});
  }
  // Not one of the factors: the score of k and i is to be that of i and k, to the last bit.
  for_scores(rows, columns, memory.scores, [&](int64_t, int64_t, Floats& s) { s *= shape.scale; });
}

// Lanes of a column's vector of rows that are of its class, as a mask.
ALWAYS_INLINE Ints same_class(const int32_t* classes, int64_t count, int32_t other) {
  return (Ints)load((const float*)classes, count) == other;
}

// Adds the positives' scores to both sides' sums.
void add_positives(const Side& rows, const Side& columns, Diagonal diagonal, float* scores) {
  if (diagonal == Diagonal::kPartner && rows.positive != nullptr) {
    for (int64_t i = 0; i < rows.count; ++i) {
      rows.positive[i] += scores[i * kLine + i];
      columns.positive[i] += scores[i * kLine + i];
    }
  }
  if (rows.classes == nullptr || columns.classes == nullptr) return;
  if (diagonal == Diagonal::kSelf) {
    for (int64_t i = 0; i < rows.count; ++i) scores[i * kLine + i] = 0;
  }
  for (int64_t k = 0; k < columns.count; ++k) {
    Floats of_column = {};
    for (int64_t i = 0; i < rows.count; i += kLanes) {
      const int64_t left = rows.count - i;
      const Ints same = same_class(rows.classes + i, left, columns.classes[k]);
      const Floats score = same ? at(scores + k * kLine + i) : Floats{};
      store(rows.positive + i, load(rows.positive + i, left) + score, left);
      of_column += score;  // scores of rows beyond the last are 0
    }
    if (columns.positive != nullptr) columns.positive[k] += sum_of(of_column);
  }
}

void exclude(const TileShape& shape, const Side& rows, const Side& columns, Diagonal diagonal,
             float* scores) {
  const bool partner = diagonal == Diagonal::kPartner && !shape.partner_is_candidate;
  if (diagonal == Diagonal::kSelf || partner) {
    for (int64_t i = 0; i < rows.count; ++i) scores[i * kLine + i] = kExcluded;
  }
  const int64_t rest = rows.count % kLanes;
  if (rest == 0) return;
  for (int64_t k = 0; k < columns.count; ++k) {
    Floats& edge = at(scores + k * kLine + rows.count - rest);
    edge = lanes() < static_cast<int32_t>(rest) ? edge : Floats{} + kExcluded;
  }
}

// Adds sums part exp(high) to a side's.
void add_sums(const Side& side, const float* high, const float* part) {
  for (int64_t i = 0; i < side.count; i += kLanes) {
    const int64_t left = side.count - i;
    const Floats maximum = load(side.maximum + i, left), sum = load(side.sum + i, left);
    const Floats h = at(high + i), p = at(part + i);
    const Floats larger = h > maximum ? h : maximum;
    const Floats total = sum * exp(maximum - larger) + p * exp(h - larger);
    const Ints nothing = p == 0;  // no candidates: high may be out of all proportion
    store(side.maximum + i, nothing ? maximum : larger, left);
    store(side.sum + i, nothing ? sum : total, left);
  }
}

void forward(const TileShape& shape, const Side& rows, const Side& columns, Diagonal diagonal,
             float* scratch) {
  const Memory memory(shape, scratch);
  find_scores(shape, rows, columns, memory);
  Floats highest = at(memory.scores), lowest = highest;
  for_scores(rows, columns, memory.scores, [&](int64_t, int64_t, const Floats& s) {
    highest = s > highest ? s : highest;
    lowest = s < lowest ? s : lowest;
  });
  const float high = largest_of(highest), low = -largest_of(-lowest);
  add_positives(rows, columns, diagonal, memory.scores);
  exclude(shape, rows, columns, diagonal, memory.scores);

  float *row_high = memory.row_numbers[0], *row_part = memory.row_numbers[1];
  float *column_high = memory.column_numbers[0], *column_part = memory.column_numbers[1];
  const bool both = columns.sum != nullptr;
  const bool one_exponential = high - low <= kOneExponential;  // not if that is NaN
  for (int64_t i = 0; i < rows.count; i += kLanes) {
    at(row_part + i) = Floats{};
    at(row_high + i) = Floats{} + (one_exponential ? high : -kInfinity);
  }
  if (one_exponential) {
    for (int64_t k = 0; k < columns.count; ++k) {
      Floats total = {};
      for (int64_t i = 0; i < rows.count; i += kLanes) {
        const Floats e = exp(at(memory.scores + k * kLine + i) - high);
        at(row_part + i) += e;
        total += e;
      }
      column_high[k] = high;
      column_part[k] = sum_of(total);
    }
  } else {
    for (int64_t k = 0; k < columns.count; ++k) {
      Floats most = Floats{} - kInfinity;
      for (int64_t i = 0; i < rows.count; i += kLanes) {
        const Floats s = at(memory.scores + k * kLine + i);
        at(row_high + i) = s > at(row_high + i) ? s : at(row_high + i);
        most = s > most ? s : most;
      }
      const float column = largest_of(most);
      column_high[k] = column == -kInfinity ? 0 : column;
    }
    for (int64_t i = 0; i < rows.count; i += kLanes) {
      at(row_high + i) = at(row_high + i) == -kInfinity ? Floats{} : at(row_high + i);
    }
    for (int64_t k = 0; k < columns.count; ++k) {
      Floats total = {};
      for (int64_t i = 0; i < rows.count; i += kLanes) {
        const Floats s = at(memory.scores + k * kLine + i);
        at(row_part + i) += exp(s - at(row_high + i));
        if (both) total += exp(s - column_high[k]);
      }
      column_part[k] = sum_of(total);
    }
  }
  add_sums(rows, row_high, row_part);
  if (both) add_sums(columns, column_high, column_part);
}

// Subtracts the positives' part from the weights; clears those of who is no candidate.
void complete_weights(const TileShape& shape, const Side& rows, const Side& columns,
                      Diagonal diagonal, float* weights) {
  if (rows.classes != nullptr && columns.classes != nullptr) {
    for_scores(rows, columns, weights, [&](int64_t k, int64_t i, Floats& w) {
      const int64_t left = rows.count - i;
      const Ints same = same_class(rows.classes + i, left, columns.classes[k]);
      w -= same ? load(rows.push + i, left) + columns.push[k] : Floats{};
    });
  }
  if (diagonal == Diagonal::kNone) return;
  const bool partner = diagonal == Diagonal::kPartner;
  for (int64_t i = 0; i < rows.count; ++i) {
    float& w = weights[i * kLine + i];
    if (!partner || !shape.partner_is_candidate) w = 0;
    if (partner && rows.push != nullptr) w -= rows.push[i] + columns.push[i];
  }
}

// exp(score - lse) for rows from i on.
ALWAYS_INLINE Floats probability(const Side& side, int64_t i, Floats score) {
  const int64_t left = side.count - i;
  Floats difference = score - load(side.lse + i, left);
  if (side.lse_residual != nullptr) difference -= load(side.lse_residual + i, left);
  return exp(difference);
}

// pull exp(h - lse) of each of a side.
void scale_pulls(const Side& side, float h, float* pulls) {
  for (int64_t i = 0; i < side.count; i += kLanes) {
    at(pulls + i) = load(side.pull + i, side.count - i) * probability(side, i, Floats{} + h);
  }
}

// Scores to weights W, in place.
void weigh(const Side& rows, const Side& columns, const Memory& memory) {
  const bool both = columns.lse != nullptr;
  float high = largest(rows.lse, rows.count), low = smallest(rows.lse, rows.count);
  if (both) {
    const float column_high = largest(columns.lse, columns.count);
    const float column_low = smallest(columns.lse, columns.count);
    high = column_high > high ? column_high : high;
    low = column_low < low ? column_low : low;
  }
  if (high - low <= kOneExponentialLse) {
    const float middle = low + (high - low) / 2;
    float *row_pull = memory.row_numbers[0], *column_pull = memory.column_numbers[0];
    scale_pulls(rows, middle, row_pull);
    if (both) scale_pulls(columns, middle, column_pull);
    for_scores(rows, columns, memory.scores, [&](int64_t k, int64_t i, Floats& s) {
      s = exp(s - middle) * (at(row_pull + i) + (both ? column_pull[k] : 0));
    });
    return;
  }
  for_scores(rows, columns, memory.scores, [&](int64_t k, int64_t i, Floats& s) {
    Floats w = load(rows.pull + i, rows.count - i) * probability(rows, i, s);
    if (both) {
      const float rest = columns.lse_residual == nullptr ? 0 : columns.lse_residual[k];
      w += columns.pull[k] * exp((s - columns.lse[k]) - rest);
    }
    s = w;
  });
}

void backward(const TileShape& shape, const Side& rows, const Side& columns, Diagonal diagonal,
              float* scratch) {
  const Memory memory(shape, scratch);
  find_scores(shape, rows, columns, memory);
  weigh(rows, columns, memory);
  complete_weights(shape, rows, columns, diagonal, memory.scores);
  const int64_t features = shape.features, vectors = whole_vectors(features);
  multiply({memory.scores, 1, kLine}, columns.z, shape.width, rows.count, columns.count, vectors,
           Added{rows.gradient, features, features});
  if (columns.gradient == nullptr) return;
  multiply({memory.scores, kLine, 1}, rows.z, shape.width, columns.count, rows.count, vectors,
           Added{columns.gradient, features, features});
}

template <typename Type>
void pack_of(const Embeddings& embeddings, const void* rows, int64_t stride, int64_t count,
             float* z, float* norms) {
  const auto* data = static_cast<const typename Type::Element*>(rows);
  const int64_t features = embeddings.features, width = embeddings.width;
  for (int64_t i = 0; i < count; ++i, data += stride, z += width) {
    pack<Type>(data, features, 1, z, width);
    Floats squares = {};
    for (int64_t d = 0; d < width; d += kLanes) squares += at(z + d) * at(z + d);
    norms[i] = __builtin_sqrtf(sum_of(squares));
    if (!embeddings.normalize) continue;
    const float divisor = norms[i] < kLeastNorm ? kLeastNorm : norms[i];
    for (int64_t d = 0; d < width; d += kLanes) at(z + d) /= divisor;
  }
}

inline float dot(const float* z, const float* gradient, int64_t features) {
  Floats sum = {};
  for (int64_t d = 0; d < features; d += kLanes)
    sum += at(z + d) * load(gradient + d, features - d);
  return sum_of(sum);
}

void dots(const TileShape& shape, const Side& rows, float* result) {
  for (int64_t i = 0; i < rows.count; ++i) {
    result[i] = dot(rows.z + i * shape.width, rows.gradient + i * shape.features, shape.features);
  }
}

template <typename Type>
void finish_of(const Embeddings& embeddings, float scale, const Side& rows, const float* norms,
               void* out) {
  auto* to = static_cast<typename Type::Element*>(out);
  const int64_t features = embeddings.features;
  for (int64_t i = 0; i < rows.count; ++i, to += features) {
    const float* z = rows.z + i * embeddings.width;
    const float* gradient = rows.gradient + i * features;
    float factor = scale, radial = 0;
    if (embeddings.normalize) {
      const bool inside = norms[i] < kLeastNorm;  // such a row was divided by the constant
      factor = scale / (inside ? kLeastNorm : norms[i]);
      radial = inside ? 0 : dot(z, gradient, features);
    }
    for (int64_t d = 0; d < features; d += kLanes) {
      const Floats g = load(gradient + d, features - d);
      store_part<Type>(to + d, (g - at(z + d) * radial) * factor, features - d);
    }
  }
}

void pack_rows(const Embeddings& embeddings, const void* rows, int64_t stride, int64_t count,
               float* z, float* norms) {
  switch (embeddings.type) {
    case ElementType::kFloat32:
      return pack_of<Float32>(embeddings, rows, stride, count, z, norms);
    case ElementType::kFloat16:
      return pack_of<Float16>(embeddings, rows, stride, count, z, norms);
    case ElementType::kBFloat16:
      return pack_of<BFloat16>(embeddings, rows, stride, count, z, norms);
  }
}

void finish(const Embeddings& embeddings, float scale, const Side& rows, const float* norms,
            void* out) {
  switch (embeddings.type) {
    case ElementType::kFloat32:
      return finish_of<Float32>(embeddings, scale, rows, norms, out);
    case ElementType::kFloat16:
      return finish_of<Float16>(embeddings, scale, rows, norms, out);
    case ElementType::kBFloat16:
      return finish_of<BFloat16>(embeddings, scale, rows, norms, out);
  }
}

}  // namespace

extern const TileKernels tile_kernels = {pack_rows, tile_scratch, forward, backward, dots, finish};

}  // namespace gcrl_kernels::LEVEL
