#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <optional>
#include <vector>

#include "color_cross_entropy/quantizer.h"
#include "color_cross_entropy/softmax.h"
#include "common/cpu_level.h"
#include "common/tensors.h"

namespace gcrl_kernels {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t kLogitsWorthAThread = 1 << 15;
constexpr int64_t kChunk = 1 << 20;  // logits of the linear form that are there at a time

const SoftmaxKernels& softmax_kernels() {
#if defined(__x86_64__)
  if (cpu_level() == CpuLevel::kAvx512) return avx512::softmax_kernels;
  if (cpu_level() == CpuLevel::kAvx2) return avx2::softmax_kernels;
#endif
  return portable::softmax_kernels;
}

// Of positions, numbered from the first: their tokens, given or found.
class Targets {
 public:
  Targets(const Tensor& pixels, const std::optional<Tensor>& palette, int64_t positions) {
    if (palette) {
      quantizer_.emplace(pixels, *palette);
    } else {
      check_contiguous(pixels, "tokens");
      tokens_ = pixels.const_data_ptr<int64_t>();
    }
    const int64_t there = palette ? pixels.numel() / 3 : pixels.numel();
    STD_TORCH_CHECK(there == positions, "pixels: expected ", positions, ", got ", there);
  }

  void find(int64_t begin, int64_t end, int64_t* tokens) const {
    if (quantizer_) return quantizer_->find(begin, end, tokens);
    std::copy(tokens_ + begin, tokens_ + end, tokens);
  }

 private:
  std::optional<Quantizer> quantizer_;
  const int64_t* tokens_ = nullptr;
};

// A tensor's elements, one a position; none: the tensor is not there.
template <typename Element>
class PerPosition {
 public:
  PerPosition(const std::optional<Tensor>& tensor, const char* name, int64_t positions) {
    if (!tensor) return;
    STD_TORCH_CHECK(tensor->dim() == 1 && tensor->size(0) == positions, name, ": expected [",
                    positions, "]");
    data_ = const_cast<Element*>(tensor->const_data_ptr<Element>());
    stride_ = tensor->stride(0);
  }

  explicit operator bool() const { return data_ != nullptr; }
  Element& operator[](int64_t position) const { return data_[position * stride_]; }

 private:
  Element* data_ = nullptr;
  int64_t stride_ = 0;
};

// Which positions count; without a mask all.
class Mask {
 public:
  Mask(const std::optional<Tensor>& mask, int64_t positions) {
    if (!mask) return;
    STD_TORCH_CHECK(mask->dim() == 1 && mask->size(0) == positions, "mask: expected [", positions,
                    "]");
    data_ = mask_bytes(*mask);
    stride_ = mask->stride(0);
  }

  bool counts(int64_t position) const { return data_ == nullptr || data_[position * stride_] != 0; }

 private:
  const uint8_t* data_ = nullptr;
  int64_t stride_ = 0;
};

// A row of an lse [2, M]: the log-sum-exps or their residuals.
std::optional<Tensor> row_of(const std::optional<Tensor>& lse, int64_t row) {
  if (!lse) return std::nullopt;
  check_last_sizes(*lse, "lse", {2, -1});
  return torch::stable::select(*lse, 0, row);
}

// What is known of the positions after the forward.
struct Losses {
  PerPosition<float> loss, z_term, lse, lse_residual;
  PerPosition<int64_t> tokens;

  Losses(const Tensor& loss, const Tensor& z_term, const std::optional<Tensor>& lse,
         const std::optional<Tensor>& tokens, int64_t positions)
      : loss(loss, "loss", positions),
        z_term(z_term, "z_term", positions),
        lse(row_of(lse, 0), "lse", positions),
        lse_residual(row_of(lse, 1), "lse", positions),
        tokens(tokens, "tokens", positions) {}

  void write(int64_t position, const SoftmaxLoss& result, bool counts, int64_t token) const {
    loss[position] = counts ? result.loss : 0;
    z_term[position] = counts ? result.z_term : 0;
    if (lse) lse[position] = result.lse;
    if (lse_residual) lse_residual[position] = result.lse_residual;
    if (tokens) tokens[position] = token;
  }
};

// Calls a function with parts of `count` positions, on all threads.
template <typename Function>
void for_positions(int64_t count, int64_t colors, const Function& function) {
  const int64_t grain = std::max<int64_t>(1, kLogitsWorthAThread / std::max<int64_t>(1, colors));
  torch::stable::parallel_for(0, count, grain, function);
}

// Rows of logits [M, K], whose last stride is 1.
struct LogitRows {
  char* data;
  int64_t stride;  // in bytes

