#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <limits>
#include <optional>

#include "common/cuda_launch.h"
#include "common/tensors.h"
#include "contrastive/backward.cuh"
#include "contrastive/forward.cuh"

namespace gcrl_kernels::contrastive {
namespace {

using torch::headeronly::BFloat16;
using torch::headeronly::Half;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t kMostFeatures = 1 << 20;

unsigned blocks_for(int64_t items, int64_t each) {
  const int64_t blocks = (items + each - 1) / each;
  STD_TORCH_CHECK(blocks <= std::numeric_limits<int32_t>::max(),
                  "expected fewer embeddings than 2^31 blocks take, got ", items);
  return static_cast<unsigned>(blocks);
}

void check_rows(const Tensor& tensor, const char* name, const Tensor& like) {
  STD_TORCH_CHECK(like.dim() == 2, name, ": expected two dimensions");
  check_same_device(tensor, name, like);
  STD_TORCH_CHECK(tensor.scalar_type() == like.scalar_type(), name, ": unexpected dtype");
  STD_TORCH_CHECK(tensor.dim() == 2 && tensor.size(1) == like.size(1), name,
                  ": expected two dimensions and ", like.size(1), " features");
  STD_TORCH_CHECK(tensor.size(1) >= 1 && tensor.size(1) <= kMostFeatures, name, ": expected 1 to ",
                  kMostFeatures, " features");
  STD_TORCH_CHECK(tensor.size(1) == 1 || tensor.stride(1) == 1, name,
                  ": expected features side by side");
}

void check_gradient(const Tensor& tensor, const char* name, const Tensor& rows) {
  check_rows(tensor, name, rows);
  check_contiguous(tensor, name);
  STD_TORCH_CHECK(tensor.size(0) == rows.size(0), name, ": expected ", rows.size(0), " rows");
}

// The numbers of a tensor that has `count` of them; null without a tensor.
template <typename Number>
Number* numbers_of(const std::optional<Tensor>& tensor, const char* name, ScalarType type,
                   int64_t count, const Tensor& like) {
  if (!tensor) return nullptr;
  check_same_device(*tensor, name, like);
  check_contiguous(*tensor, name);
  STD_TORCH_CHECK(tensor->scalar_type() == type, name, ": unexpected dtype");
  STD_TORCH_CHECK(tensor->numel() == count, name, ": expected ", count, " numbers, got ",
                  tensor->numel());
  return static_cast<Number*>(const_cast<void*>(tensor->const_data_ptr()));
}

float* floats_of(const std::optional<Tensor>& tensor, const char* name, int64_t count,
                 const Tensor& like) {
  return numbers_of<float>(tensor, name, ScalarType::Float, count, like);
}

Scale scale_of(const std::optional<Tensor>& scale, double value, const Tensor& like) {
  return {floats_of(scale, "scale", 1, like), static_cast<float>(value)};
}

Candidates candidates_of(int64_t candidates) {
  STD_TORCH_CHECK(candidates >= 0 && candidates <= static_cast<int64_t>(Candidates::kOtherHalf),
                  "candidates: expected 0, 1 or 2, got ", candidates);
  return static_cast<Candidates>(candidates);
}

// Packed copies of the rows of tensors, one after another.
template <typename T>
class Packed {
 public:
  Packed(const Tensor& like, int64_t count)
      : width_((like.size(1) + kChunk<T> - 1) / kChunk<T> * kChunk<T>),
        data_(torch::stable::new_empty(like, {count, width_})),
        numbers_(torch::stable::new_empty(like, {2, count}, ScalarType::Float)) {}

  void take(const Tensor& tensor, int64_t begin, bool normalize) const {
    if (tensor.size(0) == 0) return;
    const GivenRows<T> given = {static_cast<const T*>(tensor.const_data_ptr()), tensor.stride(0),
                                tensor.size(0), static_cast<int>(tensor.size(1))};
    launch(pack_embeddings<T>,
           {dim3(blocks_for(given.count, kPackThreads / kWarp)), dim3(kPackThreads)}, tensor, given,
           normalize, from(begin));
  }

  Embeddings<T> from(int64_t row) const {
    float* numbers = numbers_.mutable_data_ptr<float>() + row;
    return {static_cast<T*>(data_.mutable_data_ptr()) + row * width_, numbers,
            numbers + numbers_.size(1), static_cast<int>(width_)};
  }
  int width() const { return static_cast<int>(width_); }

