// quantize_colors DTYPE COUNT COLORS: reads pixels and palette, writes indices, all as bare bytes.

#include "cuda.h"
// The emulated language comes first.
#include <cmath>
#include <iostream>
#include <string>

#include "color_cross_entropy/nearest_color.cuh"

using namespace gcrl_kernels::color_cross_entropy;

template <typename T>
std::vector<T> read(int64_t count) {
  std::vector<T> values(count);
  std::cin.read(reinterpret_cast<char*>(values.data()), count * sizeof(T));
  return values;
}

template <typename Pixel, typename Color>
void quantize(int64_t count, int64_t colors) {
  const auto pixels = read<Pixel>(3 * count);
  const auto palette = read<Color>(3 * colors);
  std::vector<int64_t> nearest(count, -2);
  void (*kernel)(const Pixel*, int64_t, const Color*, int64_t, int64_t*) = nearest_color;
  const int64_t blocks = (count + kThreads * kPixels - 1) / (kThreads * kPixels);
  emulator::launch(kernel, static_cast<unsigned>(blocks), kThreads, 0, pixels.data(), count,
                   palette.data(), colors, nearest.data());
  std::cout.write(reinterpret_cast<const char*>(nearest.data()), count * sizeof(int64_t));
}

int main(int, char** arguments) {
  const std::string dtype = arguments[1];
  const int64_t count = std::stoll(arguments[2]), colors = std::stoll(arguments[3]);
  if (dtype == "uint8") quantize<uint8_t, int32_t>(count, colors);
  if (dtype == "float32") quantize<float, float>(count, colors);
  if (dtype == "float64") quantize<double, double>(count, colors);
}