  explicit LogitRows(const Tensor& logits)
      : data(static_cast<char*>(const_cast<void*>(logits.const_data_ptr()))),
        stride(logits.stride(0) * static_cast<int64_t>(logits.element_size())) {
    STD_TORCH_CHECK(logits.dim() == 2 && (logits.stride(1) == 1 || logits.size(1) == 1),
                    "logits: expected [M, K] with a last stride of 1");
  }
  void* operator[](int64_t row) const { return data + row * stride; }
};

SoftmaxShape softmax_shape(const Tensor& logits, double label_smoothing, double z_loss) {
  return {element_type(logits, "logits"), logits.size(1), static_cast<float>(label_smoothing),
          static_cast<float>(z_loss)};
}

void color_cross_entropy(const Tensor logits, const Tensor pixels, std::optional<Tensor> palette,
                         std::optional<Tensor> mask, double label_smoothing, double z_loss,
                         const Tensor loss, const Tensor z_term, const Tensor lse,
                         const Tensor tokens) {
  const SoftmaxShape shape = softmax_shape(logits, label_smoothing, z_loss);
  const SoftmaxKernels& kernels = softmax_kernels();
  const int64_t positions = logits.size(0);
  const LogitRows rows(logits);
  const Targets targets(pixels, palette, positions);
  const Mask counted(mask, positions);
  const Losses losses(loss, z_term, lse, tokens, positions);
  for_positions(positions, shape.colors, [&](int64_t begin, int64_t end) {
    std::vector<int64_t> found(end - begin);
    targets.find(begin, end, found.data());
    for (int64_t i = begin; i < end; ++i) {
      const int64_t token = found[i - begin];
      losses.write(i, kernels.forward(shape, rows[i], token), counted.counts(i), token);
    }
  });
}

// One row's gradient from its lse; zeros where it does not count.
void differentiate_row(const SoftmaxKernels& kernels, const SoftmaxShape& shape, const void* logits,
                       int64_t token, float lse, float lse_residual, float grad, bool counts,
                       void* dlogits) {
  if (counts) return kernels.backward(shape, logits, token, lse, lse_residual, grad, dlogits);
  const int64_t bytes = shape.colors * (shape.type == ElementType::kFloat32 ? 4 : 2);
  std::fill_n(static_cast<char*>(dlogits), bytes, 0);
}

void color_cross_entropy_backward(const Tensor grad, const Tensor logits, const Tensor tokens,
                                  std::optional<Tensor> mask, const Tensor lse,
                                  double label_smoothing, double z_loss, const Tensor dlogits) {
  const SoftmaxShape shape = softmax_shape(logits, label_smoothing, z_loss);
  const SoftmaxKernels& kernels = softmax_kernels();
  const int64_t positions = logits.size(0);
  STD_TORCH_CHECK(dlogits.size(0) == positions && dlogits.size(1) == shape.colors &&
                      dlogits.scalar_type() == logits.scalar_type(),
                  "dlogits: expected the shape and dtype of logits");
  const LogitRows rows(logits), gradients(dlogits);
  const PerPosition<float> upstream(grad, "grad", positions);
  const PerPosition<float> lses(row_of(lse, 0), "lse", positions);
  const PerPosition<float> residuals(row_of(lse, 1), "lse", positions);
  const PerPosition<int64_t> found(tokens, "tokens", positions);
  const Mask counted(mask, positions);
  for_positions(positions, shape.colors, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      differentiate_row(kernels, shape, rows[i], found[i], lses[i], residuals[i], upstream[i],
                        counted.counts(i), gradients[i]);
    }
  });
}

Tensor part_of(Tensor tensor, int64_t begin, int64_t size) {
  return torch::stable::narrow(tensor, 0, begin, size);
}

// out = a b, or with `sum` sum + a b; called from the thread that the operator was called from.
void multiply(const Tensor& out, const Tensor& a, const Tensor& b, const Tensor* sum = nullptr) {
  STABLE_TORCH_ERROR_CODE_CHECK(
      sum ? aoti_torch_cpu_addmm_out(out.get(), sum->get(), a.get(), b.get(), 1, 1)
          : aoti_torch_cpu_mm_out(out.get(), a.get(), b.get()));
}

