#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <optional>
#include <vector>

#include "common/cpu_level.h"
#include "common/scratch.h"
#include "common/tensors.h"
#include "contrastive/schedule.h"
#include "contrastive/tiles.h"

namespace gcrl_kernels {
namespace {

using torch::stable::Tensor;

constexpr int64_t kFewestAnchors = 32;  // on a side of a tile, where there are enough
constexpr int64_t kNumbersWorthAThread = 1 << 14;

// Who is a candidate of an anchor, of those of its own batch.
enum Candidates : int64_t { kOthers, kNegatives, kOtherHalf };

const TileKernels& tile_kernels() {
#if defined(__x86_64__)
  if (cpu_level() == CpuLevel::kAvx512) return avx512::tile_kernels;
  if (cpu_level() == CpuLevel::kAvx2) return avx2::tile_kernels;
#endif
  return portable::tile_kernels;
}

float scale_of(const std::optional<Tensor>& scale, double value) {
  return scale ? *scale->const_data_ptr<float>() : static_cast<float>(value);
}

// Embeddings as the tiles take them: [count, width] in float32, normalised where that is asked for.
class Packed {
 public:
  Packed(const Embeddings& embeddings, int64_t count)
      : embeddings_(embeddings), z_(count * embeddings.width), norms_(count) {}

  // The rows of a tensor from place `begin` on.
  void take(const Tensor& tensor, int64_t begin) {
    const char* data = static_cast<const char*>(tensor.const_data_ptr());
    const int64_t stride = tensor.stride(0), element = tensor.element_size();
    const int64_t grain = std::max<int64_t>(1, kNumbersWorthAThread / embeddings_.features);
    torch::stable::parallel_for(0, tensor.size(0), grain, [&](int64_t from, int64_t to) {
      tile_kernels().pack(embeddings_, data + from * stride * element, stride, to - from,
                          z(begin + from), norms(begin + from));
    });
  }

  float* z(int64_t row) const { return z_.data() + row * embeddings_.width; }
  float* norms(int64_t row) const { return norms_.data() + row; }

 private:
  Embeddings embeddings_;
  Scratch z_, norms_;
};

Embeddings embeddings_of(const Tensor& tensor, bool normalize) {
  const int64_t features = tensor.size(1), lines = (features + 15) / 16;
  // An odd number of cache lines, so that a column of them does not fall on a few.
  return {element_type(tensor, "z0"), features, (lines | 1) * 16, normalize};
}

// A call's threads, each with its scratch memory for tiles.
class Workers {
 public:
  explicit Workers(const TileShape& shape)
      : count_(torch::stable::get_num_threads()),
        floats_((tile_kernels().scratch(shape) + 15) / 16 * 16),
        scratch_(count_ * floats_) {}

  // Calls a function for 0 to count - 1, with scratch memory; those with one remainder in turn.
  template <typename Function>
  void run(int64_t count, const Function& function) const {
    torch::stable::parallel_for(0, std::min(count_, count), 1, [&](int64_t begin, int64_t end) {
      for (int64_t worker = begin; worker < end; ++worker) {
        for (int64_t i = worker; i < count; i += count_) {
          function(i, scratch_.data() + worker * floats_);
        }
      }
    });
  }

  // Anchors a block, so that every worker has a meeting in each round.
  int64_t block_size(int64_t rows) const {
    const int64_t wanted = (rows / (2 * count_) + 15) / 16 * 16;
    return std::clamp(wanted, kFewestAnchors, kMostAnchors);
  }

