#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cstdint>
#include <limits>
#include <optional>

#include "axial_attention/backward.cuh"
#include "axial_attention/backward_streamed.cuh"
#include "axial_attention/forward.cuh"
#include "axial_attention/grid.h"
#include "common/cuda_launch.h"
#include "common/tensors.h"

namespace gcrl_kernels::axial_attention {
namespace {

using torch::headeronly::BFloat16;
using torch::headeronly::Half;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t kLongestRow = 1024;
constexpr int64_t kFewestFeatures = 16, kMostFeatures = 128;
constexpr int64_t kMostRows = std::numeric_limits<int32_t>::max();
constexpr int64_t kMostSlotBytes = 64 << 20;  // of the bias's gradient
constexpr int kMemoryLine = 128;              // bytes that device memory gives at a time

// How a kernel is compiled: the columns of the scores that a warp holds at a time, the warps that a
// block may have, and the blocks that a multiprocessor's registers must have room for.
struct Shape {
  int columns, warps, blocks;
};

template <int kFeatures>
constexpr Shape of_features(Shape of_32, Shape of_64, Shape of_128) {
  return kFeatures == 32 ? of_32 : kFeatures == 64 ? of_64 : of_128;
}

// Which kernels serve which rows of halves. kFeatures is the next of 32, 64 and 128; the features
// beyond, and the positions up to the next multiple of a kernel's columns, are zeros in shared
// memory.
template <typename T, int kFeatures>
struct Plan {
  static constexpr Shape kForwardShort = of_features<kFeatures>({32, 8, 4}, {32, 4, 6}, {32, 4, 4});
  static constexpr Shape kForwardMiddle =
      of_features<kFeatures>({64, 8, 2}, {64, 4, 4}, {64, 4, 3});
  static constexpr Shape kForwardLong =
      of_features<kFeatures>({32, 16, 1}, {32, 16, 1}, {32, 8, 1});
  static constexpr Shape kBackwardShort =
      of_features<kFeatures>({32, 8, 2}, {32, 4, 5}, {32, 4, 3});
  static constexpr Shape kBackwardMiddle =
      of_features<kFeatures>({64, 8, 2}, {64, 4, 4}, {64, 4, 2});
  // Rows whole in shared memory whose scores are computed tile by tile; not for 128 features.
  static constexpr Shape kBackwardLong = of_features<kFeatures>({32, 8, 2}, {16, 8, 2}, {});
  static constexpr Shape kBackwardStreamed =
      of_features<kFeatures>({32, 4, 4}, {32, 4, 3}, {32, 4, 2});
};

// And of float32, which has no kernels for rows of middle length.
template <int kFeatures>
struct Plan<float, kFeatures> {
  static constexpr Shape kForwardShort = {};
  static constexpr Shape kForwardLong = {32, 8, 1};
  static constexpr Shape kBackwardShort =
      of_features<kFeatures>({32, 8, 1}, {32, 4, 3}, {32, 4, 2});
  static constexpr Shape kBackwardMiddle = {};
  static constexpr Shape kBackwardLong = of_features<kFeatures>({32, 8, 1}, {32, 8, 1}, {16, 4, 1});
  static constexpr Shape kBackwardStreamed =
      of_features<kFeatures>({32, 4, 3}, {32, 4, 2}, {32, 4, 2});
};

constexpr int kMostOnChip = 8192;  // positions, a multiple of the columns, times kFeatures

// Rows side by side until a block has four warps and reads whole lines of memory.
Division of_short_rows(int length, int position_bytes, int most_warps) {
  const int warps = (length + kWarpPositions - 1) / kWarpPositions;
  const int neighbours = (kMemoryLine + position_bytes - 1) / position_bytes;
  return {std::clamp(std::max(4 / warps, neighbours), 1, std::max(1, most_warps / warps)), warps};
}

template <typename T>
StridedRows<T> strided_rows(const Tensor& tensor, const Grid& grid) {
  StridedRows<T> rows;
  rows.data = static_cast<T*>(const_cast<void*>(tensor.const_data_ptr()));
  const GridStrides strides = grid.strides(tensor);
  rows.along = strides.along;
  const int missing = kMostOuter - grid.outer();
  for (int d = 0; d < grid.outer(); ++d) rows.outer[missing + d] = strides.outer[d];
  rows.wide = reinterpret_cast<uintptr_t>(rows.data) % kChunkBytes == 0;
  for (int64_t d = 0; d + 1 < tensor.dim(); ++d) {
    const bool steps = tensor.size(d) > 1;
    rows.wide &= !steps || tensor.stride(d) * int64_t{sizeof(T)} % kChunkBytes == 0;
  }
  return rows;
}

// What both directions are given.
struct Call {
  const Tensor& q;
  const std::optional<Tensor>&bias, &mask;
  Grid grid;
  bool causal;
  double scale;
  Device device;

