// The kernels of one instruction set, included once by a file for each, which defines
//   LEVEL         its namespace
//   VECTOR_BYTES  the size of its vector registers
//   VECTORS       how many vectors of pixels are held in registers while the palette passes by
// Only what is compiled in this namespace may come in: inline code from elsewhere would carry the
// instruction set's code into files that run without it.

#include "color_cross_entropy/nearest_color.h"

namespace gcrl_kernels::LEVEL {
namespace {

template <typename Real>
struct Lanes;

template <>
struct Lanes<float> {
  typedef float Values __attribute__((vector_size(VECTOR_BYTES)));
  typedef int32_t Indices __attribute__((vector_size(VECTOR_BYTES)));
};

template <>
struct Lanes<double> {
  typedef double Values __attribute__((vector_size(VECTOR_BYTES)));
  typedef int64_t Indices __attribute__((vector_size(VECTOR_BYTES)));
};

template <typename Pixel, typename Real>
void find_nearest(const Pixel* pixels, int64_t count, const Real* palette, int64_t colors,
                  int64_t* nearest) {
  using Values = typename Lanes<Real>::Values;
  using Indices = typename Lanes<Real>::Indices;
  constexpr int kLanes = VECTOR_BYTES / sizeof(Real);
  constexpr int kBlock = VECTORS * kLanes;

  for (int64_t begin = 0; begin < count; begin += kBlock) {
    const int size = count - begin < kBlock ? static_cast<int>(count - begin) : kBlock;
    Values red[VECTORS] = {}, green[VECTORS] = {}, blue[VECTORS] = {};
    for (int i = 0; i < size; ++i) {
      const Pixel* pixel = pixels + 3 * (begin + i);
      red[i / kLanes][i % kLanes] = pixel[0];
      green[i / kLanes][i % kLanes] = pixel[1];
      blue[i / kLanes][i % kLanes] = pixel[2];
    }

    Values least[VECTORS];
    Indices index[VECTORS] = {};
    for (Values& distance : least) distance = Values{} + static_cast<Real>(__builtin_inf());
    Indices candidate = {};
    for (const Real* color = palette; color != palette + 3 * colors; color += 3) {
#pragma GCC unroll 8
      for (int v = 0; v < VECTORS; ++v) {
        const Values r = red[v] - color[0], g = green[v] - color[1], b = blue[v] - color[2];
        const Values distance = r * r + g * g + b * b;
        const auto closer = distance < least[v];
        least[v] = closer ? distance : least[v];
        index[v] = closer ? candidate : index[v];
      }
      candidate += 1;
    }

    for (int v = 0; v < VECTORS; ++v) {
      const auto found = least[v] < static_cast<Real>(__builtin_inf());  // no colour: NaN, infinity
      index[v] = found ? index[v] : Indices{} - 1;
    }
    for (int i = 0; i < size; ++i) nearest[begin + i] = index[i / kLanes][i % kLanes];
  }
}

}  // namespace

extern const NearestColor nearest_color = {
    find_nearest<uint8_t, float>,
    find_nearest<float, float>,
    find_nearest<double, double>,
};

}  // namespace gcrl_kernels::LEVEL
