#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cstdint>
#include <limits>
#include <optional>

#include "color_cross_entropy/nearest_color.cuh"
#include "color_cross_entropy/quantize_colors.h"
#include "color_cross_entropy/softmax.cuh"
#include "common/cuda_launch.h"
#include "common/tensors.h"

namespace gcrl_kernels::color_cross_entropy {
namespace {

using torch::headeronly::BFloat16;
using torch::headeronly::Half;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

unsigned blocks_for(int64_t items, int64_t each) {
  const int64_t blocks = (items + each - 1) / each;
  STD_TORCH_CHECK(blocks <= std::numeric_limits<int32_t>::max(),
                  "expected fewer positions than 2^31 blocks take, got ", items);
  return static_cast<unsigned>(blocks);
}

template <typename Pixel, typename Color>
void run(const Tensor& pixels, const Tensor& palette, const Tensor& nearest) {
  const int64_t count = nearest.numel();
  void (*kernel)(const Pixel*, int64_t, const Color*, int64_t, int64_t*) = nearest_color;
  launch(kernel, {dim3(blocks_for(count, kThreads * kPixels)), dim3(kThreads)}, pixels,
         pixels.const_data_ptr<Pixel>(), count, palette.const_data_ptr<Color>(), palette.size(0),
         nearest.mutable_data_ptr<int64_t>());
}

Tensor quantize_colors(const Tensor& pixels, const Tensor& palette) {
  const ColorTypes types = check_colors(pixels, palette);
  Tensor nearest = new_indices(pixels);
  if (nearest.numel() == 0) return nearest;
  switch (types) {
    case ColorTypes::kUint8:
      run<uint8_t, int32_t>(pixels, palette, nearest);
      break;
    case ColorTypes::kFloat32:
      run<float, float>(pixels, palette, nearest);
      break;
    case ColorTypes::kFloat64:
      run<double, double>(pixels, palette, nearest);
      break;
  }
  return nearest;
}

void check_logits(const Tensor& logits) {
  STD_TORCH_CHECK(logits.dim() == 2, "logits: expected [M, K], got ", logits.dim(), " dimensions");
  STD_TORCH_CHECK(logits.size(1) >= 1 && logits.size(1) <= kMostLogits, "logits: expected 1 to ",
                  kMostLogits, " colours, got ", logits.size(1));
}

void check_gradient(const Tensor& gradient, const Tensor& logits) {
  check_same_device(gradient, "gradient", logits);
  STD_TORCH_CHECK(gradient.scalar_type() == logits.scalar_type(),
                  "gradient: expected the dtype of logits");
  STD_TORCH_CHECK(gradient.dim() == 2 && gradient.size(0) == logits.size(0) &&
                      gradient.size(1) == logits.size(1),
                  "gradient: expected the shape of logits");
}

// Of a tensor with a number for each position.
void check_positions(const Tensor& tensor, const char* name, ScalarType type, const Tensor& logits,
                     bool contiguous = true) {
  check_same_device(tensor, name, logits);
  STD_TORCH_CHECK(tensor.scalar_type() == type, name, ": unexpected dtype");
  STD_TORCH_CHECK(tensor.dim() == 1 && tensor.size(0) == logits.size(0), name,
                  ": expected a number for each of ", logits.size(0), " positions");
  if (contiguous) check_contiguous(tensor, name);
}

void check_lse(const Tensor& lse, const Tensor& logits) {
  check_same_device(lse, "lse", logits);
  STD_TORCH_CHECK(lse.scalar_type() == ScalarType::Float, "lse: unexpected dtype");
  STD_TORCH_CHECK(lse.dim() == 2 && lse.size(0) == 2 && lse.size(1) == logits.size(0) &&
                      (lse.size(1) <= 1 || lse.stride(1) == 1),
                  "lse: expected two rows of a number for each of ", logits.size(0), " positions");
}

template <typename T>
Logits<T> as_logits(const Tensor& tensor) {
  Logits<T> logits;
  logits.data = static_cast<T*>(const_cast<void*>(tensor.const_data_ptr()));
  for (int d = 0; d < 2; ++d) logits.strides[d] = tensor.size(d) > 1 ? tensor.stride(d) : 0;
  return logits;
}

// Whether rows may be read and written 16 bytes at a time.
template <typename T>
bool is_wide(const Tensor& tensor) {
  return reinterpret_cast<uintptr_t>(tensor.const_data_ptr()) % 16 == 0 && tensor.stride(1) == 1 &&
         tensor.size(1) % kWide<T> == 0 &&
         (tensor.size(0) == 1 || tensor.stride(0) % kWide<T> == 0);
}

int lanes_for(int64_t colors) {
  int lanes = 1;
  while (lanes * kHeld < colors) lanes *= 2;
  return lanes;
}

Smoothing smoothing_of(double label_smoothing, double z_loss) {
  return {static_cast<float>(label_smoothing), static_cast<float>(z_loss)};
}

const uint8_t* mask_of(const std::optional<Tensor>& mask, const Tensor& logits) {
  if (!mask) return nullptr;
  check_positions(*mask, "mask", ScalarType::Bool, logits);
  return mask_bytes(*mask);
}

// Calls a function object's run<T, kWidth>() for the dtype of logits.
template <typename T, typename Run>
void run_for_width(bool wide, const Run& run) {
  if (wide) {
    run.template operator()<T, kWide<T>>();
  } else {
    run.template operator()<T, 1>();
  }
}

template <typename Run>
void run_for_logits(const Tensor& logits, const std::optional<Tensor>& gradient, const Run& run) {
  const auto wide = [&]<typename T>() {
    return is_wide<T>(logits) && (!gradient || is_wide<T>(*gradient));
  };
  switch (logits.scalar_type()) {
    case ScalarType::Float:
      return run_for_width<float>(wide.template operator()<float>(), run);
    case ScalarType::Half:
      return run_for_width<Half>(wide.template operator()<Half>(), run);
    case ScalarType::BFloat16:
      return run_for_width<BFloat16>(wide.template operator()<BFloat16>(), run);
    default:
      STD_TORCH_CHECK(false, "logits: expected float32, float16 or bfloat16");
  }
}

// Calls `run` with the targets: tokens [M], or pixels [M, 3] and a palette.
template <typename Run>
void run_for_targets(const Tensor& pixels, const std::optional<Tensor>& palette,
                     const Tensor& logits, const Run& run) {
  if (!palette) {
    check_positions(pixels, "tokens", ScalarType::Long, logits);
    return run(Tokens{pixels.const_data_ptr<int64_t>()});
  }
  const ColorTypes types = check_colors(pixels, *palette);
  check_contiguous(*palette, "palette");
  check_same_device(pixels, "pixels", logits);
  STD_TORCH_CHECK(pixels.dim() == 2 && pixels.size(0) == logits.size(0),
                  "pixels: expected one for each of ", logits.size(0), " positions");
  STD_TORCH_CHECK(palette->size(0) == logits.size(1), "palette: expected ", logits.size(1),
                  " colours, got ", palette->size(0));
  STD_TORCH_CHECK(types != ColorTypes::kFloat64, "pixels: expected uint8 or float32");
  if (types == ColorTypes::kUint8) {
    return run(NearestColors<uint8_t, int32_t>{pixels.const_data_ptr<uint8_t>(),
                                               palette->const_data_ptr<int32_t>()});
  }
  run(NearestColors<float, float>{pixels.const_data_ptr<float>(),
                                  palette->const_data_ptr<float>()});
}

void forward(const Tensor logits, const Tensor pixels, std::optional<Tensor> palette,
             std::optional<Tensor> mask, double label_smoothing, double z_loss, const Tensor loss,
             const Tensor z_term, std::optional<Tensor> lse, std::optional<Tensor> tokens,
             std::optional<Tensor> gradient) {
  check_logits(logits);
  check_positions(loss, "loss", ScalarType::Float, logits);
  check_positions(z_term, "z_term", ScalarType::Float, logits);
  if (lse) check_lse(*lse, logits);
  if (tokens) check_positions(*tokens, "tokens", ScalarType::Long, logits);
  if (gradient) check_gradient(*gradient, logits);
  if (logits.size(0) == 0) return;
  run_for_targets(pixels, palette, logits, [&]<typename Targets>(const Targets& targets) {
    run_for_logits(logits, gradient, [&]<typename T, int kWidth>() {
      SoftmaxArguments<T> arguments;
      arguments.logits = as_logits<T>(logits);
      if (gradient) arguments.gradient = as_logits<T>(*gradient);
      arguments.mask = mask_of(mask, logits);
      arguments.smoothing = smoothing_of(label_smoothing, z_loss);
      arguments.rows = logits.size(0);
      arguments.colors = static_cast<int>(logits.size(1));
      arguments.lanes = lanes_for(logits.size(1));
      arguments.loss = loss.mutable_data_ptr<float>();
      arguments.z_term = z_term.mutable_data_ptr<float>();
      arguments.lse = lse ? lse->mutable_data_ptr<float>() : nullptr;
      arguments.lse_residuals = lse ? lse->stride(0) : 0;
      arguments.tokens = tokens ? tokens->mutable_data_ptr<int64_t>() : nullptr;
      const int64_t rows_of_block = int64_t{kBlockThreads} / arguments.lanes * kRepeats;
      launch(softmax_forward<T, kWidth, Targets>,
             {dim3(blocks_for(arguments.rows, rows_of_block)), dim3(kBlockThreads)}, logits,
             arguments, targets);
    });
  });
}

void backward(const Tensor grad, const Tensor logits, const Tensor tokens,
              std::optional<Tensor> mask, const Tensor lse, double label_smoothing, double z_loss,
              const Tensor gradient) {
  check_logits(logits);
  check_positions(grad, "grad", ScalarType::Float, logits, false);
  check_positions(tokens, "tokens", ScalarType::Long, logits);
  check_lse(lse, logits);
  check_gradient(gradient, logits);
  if (logits.size(0) == 0) return;
  run_for_logits(logits, gradient, [&]<typename T, int kWidth>() {
    GradientArguments<T> arguments;
    arguments.logits = as_logits<T>(logits);
    arguments.gradient = as_logits<T>(gradient);
    arguments.mask = mask_of(mask, logits);
    arguments.smoothing = smoothing_of(label_smoothing, z_loss);
    arguments.rows = logits.size(0);
    arguments.colors = static_cast<int>(logits.size(1));
    arguments.lanes = lanes_for(logits.size(1));
    arguments.grad = grad.const_data_ptr<float>();
    arguments.grad_stride = grad.stride(0);
    arguments.tokens = tokens.const_data_ptr<int64_t>();
    arguments.lse = lse.const_data_ptr<float>();
    arguments.lse_residuals = lse.stride(0);
    launch(softmax_backward<T, kWidth>,
           {dim3(blocks_for(arguments.rows, kBlockThreads / arguments.lanes)), dim3(kBlockThreads)},
           logits, arguments);
  });
}

}  // namespace
}  // namespace gcrl_kernels::color_cross_entropy

STABLE_TORCH_LIBRARY_FRAGMENT(gcrl_kernels_cuda, library) {
  library.def("quantize_colors(Tensor pixels, Tensor palette) -> Tensor");
  library.def(
      "color_cross_entropy(Tensor logits, Tensor pixels, Tensor? palette, Tensor? mask, "
      "float label_smoothing, float z_loss, Tensor(a!) loss, Tensor(b!) z_term, Tensor(c!)? lse, "
      "Tensor(d!)? tokens, Tensor(e!)? gradient) -> ()");
  library.def(
      "color_cross_entropy_backward(Tensor grad, Tensor logits, Tensor tokens, Tensor? mask, "
      "Tensor lse, float label_smoothing, float z_loss, Tensor(a!) gradient) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(gcrl_kernels_cuda, CUDA, library) {
  library.impl("quantize_colors", TORCH_BOX(&gcrl_kernels::color_cross_entropy::quantize_colors));
  library.impl("color_cross_entropy", TORCH_BOX(&gcrl_kernels::color_cross_entropy::forward));
  library.impl("color_cross_entropy_backward",
               TORCH_BOX(&gcrl_kernels::color_cross_entropy::backward));
}
