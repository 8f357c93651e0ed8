// Vectors of one instruction set, for the files that are compiled for it, which define
//   LEVEL         its namespace
//   VECTOR_BYTES  the size of its vector registers
// Only what is compiled in this namespace may come in: inline code from elsewhere would carry the
// instruction set's code into files that run without it.
#pragma once

#include <stdint.h>

namespace gcrl_kernels::LEVEL {
namespace {

typedef float Floats __attribute__((vector_size(VECTOR_BYTES)));
typedef float LooseFloats __attribute__((vector_size(VECTOR_BYTES), aligned(4), may_alias));
typedef int32_t Ints __attribute__((vector_size(VECTOR_BYTES)));
typedef uint32_t Words __attribute__((vector_size(VECTOR_BYTES)));
typedef uint16_t LooseHalves __attribute__((vector_size(VECTOR_BYTES / 2), aligned(2), may_alias));

#define ALWAYS_INLINE inline __attribute__((always_inline))

constexpr int kLanes = VECTOR_BYTES / sizeof(float);
constexpr float kInfinity = __builtin_inff();

inline bool is_finite(float x) { return x - x == 0; }

inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

inline int64_t whole_vectors(int64_t count) { return (count + kLanes - 1) / kLanes * kLanes; }

// The numbers from 0 to kLanes - 1, with every bit of kFlip turned over.
template <int kFlip = 0>
inline Ints lanes() {
  Ints index;
#pragma GCC unroll 16
  for (int i = 0; i < kLanes; ++i) index[i] = i ^ kFlip;
  return index;
}

Floats& at(float* data) { return *reinterpret_cast<Floats*>(data); }
const Floats& at(const float* data) { return *reinterpret_cast<const Floats*>(data); }

// Over all lanes, in halves.
template <int kStep = kLanes / 2>
inline float sum_of(Floats values) {
  if constexpr (kStep == 0) return values[0];
  return sum_of<kStep / 2>(values + __builtin_shuffle(values, lanes<kStep>()));
}

template <int kStep = kLanes / 2>
inline float largest_of(Floats values) {
  if constexpr (kStep == 0) return values[0];
  const Floats other = __builtin_shuffle(values, lanes<kStep>());
  return largest_of<kStep / 2>(other > values ? other : values);
}

// exp to about one unit in the last place; 0 below the least normal number. 2^n e^r with
// |r| <= ln(2)/2, where e^r - 1 - r is r² times a polynomial (a minimax fit).
Floats exp(Floats x) {
  constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding it leaves an integer in the low bits
  const Floats shifted = x * 1.44269504f + kRound;
  const Floats n = shifted - kRound;
  const Floats r = (x - n * 0.693145752f) - n * 1.42860677e-6f;
  Floats p = r * 0.0013814467f + 0.008368781f;
  p = p * r + 0.041668393f;
  p = p * r + 0.1666652f;
  p = p * r + 0.49999994f;
  const Floats e = (p * r) * r + r + 1.0f;
  // In words, which may overflow, as they do where x is large or NaN and e is as well.
  const Floats power = (Floats)(((Words)shifted - (Words)(Floats{} + kRound) + 127) << 23);
  return x < -87.3f ? Floats{} : e * power;
}

// Elements of memory as vectors of float32, and back (to nearest, ties to even).
struct Float32 {
  typedef float Element;
  static float widen(float element) { return element; }
  static Floats load(const float* data) {
    return (Floats) * reinterpret_cast<const LooseFloats*>(data);
  }
  static void store(float* data, Floats values) {
    *reinterpret_cast<LooseFloats*>(data) = (LooseFloats)values;
  }
};

struct BFloat16 {
  typedef uint16_t Element;
  static Floats load(const uint16_t* data) {
    const LooseHalves halves = *reinterpret_cast<const LooseHalves*>(data);
    return (Floats)(__builtin_convertvector(halves, Words) << 16);
  }
  static void store(uint16_t* data, Floats values) {
    const Words bits = (Words)values;
    const Words rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
    const Words result = values == values ? rounded : (bits >> 16 | 0x40);
    *reinterpret_cast<LooseHalves*>(data) = __builtin_convertvector(result, LooseHalves);
  }
};

struct Float16 {
  typedef uint16_t Element;
  static Floats load(const uint16_t* data) {
    const LooseHalves halves = *reinterpret_cast<const LooseHalves*>(data);
    const Words bits = __builtin_convertvector(halves, Words);
    const Words shifted = (bits & 0x7fff) << 13;
    // A product by 2^112 moves the exponent, and makes a subnormal number normal.
    const Words finite = (Words)((Floats)shifted * 0x1p112f);
    const Words magnitude = shifted >= 0x0f800000u ? (shifted | 0x7f800000u) : finite;
    return (Floats)(magnitude | (bits & 0x8000u) << 16);
  }
  static void store(uint16_t* data, Floats values) {
    const Words bits = (Words)values, sign = bits >> 16 & 0x8000u, magnitude = bits & 0x7fffffffu;
    const Words normal = (magnitude - 0x38000000u + 0xfff + (magnitude >> 13 & 1)) >> 13;
    // Below 2^-14 the last place is 2^-24: adding 0.5 rounds to it.
    const Words subnormal = (Words)((Floats)magnitude + 0.5f) - (Words)(Floats{} + 0.5f);
    const Words nan = 0x7e00u + Words{}, infinity = 0x7c00u + Words{};
    Words result = magnitude < 0x38800000u ? subnormal : normal;
    result = magnitude >= 0x477ff000u ? infinity : result;
    result = magnitude > 0x7f800000u ? nan : result;
    *reinterpret_cast<LooseHalves*>(data) = __builtin_convertvector(result | sign, LooseHalves);
  }
};

// The first `count` of a vector's elements, zeros after them.
template <typename Type>
Floats load_part(const typename Type::Element* data, int64_t count) {
  if (count >= kLanes) return Type::load(data);
  typename Type::Element padded[kLanes] = {};
  for (int64_t i = 0; i < count; ++i) padded[i] = data[i];
  return Type::load(padded);
}

template <typename Type>
void store_part(typename Type::Element* data, Floats values, int64_t count) {
  if (count >= kLanes) return Type::store(data, values);
  typename Type::Element whole[kLanes];
  Type::store(whole, values);
  for (int64_t i = 0; i < count; ++i) data[i] = whole[i];
}

// Features of any dtype, times a factor, to [width] with zeros after them.
template <typename Type>
void pack(const typename Type::Element* data, int64_t features, float factor, float* packed,
          int64_t width) {
  for (int64_t d = 0; d < width; d += kLanes) {
    at(packed + d) = load_part<Type>(data + d, features - d) * factor;
  }
}

// Where lane i of a vector comes from when squares of kStep exchange halves: a lane of the first
// vector, or, kLanes on, of the second.
template <int kStep, bool kSecond>
inline Ints exchanged() {
  Ints index;
#pragma GCC unroll 16
  for (int i = 0; i < kLanes; ++i) {
    const bool upper = (i & kStep) != 0;
    index[i] = kSecond ? (upper ? i + kLanes : i + kStep) : (upper ? i - kStep + kLanes : i);
  }
  return index;
}

// One vector a row; on return one a column.
template <int kStep = 1>
inline void transpose(Floats (&square)[kLanes]) {
  if constexpr (kStep < kLanes) {
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; ++i) {
      if (i & kStep) continue;
      const Floats a = square[i], b = square[i + kStep];
      square[i] = __builtin_shuffle(a, b, exchanged<kStep, false>());
      square[i + kStep] = __builtin_shuffle(a, b, exchanged<kStep, true>());
    }
    transpose<2 * kStep>(square);
  }
}

// Rows [length, width] to columns [features, stride], with zeros after a column's numbers.
inline void transpose(const float* packed, int64_t width, int64_t length, int64_t features,
                      float* transposed, int64_t stride) {
  for (int64_t i = 0; i < length; i += kLanes) {
    for (int64_t d = 0; d < features; d += kLanes) {
      Floats square[kLanes];
#pragma GCC unroll 16
      for (int j = 0; j < kLanes; ++j) {
        square[j] = i + j < length ? at(packed + (i + j) * width + d) : Floats{};
      }
      transpose(square);
#pragma GCC unroll 16
      for (int j = 0; j < kLanes; ++j) {
        if (d + j < features) at(transposed + (d + j) * stride + i) = square[j];
      }
    }
  }
}

inline int64_t aligned(int64_t floats) { return (floats + 15) / 16 * 16; }

// Scratch memory, handed out piece by piece.
struct Scratch {
  float* next;
  float* take(int64_t floats) {
    float* piece = next;
    next += aligned(floats);
    return piece;
  }
};

}  // namespace
}  // namespace gcrl_kernels::LEVEL
