// mix_gather on CUDA. A warp computes a tile of 32 x N neighbouring channels of one row after the other, N in each thread.
// The lanes of a warp look up the sources of 32 rows at once, one per lane, and then share them by shuffles.
#include <cassert>

#include "launch.h"

namespace mixar {
namespace {

constexpr int kWarps = 4;  // of a block: they share a tile of the map, or divide the images
constexpr int kPart = 8;   // bits whose sums a thread of the backward pass holds

__device__ Source from_lane(Source mine, int lane) {
  return {__shfl_sync(kAllLanes, mine.slot, lane), __shfl_sync(kAllLanes, mine.id, lane)};
}

template <typename E, typename P, int N> __global__ void __launch_bounds__(kWarp* kWarps) forward(MixGather m) {
  using A = sum_t<P>;
  __shared__ Pack<P, N> map[kMaxBits][kWarp];
  const E* encoded = static_cast<const E*>(m.encoded);
  const P* weight = static_cast<const P*>(m.weight);
  const P* positions = static_cast<const P*>(m.positions);
  const int lane = threadIdx.x;
  const int64_t d = (int64_t(blockIdx.x) * kWarp + lane) * N, rows = m.sources.images * m.sources.length;
  const bool inside = d < m.width;  // a lane past the width still takes part in the shuffles
  if (rows == 0) return;

  Pack<P, N> bias = {};
  if (inside && m.bits >= 0) bias = read<N>(static_cast<const P*>(m.bias) + d);
  for (int k = threadIdx.y; inside && k < m.bits; k += kWarps) {
    for (int c = 0; c < N; ++c) map[k][lane].at[c] = weight[(d + c) * m.bits + k];
  }
  __syncthreads();

  // the lane's row is a position of an image; both advance without a division, which is slow in 64 bits
  const unsigned length = unsigned(m.sources.length), step = gridDim.y * kWarps * kWarp;
  const unsigned warp_start = (blockIdx.y * kWarps + threadIdx.y) * kWarp;
  int64_t image = (warp_start + lane) / length;
  unsigned position = (warp_start + lane) % length;
  for (int64_t first = warp_start; first < rows; first += step) {
    const Source mine = first + lane < rows ? source_at(m.sources, image, position) : Source{-1, -1};
    assert(mine.slot < m.tokens && (m.bits >= 0 || mine.id < m.entries));
    const int count = int(rows - first < kWarp ? rows - first : kWarp);
    for (int j = 0; j < count; j += kRows) {
      Source source[kRows];
      Pack<E, N> seen[kRows];
      Pack<P, N> entry[kRows], place[kRows];  // of a table, or the bias of a dropped token
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        source[r] = from_lane(mine, j + r);
        const unsigned i = __shfl_sync(kAllLanes, position, j + r);
        if (!inside || j + r >= count) continue;
        if (source[r].slot >= 0) seen[r] = read<N>(encoded + source[r].slot * m.width + d);
        entry[r] = bias;
        if (source[r].id >= 0 && m.bits < 0) entry[r] = read<N>(weight + source[r].id * m.width + d);
        place[r] = read<N>(positions + i * m.width + d);
      }
      if (!inside) continue;
      A sums[kRows][N];
      bool coded = false;
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        coded |= source[r].id >= 0;
        for (int c = 0; c < N; ++c) sums[r][c] = load(bias.at[c]);
      }
      for (int k = 0; coded && k < m.bits; ++k) {  // for all rows, without a branch, though some do not need it
        const Pack<P, N> row = map[k][lane];
#pragma unroll
        for (int r = 0; r < kRows; ++r) {
          const A sign = sign_of<A>(source[r].id, k);
          for (int c = 0; c < N; ++c) sums[r][c] += sign * load(row.at[c]);
        }
      }
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        if (j + r >= count) break;
        Pack<P, N> out;
        for (int c = 0; c < N; ++c) {
          const A other = source[r].slot < 0 ? load(entry[r].at[c]) : load(seen[r].at[c]);
          const A sum = source[r].id >= 0 && m.bits >= 0 ? sums[r][c] : other;
          store(out.at[c], sum + load(place[r].at[c]));
        }
        write(static_cast<P*>(m.out) + (first + j + r) * m.width + d, out);
      }
    }
    image += step / length, position += step % length;
    if (position >= length) position -= length, ++image;
  }
}

// The sum of values over the warps of a block, in a fixed order, for each lane.
template <typename A, int N> __device__ Pack<A, N> over_warps(Pack<A, N> (&values)[kWarps][kWarp], Pack<A, N> mine) {
  values[threadIdx.y][threadIdx.x] = mine;
  __syncthreads();
  Pack<A, N> sum = {};
  for (int warp = 0; warp < kWarps; ++warp) {
    for (int c = 0; c < N; ++c) sum.at[c] += values[warp][threadIdx.x].at[c];
  }
  __syncthreads();
  return sum;
}

