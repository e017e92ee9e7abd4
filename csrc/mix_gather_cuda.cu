// mix_gather on CUDA. Each thread computes some channels, and neighbouring threads of a warp neighbouring channels. The
// lanes of a warp look up the sources of 32 positions at once, one per lane, and then share them by shuffles.
#include <cassert>

#include "launch.h"

namespace mixar {
namespace {

constexpr int kColumns = 128;  // channels per block in the forward pass
constexpr int kWarps = 8;      // images that a block of the backward pass processes at once

__device__ Source from_lane(Source mine, int lane) {
  return {__shfl_sync(kAllLanes, mine.slot, lane), __shfl_sync(kAllLanes, mine.id, lane)};
}

template <typename E, typename P> __global__ void __launch_bounds__(kColumns) forward(MixGather m) {
  using A = sum_t<P>;
  const E* encoded = static_cast<const E*>(m.encoded);
  const P* weight = static_cast<const P*>(m.weight);
  const P* positions = static_cast<const P*>(m.positions);
  P* out = static_cast<P*>(m.out);
  const int lane = threadIdx.x % kWarp;
  const int64_t d = int64_t(blockIdx.x) * kColumns + threadIdx.x;
  const bool inside = d < m.width;  // a lane past the width still takes part in the shuffles

  A map[kMaxBits], bias = 0;
#pragma unroll
  for (int k = 0; k < kMaxBits; ++k) map[k] = inside && k < m.bits ? load(weight[d * m.bits + k]) : 0;
  if (inside && m.bits >= 0) bias = load(static_cast<const P*>(m.bias)[d]);

  const int64_t rows = m.sources.images * m.sources.length;
  for (int64_t first = int64_t(blockIdx.y) * kWarp; first < rows; first += int64_t(gridDim.y) * kWarp) {
    const Source mine = first + lane < rows ? source_at(m.sources, first + lane) : Source{-1, -1};
    for (int j = 0; j < kWarp && first + j < rows; ++j) {
      const Source source = from_lane(mine, j);
      if (!inside) continue;
      A sum = bias;
      if (source.slot >= 0) {
        assert(source.slot < m.tokens);
        sum = load(encoded[source.slot * m.width + d]);
      } else if (m.bits >= 0) {
#pragma unroll
        for (int k = 0; k < kMaxBits; ++k) {
          if (k < m.bits) sum += sign_of<A>(source.id, k) * map[k];
        }
      } else if (source.id >= 0) {
        assert(source.id < m.entries);
        sum = load(weight[source.id * m.width + d]);
      }
      store(out[(first + j) * m.width + d], sum + load(positions[(first + j) % m.sources.length * m.width + d]));
    }
  }
}

// The sum of a value over the warps of a block, in a fixed order, for each lane.
template <typename A> __device__ A over_warps(A (&values)[kWarps][kWarp], A mine) {
  values[threadIdx.y][threadIdx.x] = mine;
  __syncthreads();
  A sum = 0;
  for (int warp = 0; warp < kWarps; ++warp) sum += values[warp][threadIdx.x];
  __syncthreads();
  return sum;
}

// A block processes 32 channels of the positions of one group; its warps divide the images of a position.
template <typename E, typename P> __global__ void __launch_bounds__(kWarp* kWarps) backward(MixGatherBackward m) {
  using A = sum_t<P>;
  __shared__ A values[kWarps][kWarp];
  const P* grads = static_cast<const P*>(m.grad);
  E* d_encoded = static_cast<E*>(m.d_encoded);
  const int lane = threadIdx.x, warp = threadIdx.y;
  const int64_t d = int64_t(blockIdx.x) * kWarp + lane, length = m.sources.length, images = m.sources.images;
  const bool inside = d < m.width;

  A d_map[kMaxBits] = {}, d_bias = 0;
  for (int64_t i = blockIdx.y; i < length; i += gridDim.y) {
    A d_position = 0;
    for (int64_t first = warp; first < images; first += kWarps * kWarp) {
      const int64_t image = first + kWarps * lane;
      const Source mine = image < images ? source_at(m.sources, image * length + i) : Source{-1, -1};
      for (int j = 0; j < kWarp && first + kWarps * j < images; ++j) {
        const Source source = from_lane(mine, j);
        if (!inside) continue;
        const A grad = load(grads[((first + kWarps * j) * length + i) * m.width + d]);
        d_position += grad;
        if (source.slot >= 0) {
          assert(source.slot < m.tokens);
          store(d_encoded[source.slot * m.width + d], grad);
        } else {
          d_bias += grad;
#pragma unroll
          for (int k = 0; k < kMaxBits; ++k) {
            if (k < m.bits) d_map[k] += sign_of<A>(source.id, k) * grad;
          }
        }
      }
    }
    const A sum = over_warps(values, d_position);
    if (inside && warp == 0) static_cast<A*>(m.d_positions)[i * m.width + d] = sum;
  }
  if (m.bits < 0) return;

  A* out = static_cast<A*>(m.d_map) + int64_t(blockIdx.y) * (m.bits + 1) * m.width + d;
#pragma unroll
  for (int k = 0; k < kMaxBits; ++k) {
    if (k < m.bits) {
      const A sum = over_warps(values, d_map[k]);
      if (inside && warp == 0) out[k * m.width] = sum;
    }
  }
  const A sum = over_warps(values, d_bias);
  if (inside && warp == 0) out[m.bits * m.width] = sum;
}

}  // namespace
}  // namespace mixar

using namespace mixar;

int mixar_mix_gather_cuda(const MixGather* m, Type gathered, Type rest, void* stream) {
  const dim3 grid(unsigned((m->width + kColumns - 1) / kColumns), blocks(m->sources.images * m->sources.length, kWarp));
  const bool known = dispatch(gathered, rest, [&](auto e, auto p) {
    auto kernel = forward<decltype(e), decltype(p)>;
    MIXAR_LAUNCH(kernel, grid, dim3(kColumns), static_cast<cudaStream_t>(stream), *m);
  });
  return known ? int(cudaGetLastError()) : -1;
}

int mixar_mix_gather_backward_cuda(const MixGatherBackward* m, Type gathered, Type rest, void* stream) {
  const dim3 grid(unsigned((m->width + kWarp - 1) / kWarp), unsigned(m->groups));
  const bool known = dispatch(gathered, rest, [&](auto e, auto p) {
    auto kernel = backward<decltype(e), decltype(p)>;
    MIXAR_LAUNCH(kernel, grid, dim3(kWarp, kWarps), static_cast<cudaStream_t>(stream), *m);
  });
  return known ? int(cudaGetLastError()) : -1;
}
