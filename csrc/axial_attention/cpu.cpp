#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <array>
#include <limits>
#include <memory>
#include <optional>
#include <vector>

#include "axial_attention/grid.h"
#include "axial_attention/rows.h"
#include "common/cpu_level.h"
#include "common/scratch.h"
#include "common/tensors.h"

namespace gcrl_kernels {
namespace {

using torch::stable::Tensor;

constexpr int64_t kWorkWorthAThread = 1 << 18;   // multiplications
constexpr int64_t kMostPartialBytes = 64 << 20;  // of the bias's gradient

const RowKernels& row_kernels() {
#if defined(__x86_64__)
  if (cpu_level() == CpuLevel::kAvx512) return avx512::row_kernels;
  if (cpu_level() == CpuLevel::kAvx2) return avx2::row_kernels;
#endif
  return portable::row_kernels;
}

// A tensor's rows.
class Rows {
 public:
  Rows(const Tensor& tensor, const Grid& grid)
      : data_(static_cast<char*>(const_cast<void*>(tensor.const_data_ptr()))),
        element_(tensor.element_size()),
        strides_(grid.strides(tensor)) {}

  Row at(const GridPlace& place) const {
    return {data_ + place.offset(strides_) * element_, strides_.along};
  }

 private:
  char* data_;
  int64_t element_;
  GridStrides strides_;
};

// What changes the scores: the bias [heads, N, padded] and, line by line, the mask as numbers.
class Additions {
 public:
  Additions(const std::optional<Tensor>& bias, const std::optional<Tensor>& mask, const Grid& grid)
      : grid_(grid), keys_(padded(grid.length())), mask_(mask) {
    if (mask) {
      mask_strides_ = grid.strides(*mask);
      mask_data_ = mask_bytes(*mask);
    }
    if (!bias) return;
    const int64_t n = grid.length(), lines = grid.heads() * n;
    const float* given = bias->const_data_ptr<float>();
    bias_ = std::make_unique<Scratch>(lines * keys_);
    for (int64_t i = 0; i < lines; ++i) {
      std::copy(given + i * n, given + (i + 1) * n, bias_->data() + i * keys_);
      std::fill(bias_->data() + i * keys_ + n, bias_->data() + (i + 1) * keys_, 0.0f);
    }
  }

  const float* bias(int64_t head) const {
    return bias_ ? bias_->data() + head * grid_.length() * keys_ : nullptr;
  }

  // The mask of a row's line, [padded], in the caller's memory; null without a mask.
  const float* allowed(const GridPlace& place, float* numbers) const {
    if (!mask_) return nullptr;
    const uint8_t* first = mask_data_ + place.offset(mask_strides_);
    for (int64_t i = 0; i < grid_.length(); ++i) {
      const bool may = first[i * mask_strides_.along] != 0;
      numbers[i] = may ? 0.0f : -std::numeric_limits<float>::infinity();
    }
    std::fill(numbers + grid_.length(), numbers + keys_, 0.0f);
    return numbers;
  }

  int64_t keys() const { return keys_; }

