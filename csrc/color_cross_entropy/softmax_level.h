// The kernels of one instruction set, included once by a file for each, which defines LEVEL and
// VECTOR_BYTES as common/vectors_level.h asks.

#include "color_cross_entropy/softmax.h"
#include "common/vectors_level.h"

namespace gcrl_kernels::LEVEL {
namespace {

// Calls a function with the index of each vector of a row and the vector, and says which lanes are
// not of the row in the last one, where zeros stand in for them.
template <typename Type, typename Function>
inline void for_vectors(const typename Type::Element* row, int64_t colors,
                        const Function& function) {
  int64_t j = 0;
  for (; j + kLanes <= colors; j += kLanes) function(j, Type::load(row + j), Ints{});
  if (j == colors) return;
  const Ints beyond = (Ints)(lanes() >= static_cast<int32_t>(colors - j));
  function(j, load_part<Type>(row + j, colors - j), beyond);
}

template <typename Type>
float largest_logit(const typename Type::Element* logits, int64_t colors) {
  const Floats nothing = Floats{} - kInfinity;
  Floats largest = nothing;
  for_vectors<Type>(logits, colors, [&](int64_t, Floats x, Ints beyond) {
    x = beyond ? nothing : x;
    largest = x > largest ? x : largest;
  });
  return largest_of(largest);
}

template <typename Type>
float logit(const typename Type::Element* logits, int64_t token) {
  return load_part<Type>(logits + token, 1)[0];
}

bool is_color(const SoftmaxShape& shape, int64_t token) {
  return token >= 0 && token < shape.colors;
}

// From the sums over a row of exp(x - maximum) and, where labels are smoothed, of x - maximum.
SoftmaxLoss loss_of(const SoftmaxShape& shape, float maximum, float total, float shifted,
                    float target) {
  const float smoothing = shape.label_smoothing, log_total = __builtin_logf(total);
  const float lse = maximum + log_total, residual = (maximum - lse) + log_total;
  const float z_term = shape.z_loss * lse * lse;  // not the square, which may be infinite
  float loss = log_total - (1 - smoothing) * (target - maximum) + z_term;
  if (smoothing != 0) loss -= smoothing / static_cast<float>(shape.colors) * shifted;
  return {loss, z_term, lse, is_finite(residual) ? residual : 0};
}

template <typename Type>
SoftmaxLoss forward_of(const SoftmaxShape& shape, const void* row, int64_t token) {
  const auto* logits = static_cast<const typename Type::Element*>(row);
  const float maximum = largest_logit<Type>(logits, shape.colors);
  Floats total = {}, shifted = {};
  for_vectors<Type>(logits, shape.colors, [&](int64_t, Floats x, Ints beyond) {
    const Floats from_largest = x - maximum;
    total += beyond ? Floats{} : exp(from_largest);
    shifted += beyond ? Floats{} : from_largest;
  });
  const float target = is_color(shape, token) ? logit<Type>(logits, token) : __builtin_nanf("");
  return loss_of(shape, maximum, sum_of(total), sum_of(shifted), target);
}

template <typename Type>
void backward_of(const SoftmaxShape& shape, const void* row, int64_t token, float lse,
                 float lse_residual, float grad, void* out) {
  const auto* logits = static_cast<const typename Type::Element*>(row);
  auto* dlogits = static_cast<typename Type::Element*>(out);
  if (!is_color(shape, token)) grad = __builtin_nanf("");
  const float factor = grad * (1 + 2 * shape.z_loss * lse);
  const float evenly = grad * shape.label_smoothing / static_cast<float>(shape.colors);
  const auto gradient = [=](Floats x) { return exp((x - lse) - lse_residual) * factor - evenly; };
  const int64_t place = is_color(shape, token) ? token : 0;
  const Floats of_target =
      gradient(Floats{} + logit<Type>(logits, place)) - grad * (1 - shape.label_smoothing);
  for_vectors<Type>(logits, shape.colors, [&](int64_t j, Floats x, Ints) {
    store_part<Type>(dlogits + j, gradient(x), shape.colors - j);
  });
  store_part<Type>(dlogits + place, of_target, 1);
}

SoftmaxLoss differentiate(const SoftmaxShape& shape, float* logits, int64_t token) {
  const float maximum = largest_logit<Float32>(logits, shape.colors);
  const float target = is_color(shape, token) ? logits[token] : __builtin_nanf("");
  Floats total = {}, shifted = {};
  for_vectors<Float32>(logits, shape.colors, [&](int64_t j, Floats x, Ints beyond) {
    const Floats from_largest = x - maximum, e = exp(from_largest);
    total += beyond ? Floats{} : e;
    shifted += beyond ? Floats{} : from_largest;
    store_part<Float32>(logits + j, e, shape.colors - j);
  });
  const float sum = sum_of(total);
  const SoftmaxLoss loss = loss_of(shape, maximum, sum, sum_of(shifted), target);
  const float one = is_color(shape, token) ? 1 : __builtin_nanf("");
  const float factor = one * (1 + 2 * shape.z_loss * loss.lse) / sum;
  const float evenly = shape.label_smoothing / static_cast<float>(shape.colors);
  for_vectors<Float32>(logits, shape.colors, [&](int64_t j, Floats e, Ints) {
    store_part<Float32>(logits + j, e * factor - evenly, shape.colors - j);
  });
  if (is_color(shape, token)) logits[token] -= 1 - shape.label_smoothing;
  return loss;
}

void add_rows(const float* rows, int64_t count, int64_t colors, int64_t begin, int64_t end,
              float* sums) {
  for (int64_t j = begin; j < end; j += kLanes) {
    Floats sum = {};
    for (int64_t i = 0; i < count; ++i) {
      sum += load_part<Float32>(rows + i * colors + j, end - j);
    }
    store_part<Float32>(sums + j, load_part<Float32>(sums + j, end - j) + sum, end - j);
  }
}

SoftmaxLoss forward(const SoftmaxShape& shape, const void* logits, int64_t token) {
  switch (shape.type) {
    case ElementType::kFloat32:
      return forward_of<Float32>(shape, logits, token);
    case ElementType::kFloat16:
      return forward_of<Float16>(shape, logits, token);
    case ElementType::kBFloat16:
      return forward_of<BFloat16>(shape, logits, token);
  }
  __builtin_unreachable();
}

void backward(const SoftmaxShape& shape, const void* logits, int64_t token, float lse,
              float lse_residual, float grad, void* dlogits) {
  switch (shape.type) {
    case ElementType::kFloat32:
      return backward_of<Float32>(shape, logits, token, lse, lse_residual, grad, dlogits);
    case ElementType::kFloat16:
      return backward_of<Float16>(shape, logits, token, lse, lse_residual, grad, dlogits);
    case ElementType::kBFloat16:
      return backward_of<BFloat16>(shape, logits, token, lse, lse_residual, grad, dlogits);
  }
}

}  // namespace

extern const SoftmaxKernels softmax_kernels = {forward, backward, differentiate, add_rows};

}  // namespace gcrl_kernels::LEVEL