 private:
  int64_t count_, floats_;
  Scratch scratch_;
};

// The batch of one process: its rows, its blocks and who meets whom.
class Batch {
 public:
  Batch(const Tensor& z0, const std::optional<Tensor>& z1, const std::optional<Tensor>& negatives,
        const std::optional<Tensor>& classes, int64_t candidates, bool normalize, float scale)
      : embeddings_(embeddings_of(z0, normalize)),
        shape_({embeddings_.features, embeddings_.width, scale, candidates != kNegatives}),
        first_(z0.size(0)),
        count_(z1 ? 2 * first_ : first_),
        workers_(shape_),
        packed_(embeddings_, count_),
        negatives_(embeddings_, negatives ? negatives->size(0) : 0),
        classes_(classes ? classes->const_data_ptr<int32_t>() : nullptr) {
    packed_.take(z0, 0);
    const int64_t size = workers_.block_size(count_);
    blocks_ = blocks_of(0, first_, size);
    if (z1) {
      packed_.take(*z1, first_);
      for (const Block& block : blocks_of(first_, count_, size)) blocks_.push_back(block);
    }
    if (negatives) {
      negatives_.take(*negatives, 0);
      further_ = blocks_of(0, negatives->size(0), size);
    }
    const int64_t blocks = blocks_.size(), half = blocks / 2;
    rounds_ = candidates == kOtherHalf ? both_halves(half) : everybody(blocks, z1 ? half : 0);
  }

  const Embeddings& embeddings() const { return embeddings_; }
  const TileShape& shape() const { return shape_; }
  const Workers& workers() const { return workers_; }
  int64_t first() const { return first_; }
  int64_t count() const { return count_; }
  const std::vector<Block>& blocks() const { return blocks_; }
  const float* norms(int64_t row) const { return packed_.norms(row); }

  Side side(const Block& block) const {
    Side side = {};
    side.z = packed_.z(block.begin);
    side.count = block.count;
    side.classes = classes_ == nullptr ? nullptr : classes_ + block.begin;
    return side;
  }

  // Calls a tile's function for all meetings of anchors, whose sides `complete` makes of a block
  // and of whether it takes part, and not only as what the rows are compared with.
  template <typename Tile, typename Complete>
  void meet(Tile tile, const Complete& complete) const {
    for (const Round& round : rounds_) {
      workers_.run(round.size(), [&](int64_t i, float* scratch) {
        const Meeting& meeting = round[i];
        const bool both = meeting.diagonal != Diagonal::kSelf;
        tile(shape_, complete(blocks_[meeting.rows], true),
             complete(blocks_[meeting.columns], both), meeting.diagonal, scratch);
      });
    }
  }

  // And for all meetings of anchors with further negatives.
  template <typename Tile, typename Complete>
  void meet_negatives(Tile tile, const Complete& complete) const {
    if (further_.empty()) return;
    workers_.run(blocks_.size(), [&](int64_t i, float* scratch) {
      for (const Block& block : further_) {
        Side columns = {};
        columns.z = negatives_.z(block.begin);
        columns.count = block.count;
        tile(shape_, complete(blocks_[i], true), columns, Diagonal::kNone, scratch);
      }
    });
  }

 private:
  Embeddings embeddings_;
  TileShape shape_;
  int64_t first_, count_;
  Workers workers_;
  Packed packed_, negatives_;
  const int32_t* classes_;
  std::vector<Block> blocks_, further_;
  std::vector<Round> rounds_;
};

// Sums of exponentials, of nothing at first.
struct Sums {
  explicit Sums(int64_t count)
      : maximum(count, -std::numeric_limits<float>::infinity()), sum(count), positive(count) {}

  Side of(Side side, int64_t row) {
    side.maximum = &maximum[row];
    side.sum = &sum[row];
    side.positive = &positive[row];
    return side;
  }
  double lse(int64_t row) const { return maximum[row] + std::log(double{sum[row]}); }

  // To [2, count]: rounded, and what that lost.
  void write_lse(int64_t row, float* to) const {
    const double exact = lse(row);
    const float rounded = to[row] = static_cast<float>(exact);
    to[maximum.size() + row] = std::isfinite(exact) ? static_cast<float>(exact - rounded) : 0;
  }