 private:
  const Grid& grid_;
  int64_t keys_;
  std::optional<Tensor> mask_;
  const uint8_t* mask_data_ = nullptr;
  GridStrides mask_strides_ = {};
  std::unique_ptr<Scratch> bias_;
};

int64_t rows_worth_a_thread(const RowShape& shape) {
  const int64_t work = shape.length * shape.length * shape.features;
  return std::max<int64_t>(1, kWorkWorthAThread / std::max<int64_t>(1, work));
}

// Calls a function for rows begin, begin + step, ... before end with the row's number, how many
// came before it, its place, the next one's place (null after the last), its line's mask and
// scratch memory.
template <typename Function>
void for_rows(const Grid& grid, const Additions& additions, int64_t scratch_floats, int64_t begin,
              int64_t end, int64_t step, const Function& function) {
  if (begin >= end) return;
  const Scratch scratch(scratch_floats + additions.keys());
  const float* allowed = nullptr;
  int64_t line = -1;
  GridPlace place = grid.place(begin), next;
  for (int64_t row = begin; row < end; row += step, place = next) {
    if (row / grid.heads() != line) {
      line = row / grid.heads();
      allowed = additions.allowed(place, scratch.data() + scratch_floats);
    }
    const bool last = row + step >= end;
    if (!last) next = grid.place(row + step);
    function(row, (row - begin) / step, place, last ? nullptr : &next, allowed, scratch.data());
  }
}

// A place's row in each of some tensors; none without a place.
template <size_t kCount>
void find_rows(const Rows (&tensors)[kCount], const GridPlace* place, Row (&rows)[kCount]) {
  for (size_t i = 0; i < kCount; ++i) {
    rows[i] = place == nullptr ? Row{nullptr, 0} : tensors[i].at(*place);
  }
}

void forward(const Tensor q, const Tensor k, const Tensor v, std::optional<Tensor> bias,
             std::optional<Tensor> mask, int64_t axis, bool causal, double scale, const Tensor out,
             const Tensor lse) {
  const Grid grid(q, axis);
  const RowShape shape = {element_type(q, "q"), grid.length(), q.size(-1), causal,
                          static_cast<float>(scale)};
  const RowKernels& kernels = row_kernels();
  const Rows inputs[] = {{q, grid}, {k, grid}, {v, grid}}, outputs[] = {{out, grid}};
  const Rows lse_rows(torch::stable::select(lse, 0, 0), grid);
  const int64_t to_residual = lse.stride(0);
  const Additions additions(bias, mask, grid);
  const auto one_row = [&](int64_t row, int64_t before, const GridPlace& place,
                           const GridPlace* next, const float* allowed, float* scratch) {
    const Row of_lse = lse_rows.at(place);
    ForwardRow rows = {};
    find_rows(inputs, &place, rows.inputs);
    find_rows(outputs, &place, rows.outputs);
    find_rows(inputs, next, rows.next);
    rows.before = before;
    rows.lse = static_cast<float*>(of_lse.data);
    rows.lse_residual = rows.lse + to_residual;
    rows.lse_stride = of_lse.stride;
    rows.bias = additions.bias(row % grid.heads());
    rows.allowed = allowed;
    kernels.forward(shape, rows, scratch);
  };
  torch::stable::parallel_for(
      0, grid.rows(), rows_worth_a_thread(shape), [&](int64_t begin, int64_t end) {
        for_rows(grid, additions, kernels.forward_scratch(shape), begin, end, 1, one_row);
      });
}

// The gradient of the bias, summed in parts of its own, one after another.
class BiasGradient {
 public:
  BiasGradient(const Grid& grid, int64_t keys, int64_t parts)
      : heads_(grid.heads()),
        length_(grid.length()),
        keys_(keys),
        parts_(parts),
        sums_(parts * heads_ * length_ * keys) {
    std::fill(sums_.data(), sums_.data() + parts * heads_ * length_ * keys, 0.0f);
  }

  // How many parts each head's rows are worth, for so many threads.
  static int64_t parts(const Grid& grid, int64_t keys, int64_t threads) {
    const int64_t heads = std::max<int64_t>(1, grid.heads());
    const int64_t bytes = heads * grid.length() * keys * int64_t{sizeof(float)} + 1;
    const int64_t wanted = (threads + heads - 1) / heads;
    return std::clamp<int64_t>(wanted, 1, std::max<int64_t>(1, kMostPartialBytes / bytes));
  }

  float* part(int64_t number, int64_t head) const {
    return sums_.data() + (number * heads_ + head) * length_ * keys_;
  }

  void add_up(float* dbias) const {
    for (int64_t i = 0; i < heads_ * length_; ++i) {
      for (int64_t j = 0; j < length_; ++j) {
        float sum = 0;
        for (int64_t p = 0; p < parts_; ++p) sum += part(p, 0)[i * keys_ + j];
        dbias[i * length_ + j] = sum;
      }
    }
  }