// A block processes a tile of channels of the positions of one group for kPart of the bits; its warps divide the images
// of a position. Neighbouring blocks read the same gradient for the other bits. Three blocks fit on a multiprocessor.
template <typename E, typename P, int N>
__global__ void __launch_bounds__(kWarp* kWarps, 3) backward(MixGatherBackward m, unsigned parts) {
  using A = sum_t<P>;
  __shared__ Pack<A, N> values[kWarps][kWarp];
  const int lane = threadIdx.x, warp = threadIdx.y, part = blockIdx.x % parts;
  const int64_t d = (int64_t(blockIdx.x / parts) * kWarp + lane) * N, length = m.sources.length, images = m.sources.images;
  const int64_t step = kWarps * length * m.width;
  const bool inside = d < m.width;

  Pack<A, N> d_map[kPart] = {}, d_bias = {};
  for (int64_t i = blockIdx.y; i < length; i += gridDim.y) {
    Pack<A, N> d_position = {};
    for (int64_t first = warp; first < images; first += kWarps * kWarp) {
      const int64_t image = first + kWarps * lane;
      const Source mine = image < images ? source_at(m.sources, image, i) : Source{-1, -1};
      assert(mine.slot < m.tokens);
      const P* from = static_cast<const P*>(m.grad) + (first * length + i) * m.width + d;
      for (int j = 0; j < kWarp && first + kWarps * j < images; j += kRows, from += kRows * step) {
        Pack<P, N> grads[kRows];
#pragma unroll
        for (int r = 0; r < kRows; ++r) {
          if (inside && first + kWarps * (j + r) < images) grads[r] = read<N>(from + r * step);
        }
#pragma unroll
        for (int r = 0; r < kRows; ++r) {
          const Source source = from_lane(mine, j + r);
          if (!inside || first + kWarps * (j + r) >= images) continue;
          Pack<A, N> grad;
          for (int c = 0; c < N; ++c) grad.at[c] = load(grads[r].at[c]), d_position.at[c] += grad.at[c];
          if (source.slot >= 0) {
            if (part != 0) continue;
            Pack<E, N> d_encoded;
            for (int c = 0; c < N; ++c) store(d_encoded.at[c], grad.at[c]);
            write(static_cast<E*>(m.d_encoded) + source.slot * m.width + d, d_encoded);
            continue;
          }
          for (int c = 0; c < N; ++c) d_bias.at[c] += grad.at[c];
          if (source.id < 0) continue;
          const int64_t bits = source.id >> part * kPart;
#pragma unroll
          for (int k = 0; k < kPart; ++k) {
            const A sign = sign_of<A>(bits, k);
            for (int c = 0; c < N; ++c) d_map[k].at[c] += sign * grad.at[c];
          }
        }
      }
    }
    if (part != 0) continue;
    const Pack<A, N> sum = over_warps(values, d_position);
    if (inside && warp == 0) write(static_cast<A*>(m.d_positions) + i * m.width + d, sum);
  }
  if (m.bits < 0) return;

  A* out = static_cast<A*>(m.d_map) + int64_t(blockIdx.y) * (m.bits + 1) * m.width + d;
#pragma unroll
  for (int k = 0; k < kPart; ++k) {
    if (part * kPart + k >= m.bits) break;
    const Pack<A, N> sum = over_warps(values, d_map[k]);
    if (inside && warp == 0) write(out + (part * kPart + k) * m.width, sum);
  }
  if (part != 0) return;
  const Pack<A, N> sum = over_warps(values, d_bias);
  if (inside && warp == 0) write(out + m.bits * m.width, sum);
}

unsigned tiles(int64_t width, int n) { return unsigned((width + kWarp * n - 1) / (kWarp * n)); }

}  // namespace
}  // namespace mixar

using namespace mixar;

int mixar_mix_gather_cuda(const MixGather* m, Type gathered, Type rest, void* stream) {
  const bool known = dispatch(gathered, rest, [&](auto e, auto p) {
    using P = decltype(p);
    with_vectors<P>(m->width, {m->encoded, m->weight, m->bias, m->positions, m->out}, [&](auto n) {
      auto kernel = forward<decltype(e), P, n>;
      const dim3 grid(tiles(m->width, n), blocks(m->sources.images * m->sources.length, kWarps * kWarp));
      MIXAR_LAUNCH(kernel, grid, dim3(kWarp, kWarps), static_cast<cudaStream_t>(stream), *m);
    });
  });
  return known ? int(cudaGetLastError()) : -1;
}

int mixar_mix_gather_backward_cuda(const MixGatherBackward* m, Type gathered, Type rest, void* stream) {
  const unsigned parts = unsigned(std::max<int64_t>(1, (m->bits + kPart - 1) / kPart));
  const bool known = dispatch(gathered, rest, [&](auto e, auto p) {
    using P = decltype(p);
    with_vectors<P>(m->width, {m->grad, m->d_encoded, m->d_positions, m->d_map}, [&](auto n) {
      auto kernel = backward<decltype(e), P, n>;
      const dim3 grid(tiles(m->width, n) * parts, unsigned(m->groups));
      MIXAR_LAUNCH(kernel, grid, dim3(kWarp, kWarps), static_cast<cudaStream_t>(stream), *m, parts);
    });
  });
  return known ? int(cudaGetLastError()) : -1;
}