  std::vector<float> maximum, sum, positive;
};

void forward(const Tensor z0, std::optional<Tensor> z1, std::optional<Tensor> negatives,
             std::optional<Tensor> classes, std::optional<Tensor> share,
             std::optional<Tensor> scale, double scale_value, int64_t candidates, bool normalize,
             const Tensor losses, const Tensor lse) {
  const Batch batch(z0, z1, negatives, classes, candidates, normalize,
                    scale_of(scale, scale_value));
  Sums sums(batch.count());
  const auto side = [&](const Block& block, bool takes_part) {
    const Side side = batch.side(block);
    return takes_part ? sums.of(side, block.begin) : side;
  };
  batch.meet(tile_kernels().forward, side);
  batch.meet_negatives(tile_kernels().forward, side);
  const float* shares = share ? share->const_data_ptr<float>() : nullptr;
  float *to_losses = losses.mutable_data_ptr<float>(), *to_lse = lse.mutable_data_ptr<float>();
  for (int64_t i = 0; i < batch.count(); ++i) {
    const double exact = sums.lse(i), part = shares == nullptr ? 1 : shares[i];
    sums.write_lse(i, to_lse);
    to_losses[i] = part == 0 ? 0 : static_cast<float>(exact - sums.positive[i] * part);
  }
}

// Σ_k W_ik z_k of a batch's rows, at first zeros: in the gradients' own memory where that is
// float32.
class Gradients {
 public:
  Gradients(const Batch& batch, const Tensor& dz0, const std::optional<Tensor>& dz1)
      : batch_(batch),
        features_(batch.embeddings().features),
        element_(dz0.element_size()),
        first_(static_cast<char*>(dz0.mutable_data_ptr())),
        second_(dz1 ? static_cast<char*>(dz1->mutable_data_ptr()) : nullptr),
        widened_(in_place() ? 0 : batch.count() * features_) {
    for (const Block& block : batch.blocks()) {
      std::fill_n(sums(block.begin), block.count * features_, 0.0f);
    }
  }

  float* sums(int64_t row) const {
    return in_place() ? static_cast<float*>(out(row)) : widened_.data() + row * features_;
  }

  // The gradients themselves.
  void finish() const {
    batch_.workers().run(batch_.blocks().size(), [&](int64_t i, float*) {
      const Block& block = batch_.blocks()[i];
      Side side = batch_.side(block);
      side.gradient = sums(block.begin);
      tile_kernels().finish(batch_.embeddings(), batch_.shape().scale, side,
                            batch_.norms(block.begin), out(block.begin));
    });
  }

  // Σ_i z_i · Σ_k W_ik z_k
  double dot() const {
    std::vector<float> dots(batch_.count());
    batch_.workers().run(batch_.blocks().size(), [&](int64_t i, float*) {
      const Block& block = batch_.blocks()[i];
      Side side = batch_.side(block);
      side.gradient = sums(block.begin);
      tile_kernels().dots(batch_.shape(), side, &dots[block.begin]);
    });
    double sum = 0;
    for (const float value : dots) sum += value;
    return sum;
  }

 private:
  bool in_place() const { return batch_.embeddings().type == ElementType::kFloat32; }
  void* out(int64_t row) const {
    const int64_t first = batch_.first();
    char* data = row < first ? first_ : second_;
    return data + (row < first ? row : row - first) * features_ * element_;
  }