 private:
  int64_t heads_, length_, keys_, parts_;
  Scratch sums_;
};

void backward(const Tensor grad, const Tensor q, const Tensor k, const Tensor v, const Tensor,
              const Tensor lse, std::optional<Tensor> bias, std::optional<Tensor> mask,
              int64_t axis, bool causal, double scale, const Tensor dq, const Tensor dk,
              const Tensor dv, std::optional<Tensor> dbias) {
  const Grid grid(q, axis);
  const RowShape shape = {element_type(q, "q"), grid.length(), q.size(-1), causal,
                          static_cast<float>(scale)};
  const RowKernels& kernels = row_kernels();
  const Rows inputs[] = {{q, grid}, {k, grid}, {v, grid}, {grad, grid}};
  const Rows outputs[] = {{dq, grid}, {dk, grid}, {dv, grid}};
  const Rows lse_rows(torch::stable::select(lse, 0, 0), grid);
  const int64_t to_residual = lse.stride(0);
  const Additions additions(bias, mask, grid);
  const auto run = [&](int64_t begin, int64_t end, int64_t step, float* bias_sum) {
    const auto one_row = [&](int64_t row, int64_t before, const GridPlace& place,
                             const GridPlace* next, const float* allowed, float* scratch) {
      const Row of_lse = lse_rows.at(place);
      BackwardRow rows = {};
      find_rows(inputs, &place, rows.inputs);
      find_rows(outputs, &place, rows.outputs);
      find_rows(inputs, next, rows.next);
      rows.before = before;
      rows.lse = static_cast<const float*>(of_lse.data);
      rows.lse_residual = rows.lse + to_residual;
      rows.lse_stride = of_lse.stride;
      rows.bias = additions.bias(row % grid.heads());
      rows.allowed = allowed;
      rows.dbias = bias_sum;
      kernels.backward(shape, rows, scratch);
    };
    for_rows(grid, additions, kernels.backward_scratch(shape), begin, end, step, one_row);
  };

  const int64_t heads = grid.heads();
  if (!dbias) {
    torch::stable::parallel_for(0, grid.rows(), rows_worth_a_thread(shape),
                                [&](int64_t begin, int64_t end) { run(begin, end, 1, nullptr); });
    return;
  }
  // Each task has one head, so that it has one sum.
  const int64_t lines = heads == 0 ? 0 : grid.rows() / heads;
  const int64_t parts =
      BiasGradient::parts(grid, additions.keys(), torch::stable::get_num_threads());
  const BiasGradient sums(grid, additions.keys(), parts);
  torch::stable::parallel_for(0, parts * heads, 1, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      const int64_t head = task % heads, part = task / heads;
      run(lines * part / parts * heads + head, lines * (part + 1) / parts * heads, heads,
          sums.part(part, head));
    }
  });
  sums.add_up(dbias->mutable_data_ptr<float>());
}

}  // namespace
}  // namespace gcrl_kernels

STABLE_TORCH_LIBRARY_FRAGMENT(gcrl_kernels_cpu, library) {
  library.def(
      "axial_attention(Tensor q, Tensor k, Tensor v, Tensor? bias, Tensor? mask, int axis, "
      "bool causal, float scale, Tensor(a!) out, Tensor(b!) lse) -> ()");
  library.def(
      "axial_attention_backward(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor out, "
      "Tensor lse, Tensor? bias, Tensor? mask, int axis, bool causal, float scale, Tensor(a!) dq, "
      "Tensor(b!) dk, Tensor(c!) dv, Tensor(d!)? dbias) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(gcrl_kernels_cpu, CPU, library) {
  library.impl("axial_attention", TORCH_BOX(&gcrl_kernels::forward));
  library.impl("axial_attention_backward", TORCH_BOX(&gcrl_kernels::backward));
}