// The linear form: hidden [M, C] in any dtype, weight [K, C] and bias [K] in float32. The logits of
// a chunk of positions are made, a function turns them into their gradient, and that goes on into
// those of hidden (in its dtype), weight and bias (in float32) which are asked for.
struct Linear {
  const Tensor &hidden, &weight;
  const std::optional<Tensor>&bias, &mask, &dhidden, &dweight, &dbias;

  // function(first position, how many, their logits)
  template <typename Function>
  void for_chunks(const Function& function) const {
    const int64_t positions = hidden.size(0), features = hidden.size(1), colors = weight.size(0);
    const int64_t most = std::min(positions, std::max<int64_t>(1, kChunk / colors));
    const bool wide = element_type(hidden, "hidden") == ElementType::kFloat32;
    const bool copies = !wide || (mask && dweight);
    Tensor all_logits = torch::stable::new_empty(weight, {most, colors});
    Tensor copy = torch::stable::new_empty(weight, {copies ? most : 0, features});
    Tensor weights = weight;
    const Tensor weight_transposed = torch::stable::transpose(weights, 0, 1);
    if (positions == 0 && dweight) torch::stable::zero_(writable(*dweight));
    if (dbias) torch::stable::zero_(writable(*dbias));
    for (int64_t begin = 0; begin < positions; begin += most) {
      const int64_t size = std::min(most, positions - begin);
      Tensor logits = part_of(all_logits, 0, size);
      Tensor input = part_of(hidden, begin, size);
      if (copies) input = copy_of(input, begin, part_of(copy, 0, size));
      multiply(logits, input, weight_transposed, bias ? &*bias : nullptr);
      function(begin, size, logits.mutable_data_ptr<float>());
      if (dweight) {
        multiply(*dweight, torch::stable::transpose(logits, 0, 1), input,
                 begin == 0 ? nullptr : &*dweight);
      }
      if (dbias) add_rows(logits, *dbias);
      if (dhidden) {
        Tensor out = part_of(*dhidden, begin, size);
        if (wide) {
          multiply(out, logits, weight);
        } else {
          multiply(input, logits, weight);
          torch::stable::copy_(out, input);
        }
      }
    }
  }

 private:
  static Tensor& writable(const Tensor& tensor) { return const_cast<Tensor&>(tensor); }

  // In float32, with zeros where a position does not count, which may hold anything.
  Tensor copy_of(const Tensor& input, int64_t begin, Tensor copy) const {
    torch::stable::copy_(copy, input);
    if (!mask) return copy;
    const Mask counted(mask, hidden.size(0));
    const int64_t features = copy.size(1);
    float* data = copy.mutable_data_ptr<float>();
    for (int64_t i = 0; i < copy.size(0); ++i) {
      if (!counted.counts(begin + i)) std::fill_n(data + i * features, features, 0.0f);
    }
    return copy;
  }

  static void add_rows(const Tensor& rows, const Tensor& sums) {
    const SoftmaxKernels& kernels = softmax_kernels();
    const int64_t count = rows.size(0), colors = rows.size(1);
    const int64_t blocks = (colors + 63) / 64;
    for_positions(blocks, 64 * count, [&](int64_t begin, int64_t end) {
      kernels.add_rows(rows.const_data_ptr<float>(), count, colors, 64 * begin,
                       std::min(colors, 64 * end), sums.mutable_data_ptr<float>());
    });
  }
};

void linear_color_cross_entropy(const Tensor hidden, const Tensor weight,
                                std::optional<Tensor> bias, const Tensor pixels,
                                std::optional<Tensor> palette, std::optional<Tensor> mask,
                                double label_smoothing, double z_loss, const Tensor loss,
                                const Tensor z_term, std::optional<Tensor> lse,
                                std::optional<Tensor> tokens, std::optional<Tensor> dhidden,
                                std::optional<Tensor> dweight, std::optional<Tensor> dbias) {
  const SoftmaxShape shape = {ElementType::kFloat32, weight.size(0),
                              static_cast<float>(label_smoothing), static_cast<float>(z_loss)};
  const SoftmaxKernels& kernels = softmax_kernels();
  const int64_t positions = hidden.size(0);
  const Targets targets(pixels, palette, positions);
  const Mask counted(mask, positions);
  const Losses losses(loss, z_term, lse, tokens, positions);
  const bool differentiates = dhidden || dweight || dbias;
  const Linear linear = {hidden, weight, bias, mask, dhidden, dweight, dbias};
  linear.for_chunks([&](int64_t first, int64_t size, float* logits) {
    for_positions(size, shape.colors, [&](int64_t begin, int64_t end) {
      std::vector<int64_t> found(end - begin);
      targets.find(first + begin, first + end, found.data());
      for (int64_t i = begin; i < end; ++i) {
        float* row = logits + i * shape.colors;
        const int64_t token = found[i - begin], position = first + i;
        const bool counts = counted.counts(position);
        const auto kernel = [&] {
          return differentiates ? kernels.differentiate(shape, row, token)
                                : kernels.forward(shape, row, token);
        };
        losses.write(position, kernel(), counts, token);
        if (differentiates && !counts) std::fill_n(row, shape.colors, 0.0f);
      }
    });
  });
}

