// norm_modulate on CUDA. A block computes one row after the other, and holds it in registers: it is read once.
#include "launch.h"

namespace mixar {
namespace {

constexpr int kHeld = 4;    // vectors of a row that a thread holds
constexpr int kMost = 512;  // threads of a block: with 16 bytes in each access they hold 8192 elements

// The sum over the threads of a block, in a fixed order, for each thread. No barrier follows: the next call takes
// another array, and its barrier comes before the one that takes this array again.
__device__ float over_block(float (&sums)[kMost / kWarp], float mine) {
  const int lane = threadIdx.x % kWarp, warps = blockDim.x / kWarp;
#pragma unroll
  for (int away = kWarp / 2; away > 0; away /= 2) mine += __shfl_sync(kAllLanes, mine, lane ^ away);
  if (lane == 0) sums[threadIdx.x / kWarp] = mine;
  __syncthreads();
  float sum = 0;
  for (int warp = 0; warp < warps; ++warp) sum += sums[warp];
  return sum;
}

template <typename X, typename M, int N> struct Columns {
  Pack<X, N> x;
  Pack<M, N> shift, scale;
};

template <typename X, typename M, typename O, int N>
__global__ void __launch_bounds__(kMost, 1) normalise(NormModulate m, float share) {
  __shared__ float sums[2][kMost / kWarp];
  const unsigned width = unsigned(m.width), begin = threadIdx.x * N, step = blockDim.x * N;
  for (int64_t row = blockIdx.x; row < m.rows; row += gridDim.x) {
    const X* x = static_cast<const X*>(m.x) + row * m.width;
    const M* shift = static_cast<const M*>(m.shift) + row * m.shift_stride;
    const M* scale = static_cast<const M*>(m.scale) + row * m.scale_stride;
    O* out = static_cast<O*>(m.out) + row * m.width;
    const auto columns = [&](unsigned d) {
      return Columns<X, M, N>{read<N>(x + d), read<N>(shift + d), read<N>(scale + d)};
    };
    Columns<X, M, N> held[kHeld];
#pragma unroll
    for (int k = 0; k < kHeld; ++k) {
      if (begin + k * step < width) held[k] = columns(begin + k * step);
    }
    // f(d, columns from d on) for all of the thread's; those of a wide row that are not held are read again
    const auto each = [&](auto f) {
#pragma unroll
      for (int k = 0; k < kHeld; ++k) {
        if (begin + k * step < width) f(begin + k * step, held[k]);
      }
      for (unsigned d = begin + kHeld * step; d < width; d += step) f(d, columns(d));
    };

    float sum = 0, squares = 0;
    each([&](unsigned, const Columns<X, M, N>& from) {
      for (int c = 0; c < N; ++c) sum += load(from.x.at[c]);
    });
    const float mean = over_block(sums[0], sum) * share;
    each([&](unsigned, const Columns<X, M, N>& from) {
      for (int c = 0; c < N; ++c) squares += (load(from.x.at[c]) - mean) * (load(from.x.at[c]) - mean);
    });
    const float inverse = inverse_deviation(over_block(sums[1], squares), share, m.eps);
    each([&](unsigned d, const Columns<X, M, N>& from) {
      Pack<float, N> weight, bias;
      for (int c = 0; c < N; ++c) weight.at[c] = 1, bias.at[c] = 0;
      if (m.weight != nullptr) weight = read<N>(m.weight + d);
      if (m.bias != nullptr) bias = read<N>(m.bias + d);
      Pack<O, N> values;
      for (int c = 0; c < N; ++c) {
        store(values.at[c], norm_modulated(load(from.x.at[c]), mean, inverse, weight.at[c], bias.at[c],
                                           load(from.shift.at[c]), load(from.scale.at[c])));
      }
      write(out + d, values);
    });
  }
}

template <typename X, typename M, typename O> void launch(const NormModulate& m, void* stream) {
  using Larger = std::conditional_t<(sizeof(X) > sizeof(M)), X, M>;
  const M *shift = static_cast<const M*>(m.shift), *scale = static_cast<const M*>(m.scale);
  // the second rows, too, must begin at whole 16 bytes
  const std::initializer_list<const void*> addresses = {
      m.x, m.weight, m.bias, shift, shift + m.shift_stride, scale, scale + m.scale_stride, m.out};
  with_vectors<Larger>(m.width, addresses, [&](auto n) {
    auto kernel = normalise<X, M, O, n>;
    const int64_t warps = 1 + (m.width - 1) / (kWarp * kHeld * n);
    const dim3 block(unsigned(std::min<int64_t>(kWarp * warps, kMost)));
    MIXAR_LAUNCH(kernel, blocks(m.rows, 1), block, static_cast<cudaStream_t>(stream), m, 1.0f / float(m.width));
  });
}

}  // namespace
}  // namespace mixar

int mixar_norm_modulate_cuda(
    const mixar::NormModulate* m, mixar::Type x, mixar::Type modulation, mixar::Type out, void* stream) {
  const bool known = mixar::norm_modulate_types(x, modulation, out, [&](auto a, auto b, auto c) {
    mixar::launch<decltype(a), decltype(b), decltype(c)>(*m, stream);
  });
  return known ? int(cudaGetLastError()) : -1;
}