  const Batch& batch_;
  int64_t features_, element_;
  char *first_, *second_;
  Scratch widened_;
};

void backward(const Tensor grad, const Tensor z0, std::optional<Tensor> z1,
              std::optional<Tensor> negatives, std::optional<Tensor> classes,
              std::optional<Tensor> share, std::optional<Tensor> scale, const Tensor lse,
              double scale_value, int64_t candidates, bool normalize, const Tensor dz0,
              std::optional<Tensor> dz1, const Tensor dscale) {
  const Batch batch(z0, z1, negatives, classes, candidates, normalize,
                    scale_of(scale, scale_value));
  const float* upstream = grad.const_data_ptr<float>();
  const float* shares = share ? share->const_data_ptr<float>() : nullptr;
  std::vector<float> pull(upstream, upstream + batch.count()), push = pull;
  for (int64_t i = 0; shares != nullptr && i < batch.count(); ++i) {
    push[i] *= shares[i];
    if (shares[i] == 0) pull[i] = 0;
  }
  const Gradients gradients(batch, dz0, dz1);
  const auto side = [&](const Block& block, bool takes_part) {
    Side side = batch.side(block);
    side.lse = lse.const_data_ptr<float>() + block.begin;
    side.lse_residual = side.lse + batch.count();
    side.pull = &pull[block.begin];
    side.push = &push[block.begin];
    side.gradient = takes_part ? gradients.sums(block.begin) : nullptr;
    return side;
  };
  batch.meet(tile_kernels().backward, side);
  // Every pair is in the sum twice, but for those with further negatives.
  double dot = gradients.dot() / 2;
  if (negatives) {
    batch.meet_negatives(tile_kernels().backward, side);
    dot = gradients.dot() - dot;
  }
  *dscale.mutable_data_ptr<float>() = static_cast<float>(dot);
  gradients.finish();
}

// Rows of one process against columns of one or all, where the rows' own begin at `diagonal`, or
// nowhere if that is negative.
class Blocks {
 public:
  Blocks(const Tensor& rows, const Tensor& columns, float scale, int64_t candidates,
         int64_t diagonal)
      : embeddings_(embeddings_of(rows, false)),
        shape_({embeddings_.features, embeddings_.width, scale, candidates != kNegatives}),
        workers_(shape_),
        rows_(embeddings_, rows.size(0)),
        columns_(embeddings_, columns.size(0)) {
    const int64_t count = rows.size(0), others = columns.size(0);
    STD_TORCH_CHECK(diagonal < 0 || (candidates != kOtherHalf && diagonal + count <= others),
                    "diagonal: expected columns for all rows, got ", diagonal);
    rows_.take(rows, 0);
    columns_.take(columns, 0);
    const int64_t size = workers_.block_size(count);
    // Halves, so that partners lie on a tile's diagonal.
    const int64_t half = candidates == kNegatives && diagonal >= 0 ? count / 2 : count;
    for (int64_t begin = 0; begin < count; begin += half) {
      for (const Block& block : blocks_of(begin, begin + half, size)) row_blocks_.push_back(block);
    }
    half_ = half < count ? row_blocks_.size() / 2 : 0;
    const int64_t before = std::max<int64_t>(diagonal, 0);
    column_blocks_ = blocks_of(0, before, size);
    own_ = column_blocks_.size();
    if (diagonal < 0) {
      own_ = -1 - static_cast<int64_t>(row_blocks_.size());  // no block's number
    } else {
      for (const Block& block : row_blocks_) {
        column_blocks_.push_back({diagonal + block.begin, block.count});
      }
    }
    const int64_t after = diagonal < 0 ? 0 : diagonal + count;
    for (const Block& block : blocks_of(after, others, size)) column_blocks_.push_back(block);
  }

  const Embeddings& embeddings() const { return embeddings_; }
  float* z(int64_t row) const { return rows_.z(row); }
  float* norms(int64_t row) const { return rows_.norms(row); }

  // Calls a tile's function for all blocks of rows and columns, then another for a block of rows.
  template <typename Tile, typename Rows, typename Columns, typename Finish>
  void meet(Tile tile, const Rows& rows, const Columns& columns, const Finish& finish) const {
    workers_.run(row_blocks_.size(), [&](int64_t i, float* scratch) {
      Side side = {};
      side.z = rows_.z(row_blocks_[i].begin);
      side.count = row_blocks_[i].count;
      rows(row_blocks_[i], side);
      for (int64_t j = 0; j < static_cast<int64_t>(column_blocks_.size()); ++j) {
        Side other = {};
        other.z = columns_.z(column_blocks_[j].begin);
        other.count = column_blocks_[j].count;
        columns(column_blocks_[j], other);
        tile(shape_, side, other, diagonal(i, j), scratch);
      }
      finish(row_blocks_[i], side);
    });
  }

  const TileShape& shape() const { return shape_; }

 private:
  Diagonal diagonal(int64_t row_block, int64_t column_block) const {
    if (column_block == own_ + row_block) return Diagonal::kSelf;
    const bool partner = half_ > 0 && std::abs(column_block - own_ - row_block) == half_ &&
                         column_block >= own_ && column_block < own_ + 2 * half_;
    return partner ? Diagonal::kPartner : Diagonal::kNone;
  }