  Options options() const {
    Options options;
    options.bias = bias ? bias->const_data_ptr<float>() : nullptr;
    if (mask) options.mask = strided_rows<const uint8_t>(*mask, grid);
    options.length = length();
    options.features = static_cast<int>(q.size(-1));
    options.scale = static_cast<float>(scale);
    options.causal = causal;
    return options;
  }
  int length() const { return static_cast<int>(grid.length()); }
  int64_t rows() const { return grid.rows(); }
};

void check_call(const Tensor& q, const std::optional<Tensor>& bias,
                const std::optional<Tensor>& mask, int64_t axis) {
  STD_TORCH_CHECK(q.dim() >= 4 && q.dim() <= 6, "q: expected [B, *grid, heads, D]");
  STD_TORCH_CHECK(axis >= 0 && axis < q.dim() - 3, "axis: expected one of the grid, got ", axis);
  const int64_t length = q.size(axis + 1), features = q.size(-1), heads = q.size(-2);
  STD_TORCH_CHECK(length <= kLongestRow, "q: expected rows of up to ", kLongestRow,
                  " positions, got ", length);
  STD_TORCH_CHECK(features >= kFewestFeatures && features <= kMostFeatures && features % 8 == 0,
                  "q: expected 16 to 128 features a head in multiples of 8, got ", features);
  if (bias) {
    STD_TORCH_CHECK(bias->dim() == 3 && bias->scalar_type() == ScalarType::Float,
                    "bias: expected float32 [heads, N, N]");
    check_last_sizes(*bias, "bias", {heads, length, length});
    check_contiguous(*bias, "bias");
    check_same_device(*bias, "bias", q);
  }
  if (mask) {
    STD_TORCH_CHECK(mask->scalar_type() == ScalarType::Bool && mask->dim() == q.dim() - 2,
                    "mask: expected bool [B, *grid]");
    for (int64_t d = 0; d < mask->dim(); ++d) {
      STD_TORCH_CHECK(mask->size(d) == q.size(d), "mask: expected size ", q.size(d),
                      " in dimension ", d, ", got ", mask->size(d));
    }
    check_same_device(*mask, "mask", q);
  }
}

// Of a tensor [B, *grid, heads, D] beside q.
void check_alike(const Tensor& tensor, const char* name, const Tensor& q) {
  check_same_device(tensor, name, q);
  STD_TORCH_CHECK(tensor.scalar_type() == q.scalar_type(), name, ": expected the dtype of q");
  STD_TORCH_CHECK(tensor.dim() == q.dim(), name, ": expected ", q.dim(), " dimensions, got ",
                  tensor.dim());
  for (int64_t d = 0; d < q.dim(); ++d) {
    STD_TORCH_CHECK(tensor.size(d) == q.size(d), name, ": expected size ", q.size(d),
                    " in dimension ", d, ", got ", tensor.size(d));
  }
  STD_TORCH_CHECK(tensor.stride(-1) == 1, name, ": expected features side by side");
}

void check_lse(const Tensor& lse, const Tensor& q) {
  check_same_device(lse, "lse", q);
  STD_TORCH_CHECK(
      lse.dim() == q.dim() && lse.size(0) == 2 && lse.scalar_type() == ScalarType::Float,
      "lse: expected float32 [2, B, *grid, heads]");
  for (int64_t d = 1; d < lse.dim(); ++d) {
    STD_TORCH_CHECK(lse.size(d) == q.size(d - 1), "lse: expected size ", q.size(d - 1),
                    " in dimension ", d, ", got ", lse.size(d));
  }
}

unsigned checked_blocks(int64_t blocks) {
  STD_TORCH_CHECK(blocks <= kMostRows, "q: expected fewer than 2^31 rows and blocks, got ", blocks);
  return static_cast<unsigned>(blocks);
}

// Calls a function object's run<T, kFeatures>() for q's dtype and features.
template <typename T, typename Run>
void run_for_features(const Tensor& q, const Run& run) {
  if (q.size(-1) <= 32) {
    run.template operator()<T, 32>();
  } else if (q.size(-1) <= 64) {
    run.template operator()<T, 64>();
  } else {
    run.template operator()<T, 128>();
  }
}

template <typename Run>
void run_for(const Tensor& q, const Run& run) {
  switch (q.scalar_type()) {
    case ScalarType::Float:
      return run_for_features<float>(q, run);
    case ScalarType::Half:
      return run_for_features<Half>(q, run);
    case ScalarType::BFloat16:
      return run_for_features<BFloat16>(q, run);
    default:
      STD_TORCH_CHECK(false, "q: expected float32, float16 or bfloat16");
  }
}

// The next smaller division of a block's work, after one that takes too much shared memory.
Division smaller(const Division& division, int bytes, const Device& device) {
  STD_TORCH_CHECK(division.rows > 1 || division.warps > 1, "q: expected rows that take up to ",
                  device.shared, " bytes of shared memory, as much as this GPU has, got ", bytes);
  return division.rows > 1 ? Division{division.rows - 1, division.warps}
                           : Division{1, (division.warps + 1) / 2};
}

template <typename T, int kFeatures, Shape kShape, bool kWhole>
void launch_forward(const Call& call, ForwardArguments<T>& arguments) {
  constexpr int kColumns = kShape.columns, kWarps = kShape.warps;
  using Memory = ForwardMemory<T, kFeatures, kColumns>;
  const int tiles = (call.length() + kColumns - 1) / kColumns;
  const int position_bytes = arguments.options.features * static_cast<int>(sizeof(T));
  Division division = of_short_rows(call.length(), position_bytes, kWarps);
  if (tiles > 1) division = {1, std::min(division.warps, kWarps)};
  while (Memory(division, tiles).bytes > call.device.shared) {
    division = smaller(division, Memory(division, tiles).bytes, call.device);
  }
  const Memory memory(division, tiles);
  arguments.division = division;
  arguments.key_tiles = tiles;
  arguments.query_tiles = (call.length() + memory.queries - 1) / memory.queries;
  const int64_t groups = (call.rows() + division.rows - 1) / division.rows;
  const Blocks blocks = {dim3(checked_blocks(groups * arguments.query_tiles)),
                         dim3(division.rows * division.warps * kWarp), memory.bytes};
  launch(axial_forward<T, kFeatures, kColumns, kWhole, kWarps * kWarp, kShape.blocks>, blocks,
         call.q, arguments);
}

template <typename T, int kFeatures>
void launch_best_forward(const Call& call, ForwardArguments<T>& arguments) {
  using Kernels = Plan<T, kFeatures>;
  if constexpr (Kernels::kForwardShort.columns > 0) {
    if (call.length() <= Kernels::kForwardShort.columns) {
      return launch_forward<T, kFeatures, Kernels::kForwardShort, true>(call, arguments);
    }
    if (call.length() <= Kernels::kForwardMiddle.columns) {
      return launch_forward<T, kFeatures, Kernels::kForwardMiddle, true>(call, arguments);
    }
  }
  launch_forward<T, kFeatures, Kernels::kForwardLong, false>(call, arguments);
}

void forward(const Tensor q, const Tensor k, const Tensor v, std::optional<Tensor> bias,
             std::optional<Tensor> mask, int64_t axis, bool causal, double scale, const Tensor out,
             const Tensor lse) {
  check_call(q, bias, mask, axis);
  check_alike(q, "q", q);
  check_alike(k, "k", q);
  check_alike(v, "v", q);
  check_alike(out, "out", q);
  check_lse(lse, q);
  if (q.numel() == 0) return;
  const Grid grid(q, axis);
  checked_blocks(grid.rows());
  const Call call = {q, bias, mask, grid, causal, scale, Device(q)};
  run_for(q, [&]<typename T, int kFeatures>() {
    ForwardArguments<T> arguments = {RowNumbers(grid),
                                     call.options(),
                                     {},
                                     0,
                                     0,
                                     strided_rows<T>(q, grid),
                                     strided_rows<T>(k, grid),
                                     strided_rows<T>(v, grid),
                                     strided_rows<T>(out, grid),
                                     strided_rows<float>(torch::stable::select(lse, 0, 0), grid),
                                     lse.stride(0)};
    launch_best_forward<T, kFeatures>(call, arguments);
  });
}

// The bias's gradient, in slots of its own that blocks add to without meeting one another.
class BiasSlots {
 public:
  // As many slots as blocks may work at once, or one for each row where there is no such gradient.
  BiasSlots(const Call& call, std::optional<Tensor>& dbias, int64_t wanted)
      : call_(call), dbias_(dbias) {
    if (!dbias) {
      count_ = call.rows();
      return;
    }
    const int64_t heads = call.grid.heads(), length = call.length();
    const int64_t most = kMostSlotBytes / (length * length * int64_t{sizeof(float)});
    const int64_t lines = std::min({wanted, most, call.rows()}) / heads;
    count_ = heads * std::max<int64_t>(1, lines);
    if (count_ == heads) {
      slots_ = *dbias;
      torch::stable::zero_(*slots_);
    } else {
      slots_ = torch::stable::new_zeros(*dbias, {count_, length, length});
    }
  }

