#pragma once

#include <stdint.h>

#include "common/element_type.h"

namespace gcrl_kernels {

constexpr int64_t kMostAnchors = 128;  // on a side of a tile

// Rows of a tensor [count, features] and, packed to float32, [count, width]: the embeddings.
struct Embeddings {
  ElementType type;
  int64_t features, width;
  bool normalize;
};

// Who meets on the main diagonal of a tile: nobody in particular, each with itself, or each with
// its partner, which is its positive.
enum class Diagonal { kNone, kSelf, kPartner };

// What the tiles of a call have in common.
struct TileShape {
  int64_t features, width;
  float scale;
  bool partner_is_candidate;
};

// One side of a tile: anchors, or what they are compared with, from the first one on. A pointer
// that is null is of no concern to that side.
struct Side {
  const float* z;  // [count, width], whole vectors with zeros after the features
  int64_t count;
  const int32_t* classes;  // whose equals are positives

  // Forward, of the candidates so far: Σ exp(score) = sum exp(maximum); Σ of the positives' scores.
  float *maximum, *sum, *positive;

  // Backward: log-sum-exps and, unless null, what their rounding lost; the weights of
  // exp(score - lse) and of the positives; Σ_k W_ik z_k, in [count, features].
  const float *lse, *lse_residual, *pull, *push;
  float* gradient;
};

// One instruction set's kernels. They work in float32, in scratch memory that is aligned to 64
// bytes and belongs to one thread. A tile is all of one side's rows against all of the other's;
// `columns` without sums or gradient takes no part but as what the rows are compared with.
struct TileKernels {
  // Packs rows that lie `stride` apart, and tells their norms.
  void (*pack)(const Embeddings& embeddings, const void* rows, int64_t stride, int64_t count,
               float* z, float* norms);
  int64_t (*scratch)(const TileShape& shape);  // in floats
  void (*forward)(const TileShape& shape, const Side& rows, const Side& columns, Diagonal diagonal,
                  float* scratch);
  void (*backward)(const TileShape& shape, const Side& rows, const Side& columns, Diagonal diagonal,
                   float* scratch);
  // Each row's z · gradient.
  void (*dots)(const TileShape& shape, const Side& rows, float* dots);
  // From Σ_k W_ik z_k to the gradient of the rows as they were given, contiguous in their dtype;
  // in place where that is float32.
  void (*finish)(const Embeddings& embeddings, float scale, const Side& rows, const float* norms,
                 void* out);
};

namespace portable {
extern const TileKernels tile_kernels;
}
namespace avx2 {
extern const TileKernels tile_kernels;
}
namespace avx512 {
extern const TileKernels tile_kernels;
}

}  // namespace gcrl_kernels