  Embeddings embeddings_;
  TileShape shape_;
  Workers workers_;
  Packed rows_, columns_;
  std::vector<Block> row_blocks_, column_blocks_;
  int64_t half_, own_;
};

void block_lse(const Tensor rows, const Tensor columns, std::optional<Tensor> scale,
               double scale_value, int64_t candidates, int64_t diagonal, const Tensor lse) {
  const Blocks blocks(rows, columns, scale_of(scale, scale_value), candidates, diagonal);
  Sums sums(rows.size(0));
  float* to = lse.mutable_data_ptr<float>();
  blocks.meet(
      tile_kernels().forward,
      [&](const Block& block, Side& side) {
        side = sums.of(side, block.begin);
        side.positive = nullptr;
      },
      [](const Block&, Side&) {},
      [&](const Block& block, const Side&) {
        for (int64_t i = block.begin; i < block.begin + block.count; ++i) sums.write_lse(i, to);
      });
}

void block_gradient(const Tensor rows, const Tensor row_lse, const Tensor row_grad,
                    const Tensor columns, std::optional<Tensor> column_lse,
                    std::optional<Tensor> column_grad, std::optional<Tensor> scale,
                    double scale_value, int64_t candidates, int64_t diagonal, const Tensor drows,
                    const Tensor dscale) {
  const Blocks blocks(rows, columns, scale_of(scale, scale_value), candidates, diagonal);
  const int64_t features = rows.size(1);
  std::vector<float> dots(rows.size(0));
  float* out = drows.mutable_data_ptr<float>();
  blocks.meet(
      tile_kernels().backward,
      [&](const Block& block, Side& side) {
        side.lse = row_lse.const_data_ptr<float>() + block.begin;
        side.lse_residual = side.lse + rows.size(0);
        side.pull = row_grad.const_data_ptr<float>() + block.begin;
        side.gradient = out + block.begin * features;
        std::fill_n(side.gradient, block.count * features, 0.0f);
      },
      [&](const Block& block, Side& side) {
        if (!column_lse || !column_grad) return;
        side.lse = column_lse->const_data_ptr<float>() + block.begin;
        side.lse_residual = side.lse + columns.size(0);
        side.pull = column_grad->const_data_ptr<float>() + block.begin;
      },
      [&](const Block& block, const Side& side) {
        tile_kernels().dots(blocks.shape(), side, &dots[block.begin]);
        tile_kernels().finish(blocks.embeddings(), blocks.shape().scale, side,
                              blocks.norms(block.begin), side.gradient);
      });
  double sum = 0;
  for (const float value : dots) sum += value;
  *dscale.mutable_data_ptr<float>() = static_cast<float>(column_lse ? sum / 2 : sum);
}

}  // namespace
}  // namespace gcrl_kernels

STABLE_TORCH_LIBRARY_FRAGMENT(gcrl_kernels_cpu, library) {
  library.def(
      "contrast(Tensor z0, Tensor? z1, Tensor? negatives, Tensor? classes, Tensor? share, "
      "Tensor? scale, float scale_value, int candidates, bool normalize, Tensor(a!) losses, "
      "Tensor(b!) lse) -> ()");
  library.def(
      "contrast_backward(Tensor grad, Tensor z0, Tensor? z1, Tensor? negatives, Tensor? classes, "
      "Tensor? share, Tensor? scale, Tensor lse, float scale_value, int candidates, "
      "bool normalize, Tensor(a!) dz0, Tensor(b!)? dz1, Tensor(c!) dscale) -> ()");
  library.def(
      "contrast_block_lse(Tensor rows, Tensor columns, Tensor? scale, float scale_value, "
      "int candidates, int diagonal, Tensor(a!) lse) -> ()");
  library.def(
      "contrast_block_gradient(Tensor rows, Tensor row_lse, Tensor row_grad, Tensor columns, "
      "Tensor? column_lse, Tensor? column_grad, Tensor? scale, float scale_value, "
      "int candidates, int diagonal, Tensor(a!) drows, Tensor(b!) dscale) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(gcrl_kernels_cpu, CPU, library) {
  library.impl("contrast", TORCH_BOX(&gcrl_kernels::forward));
  library.impl("contrast_backward", TORCH_BOX(&gcrl_kernels::backward));
  library.impl("contrast_block_lse", TORCH_BOX(&gcrl_kernels::block_lse));
  library.impl("contrast_block_gradient", TORCH_BOX(&gcrl_kernels::block_gradient));
}