  int64_t count() const { return count_; }
  float* data() const { return slots_ ? slots_->mutable_data_ptr<float>() : nullptr; }

  void add_up() const {
    if (!dbias_ || count_ == call_.grid.heads()) return;
    constexpr int kThreads = 256;
    const int64_t size = int64_t{call_.length()} * call_.length();
    const int64_t blocks = (call_.grid.heads() * size + kThreads - 1) / kThreads;
    launch(sum_slots, {dim3(checked_blocks(blocks)), dim3(kThreads)}, call_.q, data(),
           static_cast<uint32_t>(count_), static_cast<int>(call_.grid.heads()), size,
           dbias_->mutable_data_ptr<float>());
  }

 private:
  const Call& call_;
  std::optional<Tensor>& dbias_;
  std::optional<Tensor> slots_;
  int64_t count_;
};

// In one pass, where the row's positions and the block's shared memory allow: true if they do.
template <typename T, int kFeatures, Shape kShape, bool kWhole>
bool launch_backward(const Call& call, BackwardArguments<T>& arguments,
                     std::optional<Tensor>& dbias) {
  constexpr int kColumns = kShape.columns, kWarps = kShape.warps;
  if constexpr (kColumns == 0) {
    return false;
  } else {
    using Memory = BackwardMemory<T, kFeatures, kColumns>;
    const int tiles = (call.length() + kColumns - 1) / kColumns;
    if (kWhole && tiles > 1) return false;
    const int position_bytes = arguments.options.features * static_cast<int>(sizeof(T));
    Division division = of_short_rows(call.length(), position_bytes, kWarps);
    if (division.warps > kWarps || tiles * kColumns * kFeatures > kMostOnChip) return false;
    while (division.rows > 1 && Memory(division, tiles).bytes > call.device.shared) {
      division = {division.rows - 1, division.warps};
    }
    const int bytes = Memory(division, tiles).bytes;
    if (bytes > call.device.shared) return false;
    const BiasSlots slots(call, dbias,
                          int64_t{call.device.multiprocessors} * kShape.blocks * division.rows);
    arguments.division = division;
    arguments.tiles = tiles;
    arguments.slots = static_cast<uint32_t>(slots.count());
    arguments.dbias = slots.data();
    const int64_t groups = (slots.count() + division.rows - 1) / division.rows;
    const Blocks blocks = {dim3(checked_blocks(groups)),
                           dim3(division.rows * division.warps * kWarp), bytes};
    launch(axial_backward<T, kFeatures, kColumns, kWhole, kWarps * kWarp, kShape.blocks>, blocks,
           call.q, arguments);
    slots.add_up();
    return true;
  }
}

template <typename T, int kFeatures>
void launch_streamed(const Call& call, BackwardArguments<T>& arguments,
                     std::optional<Tensor>& dbias) {
  constexpr Shape kShape = Plan<T, kFeatures>::kBackwardStreamed;
  using Memory = StreamedMemory<T, kFeatures, kShape.columns>;
  Division division = {1, kShape.warps};
  while (Memory(division, call.length()).bytes > call.device.shared) {
    division = smaller(division, Memory(division, call.length()).bytes, call.device);
  }
  const Memory memory(division, call.length());
  const BiasSlots slots(call, dbias, int64_t{call.device.multiprocessors} * kShape.blocks);
  arguments.division = division;
  arguments.slots = static_cast<uint32_t>(slots.count());
  arguments.dbias = slots.data();
  const int64_t count = (slots.count() + call.rows()) * memory.own_tiles;
  const Blocks blocks = {dim3(checked_blocks(count)), dim3(division.warps * kWarp), memory.bytes};
  launch(axial_backward_streamed<T, kFeatures, kShape.columns, kShape.warps * kWarp, kShape.blocks>,
         blocks, call.q, arguments);
  slots.add_up();
}

template <typename T, int kFeatures>
void launch_best_backward(const Call& call, BackwardArguments<T>& arguments,
                          std::optional<Tensor>& dbias) {
  using Kernels = Plan<T, kFeatures>;
  const bool done =
      launch_backward<T, kFeatures, Kernels::kBackwardShort, true>(call, arguments, dbias) ||
      launch_backward<T, kFeatures, Kernels::kBackwardMiddle, true>(call, arguments, dbias) ||
      launch_backward<T, kFeatures, Kernels::kBackwardLong, false>(call, arguments, dbias);
  if (!done) launch_streamed<T, kFeatures>(call, arguments, dbias);
}

void backward(const Tensor grad, const Tensor q, const Tensor k, const Tensor v, const Tensor out,
              const Tensor lse, std::optional<Tensor> bias, std::optional<Tensor> mask,
              int64_t axis, bool causal, double scale, const Tensor dq, const Tensor dk,
              const Tensor dv, std::optional<Tensor> dbias) {
  check_call(q, bias, mask, axis);
  check_alike(q, "q", q);
  check_alike(grad, "grad", q);
  check_alike(k, "k", q);
  check_alike(v, "v", q);
  check_alike(out, "out", q);
  check_alike(dq, "dq", q);
  check_alike(dk, "dk", q);
  check_alike(dv, "dv", q);
  check_lse(lse, q);
  const Grid grid(q, axis);
  if (dbias) {
    STD_TORCH_CHECK(dbias->dim() == 3 && dbias->scalar_type() == ScalarType::Float,
                    "dbias: expected float32 [heads, N, N]");
    check_last_sizes(*dbias, "dbias", {grid.heads(), grid.length(), grid.length()});
    check_contiguous(*dbias, "dbias");
    check_same_device(*dbias, "dbias", q);
  }
  if (q.numel() == 0) {
    if (dbias && dbias->numel() > 0) torch::stable::zero_(*dbias);
    return;
  }
  checked_blocks(grid.rows());
  const Call call = {q, bias, mask, grid, causal, scale, Device(q)};
  run_for(q, [&]<typename T, int kFeatures>() {
    BackwardArguments<T> arguments = {RowNumbers(grid),
                                      call.options(),
                                      {},
                                      0,
                                      strided_rows<T>(grad, grid),
                                      strided_rows<T>(q, grid),
                                      strided_rows<T>(k, grid),
                                      strided_rows<T>(v, grid),
                                      strided_rows<T>(out, grid),
                                      strided_rows<T>(dq, grid),
                                      strided_rows<T>(dk, grid),
                                      strided_rows<T>(dv, grid),
                                      strided_rows<float>(torch::stable::select(lse, 0, 0), grid),
                                      lse.stride(0),
                                      nullptr,
                                      0};
    launch_best_backward<T, kFeatures>(call, arguments, dbias);
  });
}

}  // namespace
}  // namespace gcrl_kernels::axial_attention

STABLE_TORCH_LIBRARY_FRAGMENT(gcrl_kernels_cuda, library) {
  library.def(
      "axial_attention(Tensor q, Tensor k, Tensor v, Tensor? bias, Tensor? mask, int axis, "
      "bool causal, float scale, Tensor(a!) out, Tensor(b!) lse) -> ()");
  library.def(
      "axial_attention_backward(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor out, "
      "Tensor lse, Tensor? bias, Tensor? mask, int axis, bool causal, float scale, Tensor(a!) dq, "
      "Tensor(b!) dk, Tensor(c!) dv, Tensor(d!)? dbias) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(gcrl_kernels_cuda, CUDA, library) {
  library.impl("axial_attention", TORCH_BOX(&gcrl_kernels::axial_attention::forward));
  library.impl("axial_attention_backward", TORCH_BOX(&gcrl_kernels::axial_attention::backward));
}
