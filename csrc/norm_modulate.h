// A layer norm with the modulation behind it: the arithmetic of one element and of a row's statistics.
//
// out[r] = h (1 + scale[r]) + shift[r] with h = (x[r] - mean) / sqrt(variance + eps) * weight + bias. All of it is
// float32, in the order of h * scale + h + shift, and is rounded once.
#pragma once

#include <cmath>

#include "types.h"

namespace mixar {

struct NormModulate {
  int64_t rows, width;                 // R, w
  int64_t shift_stride, scale_stride;  // elements from a row to the next: they are columns of a wider tensor
  float eps;
  const void* x;        // [R, w]
  const float* weight;  // [w], or null
  const float* bias;    // [w], or null
  const void* shift;    // [R, w]
  const void* scale;    // [R, w]
  void* out;            // [R, w]
};

// 1 / sqrt(variance + eps), from the sum of squared deviations and 1 / w.
MIXAR_FN float inverse_deviation(float squares, float share, float eps) {
  const float variance = squares * share + eps;
#ifdef __CUDA_ARCH__
  return rsqrtf(variance);
#else
  return 1 / sqrtf(variance);
#endif
}

MIXAR_FN float norm_modulated(
    float x, float mean, float inverse, float weight, float bias, float shift, float scale) {
  const float h = (x - mean) * inverse * weight + bias;
  return h * scale + h + shift;
}

// Calls f with a value of each of three types: of x, of shift and scale, and of the output.
template <typename F> bool norm_modulate_types(Type x, Type modulation, Type out, F f) {
  return with_type(x, [&](auto a) {
    return with_type(modulation, [&](auto b) {
      return with_type(out, [&](auto c) { return f(a, b, c), true; });
    });
  });
}

}  // namespace mixar