 private:
  int64_t width_;
  Tensor data_, numbers_;
};

// The batch of one process: its rows, then the further negatives.
template <typename T>
class Batch {
 public:
  Batch(const Tensor& z0, const std::optional<Tensor>& z1, const std::optional<Tensor>& negatives,
        int64_t candidates, bool normalize)
      : first_(z0.size(0)),
        rows_(z1 ? 2 * first_ : first_),
        columns_(rows_ + (negatives ? negatives->size(0) : 0)),
        candidates_(candidates_of(candidates)),
        packed_(z0, columns_) {
    packed_.take(z0, 0, normalize);
    if (z1) packed_.take(*z1, first_, normalize);
    if (negatives) packed_.take(*negatives, rows_, normalize);
  }

  Meeting meeting() const { return {rows_, columns_, rows_, 0, candidates_}; }
  Embeddings<T> embeddings() const { return packed_.from(0); }
  int64_t first() const { return first_; }
  int64_t rows() const { return rows_; }

 private:
  int64_t first_, rows_, columns_;
  Candidates candidates_;
  Packed<T> packed_;
};

// As many warps to a block as have rows and shared memory, and leave work for every multiprocessor
// where each block of rows is `times` blocks.
template <typename T>
int warps_for(int64_t rows, int width, int64_t times, const Device& device) {
  int warps = kMostWarps;
  const auto blocks = [&] { return (rows + warps * kWarpRows - 1) / (warps * kWarpRows); };
  while (warps > 2 && (rows <= warps / 2 * kWarpRows || blocks() * times < device.multiprocessors ||
                       Steps<T>::shared_bytes(width, warps) > device.shared)) {
    warps /= 2;
  }
  return warps;
}

template <typename T>
void launch_forward(const ForwardArguments<T>& arguments, const Tensor& where) {
  const int64_t rows = arguments.meeting.rows;
  if (rows == 0) return;
  const int width = arguments.rows.width;
  const int warps = warps_for<T>(rows, width, 1, Device(where));
  const int shared = Steps<T>::shared_bytes(width, warps);
  launch(contrast_forward<T>,
         {dim3(blocks_for(rows, warps * kWarpRows)), dim3(warps * kWarp), shared}, where,
         arguments);
}

template <typename T, int kValues>
void launch_backward(BackwardArguments<T>& arguments, const Tensor& where) {
  const int64_t rows = arguments.meeting.rows;
  if (rows == 0) return;
  const int width = arguments.rows.width;
  arguments.feature_blocks = (Steps<T>::count(width) + kValues - 1) / kValues;
  const int warps = warps_for<T>(rows, width, arguments.feature_blocks, Device(where));
  const int64_t row_blocks = blocks_for(rows, warps * kWarpRows);
  const int shared = Steps<T>::shared_bytes(width, warps);
  launch(contrast_backward<T, kValues>,
         {dim3(blocks_for(row_blocks * arguments.feature_blocks, 1)), dim3(warps * kWarp), shared},
         where, arguments);
}

// The anchors' weights, then the rows' gradients, then the scale's.
template <typename T>
void find_gradients(BackwardArguments<T>& arguments, const Tensor& where, const Tensor& dscale) {
  const int64_t count = arguments.meeting.rows, bytes = sizeof(Common);
  const Tensor common = torch::stable::new_empty(where, {bytes}, ScalarType::Byte);
  const Tensor of_rows = torch::stable::new_empty(where, {count}, ScalarType::Float);
  Common* to = reinterpret_cast<Common*>(common.mutable_data_ptr<uint8_t>());
  arguments.common = to;
  arguments.dscale = of_rows.mutable_data_ptr<float>();
  const Anchors &rows = arguments.row_anchors, &columns = arguments.column_anchors;
  const bool same = columns.pull == rows.pull;
  launch(find_common, {dim3(1), dim3(kSumThreads)}, where, rows, same ? Anchors{} : columns, to);
  const auto weigh = [&](const Anchors& anchors) {
    if (anchors.count == 0) return;
    launch(weigh_anchors, {dim3(blocks_for(anchors.count, kAnchorThreads)), dim3(kAnchorThreads)},
           where, anchors, to);
  };
  weigh(rows);
  if (!same) weigh(columns);
  // As many of the features as fit one block's registers.
  if (arguments.gradient.features <= 64) {
    launch_backward<T, 64 / kStep<T>>(arguments, where);
  } else {
    launch_backward<T, 128 / kStep<T>>(arguments, where);
  }
  launch(sum_numbers, {dim3(1), dim3(kSumThreads)}, where, arguments.dscale, arguments.meeting.rows,
         dscale.mutable_data_ptr<float>());
}

// Calls a function object's run<T>() for the dtype of embeddings.
template <typename Run>
void run_for(const Tensor& z, const Run& run) {
  switch (element_type(z, "z0")) {
    case ElementType::kFloat32:
      return run.template operator()<float>();
    case ElementType::kFloat16:
      return run.template operator()<Half>();
    case ElementType::kBFloat16:
      return run.template operator()<BFloat16>();
  }
}

// Returns the number of anchors.
int64_t check_batch(const Tensor& z0, const std::optional<Tensor>& z1,
                    const std::optional<Tensor>& negatives) {
  check_rows(z0, "z0", z0);
  if (z1) {
    check_rows(*z1, "z1", z0);
    STD_TORCH_CHECK(z1->size(0) == z0.size(0), "z1: expected ", z0.size(0), " rows, got ",
                    z1->size(0));
  }
  if (negatives) check_rows(*negatives, "negatives", z0);
  return z1 ? 2 * z0.size(0) : z0.size(0);
}

void forward(const Tensor z0, std::optional<Tensor> z1, std::optional<Tensor> negatives,
             std::optional<Tensor> classes, std::optional<Tensor> share,
             std::optional<Tensor> scale, double scale_value, int64_t candidates, bool normalize,
             const Tensor losses, const Tensor lse) {
  const int64_t anchors = check_batch(z0, z1, negatives);
  run_for(z0, [&]<typename T>() {
    const Batch<T> batch(z0, z1, negatives, candidates, normalize);
    ForwardArguments<T> arguments = {};
    arguments.rows = arguments.columns = batch.embeddings();
    arguments.meeting = batch.meeting();
    arguments.scale = scale_of(scale, scale_value, z0);
    arguments.classes = numbers_of<int32_t>(classes, "classes", ScalarType::Int, anchors, z0);
    arguments.share = floats_of(share, "share", anchors, z0);
    arguments.losses = floats_of(losses, "losses", anchors, z0);
    arguments.lse = floats_of(lse, "lse", 2 * anchors, z0);
    arguments.lse_residual = arguments.lse + anchors;
    launch_forward(arguments, z0);
  });
}

void backward(const Tensor grad, const Tensor z0, std::optional<Tensor> z1,
              std::optional<Tensor> negatives, std::optional<Tensor> classes,
              std::optional<Tensor> share, std::optional<Tensor> scale, const Tensor lse,
              double scale_value, int64_t candidates, bool normalize, const Tensor dz0,
              std::optional<Tensor> dz1, const Tensor dscale) {
  const int64_t count = check_batch(z0, z1, negatives);
  check_gradient(dz0, "dz0", z0);
  STD_TORCH_CHECK(dz1.has_value() == z1.has_value(), "dz1: expected one where there is a z1");
  if (dz1) check_gradient(*dz1, "dz1", z0);
  floats_of(dscale, "dscale", 1, z0);
  const Tensor weights = torch::stable::new_empty(grad, {3, count});
  Anchors anchors = {};
  anchors.lse = floats_of(lse, "lse", 2 * count, z0);
  anchors.lse_residual = anchors.lse + count;
  anchors.grad = floats_of(grad, "grad", count, z0);
  anchors.share = floats_of(share, "share", count, z0);
  anchors.classes = numbers_of<int32_t>(classes, "classes", ScalarType::Int, count, z0);
  anchors.count = count;
  anchors.pull = weights.mutable_data_ptr<float>();
  anchors.push = anchors.pull + count;
  anchors.weight = anchors.push + count;
  run_for(z0, [&]<typename T>() {
    const Batch<T> batch(z0, z1, negatives, candidates, normalize);
    BackwardArguments<T> arguments = {};
    arguments.rows = arguments.columns = batch.embeddings();
    arguments.meeting = batch.meeting();
    arguments.scale = scale_of(scale, scale_value, z0);
    arguments.row_anchors = arguments.column_anchors = anchors;
    arguments.normalize = normalize;
    arguments.gradient = {static_cast<T*>(dz0.mutable_data_ptr()),
                          dz1 ? static_cast<T*>(dz1->mutable_data_ptr()) : nullptr, z0.size(0),
                          static_cast<int>(z0.size(1))};
    find_gradients(arguments, z0, dscale);
  });
}

// Rows of one process against columns of one or all, where the rows' own begin at `diagonal`, or
// nowhere if that is negative.
class Blocks {
 public:
  Blocks(const Tensor& rows, const Tensor& columns, int64_t candidates, int64_t diagonal)
      : rows_(checked(rows, "rows", rows), rows.size(0)),
        columns_(checked(columns, "columns", rows), columns.size(0)),
        meeting_({rows.size(0), columns.size(0), 0, diagonal, candidates_of(candidates)}) {
    const bool halves = meeting_.candidates == Candidates::kOtherHalf;
    STD_TORCH_CHECK(diagonal < 0 || (!halves && diagonal + rows.size(0) <= columns.size(0)),
                    "diagonal: expected columns for all rows, got ", diagonal);
    rows_.take(rows, 0, false);
    columns_.take(columns, 0, false);
  }