void linear_color_cross_entropy_backward(const Tensor grad, const Tensor hidden,
                                         const Tensor weight, std::optional<Tensor> bias,
                                         const Tensor tokens, std::optional<Tensor> mask,
                                         const Tensor lse, double label_smoothing, double z_loss,
                                         std::optional<Tensor> dhidden,
                                         std::optional<Tensor> dweight,
                                         std::optional<Tensor> dbias) {
  const SoftmaxShape shape = {ElementType::kFloat32, weight.size(0),
                              static_cast<float>(label_smoothing), static_cast<float>(z_loss)};
  const SoftmaxKernels& kernels = softmax_kernels();
  const int64_t positions = hidden.size(0);
  const PerPosition<float> upstream(grad, "grad", positions);
  const PerPosition<float> lses(row_of(lse, 0), "lse", positions);
  const PerPosition<float> residuals(row_of(lse, 1), "lse", positions);
  const PerPosition<int64_t> found(tokens, "tokens", positions);
  const Mask counted(mask, positions);
  const Linear linear = {hidden, weight, bias, mask, dhidden, dweight, dbias};
  linear.for_chunks([&](int64_t first, int64_t size, float* logits) {
    for_positions(size, shape.colors, [&](int64_t begin, int64_t end) {
      for (int64_t i = first + begin; i < first + end; ++i) {
        float* row = logits + (i - first) * shape.colors;
        differentiate_row(kernels, shape, row, found[i], lses[i], residuals[i], upstream[i],
                          counted.counts(i), row);
      }
    });
  });
}

}  // namespace
}  // namespace gcrl_kernels

STABLE_TORCH_LIBRARY_FRAGMENT(gcrl_kernels_cpu, library) {
  library.def(
      "color_cross_entropy(Tensor logits, Tensor pixels, Tensor? palette, Tensor? mask, "
      "float label_smoothing, float z_loss, Tensor(a!) loss, Tensor(b!) z_term, Tensor(c!) lse, "
      "Tensor(d!) tokens) -> ()");
  library.def(
      "color_cross_entropy_backward(Tensor grad, Tensor logits, Tensor tokens, Tensor? mask, "
      "Tensor lse, float label_smoothing, float z_loss, Tensor(a!) dlogits) -> ()");
  library.def(
      "linear_color_cross_entropy(Tensor hidden, Tensor weight, Tensor? bias, Tensor pixels, "
      "Tensor? palette, Tensor? mask, float label_smoothing, float z_loss, Tensor(a!) loss, "
      "Tensor(b!) z_term, Tensor(c!)? lse, Tensor(d!)? tokens, Tensor(e!)? dhidden, "
      "Tensor(f!)? dweight, Tensor(g!)? dbias) -> ()");
  library.def(
      "linear_color_cross_entropy_backward(Tensor grad, Tensor hidden, Tensor weight, "
      "Tensor? bias, Tensor tokens, Tensor? mask, Tensor lse, float label_smoothing, "
      "float z_loss, Tensor(a!)? dhidden, Tensor(b!)? dweight, Tensor(c!)? dbias) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(gcrl_kernels_cpu, CPU, library) {
  library.impl("color_cross_entropy", TORCH_BOX(&gcrl_kernels::color_cross_entropy));
  library.impl("color_cross_entropy_backward",
               TORCH_BOX(&gcrl_kernels::color_cross_entropy_backward));
  library.impl("linear_color_cross_entropy", TORCH_BOX(&gcrl_kernels::linear_color_cross_entropy));
  library.impl("linear_color_cross_entropy_backward",
               TORCH_BOX(&gcrl_kernels::linear_color_cross_entropy_backward));
}
