// norm_modulate on the CPU: rows in parallel, the channels of a row in vector registers.
#include <algorithm>

#include "kernels.h"

namespace mixar {
namespace {

constexpr int64_t kPart = 32768;  // elements that one thread computes at a time: fewer are not worth a second thread

template <typename X, typename M, typename O> void normalise(const NormModulate& m, int64_t row) {
  const int64_t width = m.width;
  const X* x = static_cast<const X*>(m.x) + row * width;
  const M* shift = static_cast<const M*>(m.shift) + row * m.shift_stride;
  const M* scale = static_cast<const M*>(m.scale) + row * m.scale_stride;
  const float *weight = m.weight, *bias = m.bias;
  O* __restrict out = static_cast<O*>(m.out) + row * width;
  float sum = 0, squares = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t d = 0; d < width; ++d) sum += load(x[d]);
  const float share = 1.0f / float(width), mean = sum * share;
#pragma omp simd reduction(+ : squares)
  for (int64_t d = 0; d < width; ++d) squares += (load(x[d]) - mean) * (load(x[d]) - mean);
  const float inverse = inverse_deviation(squares, share, m.eps);
  for (int64_t d = 0; d < width; ++d) {
    const float w = weight ? weight[d] : 1, b = bias ? bias[d] : 0;
    store(out[d], norm_modulated(load(x[d]), mean, inverse, w, b, load(shift[d]), load(scale[d])));
  }
}

}  // namespace

bool norm_modulate_cpu(const NormModulate& m, Type x, Type modulation, Type out, const Parallel& parallel) {
  return norm_modulate_types(x, modulation, out, [&](auto a, auto b, auto c) {
    const int64_t each = std::max<int64_t>(1, kPart / std::max<int64_t>(1, m.width));  // rows of a part
    parallel((m.rows + each - 1) / each, [&](int64_t begin, int64_t end) {
      for (int64_t row = begin * each; row < std::min(end * each, m.rows); ++row) {
        normalise<decltype(a), decltype(b), decltype(c)>(m, row);
      }
    });
  });
}

}  // namespace mixar