  Meeting meeting(int64_t anchors) const {
    Meeting meeting = meeting_;
    meeting.anchors = anchors;
    return meeting;
  }
  Embeddings<float> rows() const { return rows_.from(0); }
  Embeddings<float> columns() const { return columns_.from(0); }

 private:
  static const Tensor& checked(const Tensor& tensor, const char* name, const Tensor& rows) {
    check_rows(tensor, name, rows);
    STD_TORCH_CHECK(tensor.scalar_type() == ScalarType::Float, name, ": expected float32");
    return tensor;
  }

  Packed<float> rows_, columns_;
  Meeting meeting_;
};

void block_lse(const Tensor rows, const Tensor columns, std::optional<Tensor> scale,
               double scale_value, int64_t candidates, int64_t diagonal, const Tensor lse) {
  const Blocks blocks(rows, columns, candidates, diagonal);
  ForwardArguments<float> arguments = {};
  arguments.rows = blocks.rows();
  arguments.columns = blocks.columns();
  arguments.meeting = blocks.meeting(0);
  arguments.scale = scale_of(scale, scale_value, rows);
  arguments.lse = floats_of(lse, "lse", 2 * rows.size(0), rows);
  arguments.lse_residual = arguments.lse + rows.size(0);
  launch_forward(arguments, rows);
}

void block_gradient(const Tensor rows, const Tensor row_lse, const Tensor row_grad,
                    const Tensor columns, std::optional<Tensor> column_lse,
                    std::optional<Tensor> column_grad, std::optional<Tensor> scale,
                    double scale_value, int64_t candidates, int64_t diagonal, const Tensor drows,
                    const Tensor dscale) {
  const Blocks blocks(rows, columns, candidates, diagonal);
  check_gradient(drows, "drows", rows);
  floats_of(dscale, "dscale", 1, rows);
  const int64_t count = rows.size(0), anchors = column_lse && column_grad ? columns.size(0) : 0;
  const Tensor weights = torch::stable::new_empty(rows, {2 * (count + anchors)}, ScalarType::Float);
  Anchors own = {}, others = {};
  own.lse = floats_of(row_lse, "row_lse", 2 * count, rows);
  own.lse_residual = own.lse + count;
  own.grad = floats_of(row_grad, "row_grad", count, rows);
  own.count = count;
  own.pull = weights.mutable_data_ptr<float>();
  own.weight = own.pull + count;
  others.count = anchors;
  if (anchors > 0) {
    others.lse = floats_of(column_lse, "column_lse", 2 * anchors, rows);
    others.lse_residual = others.lse + anchors;
    others.grad = floats_of(column_grad, "column_grad", anchors, rows);
  }
  others.pull = own.weight + count;
  others.weight = others.pull + anchors;
  BackwardArguments<float> arguments = {};
  arguments.rows = blocks.rows();
  arguments.columns = blocks.columns();
  arguments.meeting = blocks.meeting(anchors);
  arguments.scale = scale_of(scale, scale_value, rows);
  arguments.row_anchors = own;
  arguments.column_anchors = others;
  float* to = static_cast<float*>(drows.mutable_data_ptr());
  arguments.gradient = {to, nullptr, count, static_cast<int>(rows.size(1))};
  find_gradients(arguments, rows, dscale);
}

}  // namespace
}  // namespace gcrl_kernels::contrastive

STABLE_TORCH_LIBRARY_FRAGMENT(gcrl_kernels_cuda, library) {
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

STABLE_TORCH_LIBRARY_IMPL(gcrl_kernels_cuda, CUDA, library) {
  library.impl("contrast", TORCH_BOX(&gcrl_kernels::contrastive::forward));
  library.impl("contrast_backward", TORCH_BOX(&gcrl_kernels::contrastive::backward));
  library.impl("contrast_block_lse", TORCH_BOX(&gcrl_kernels::contrastive::block_lse));
  library.impl("contrast_block_gradient", TORCH_BOX(&gcrl_kernels::contrastive::block_gradient));
}
