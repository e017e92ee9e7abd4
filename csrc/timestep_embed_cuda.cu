// timestep_embed on CUDA. Each thread has some neighbouring frequencies, and takes the sine and cosine for many timesteps.
#include "launch.h"

namespace mixar {
namespace {

template <typename T, int N> __global__ void __launch_bounds__(kThreads) embed(TimestepEmbed m) {
  const int64_t columns = int64_t(gridDim.x) * blockDim.x * N, rows = int64_t(gridDim.y) * blockDim.y;
  for (int64_t i = (int64_t(blockIdx.x) * blockDim.x + threadIdx.x) * N; i < m.half; i += columns) {
    const Pack<float, N> frequencies = read<N>(m.frequencies + i);
    for (int64_t first = int64_t(blockIdx.y) * blockDim.y + threadIdx.y; first < m.rows; first += kRows * rows) {
      float t[kRows];
#pragma unroll
      for (int r = 0; r < kRows; ++r) t[r] = first + r * rows < m.rows ? m.t[first + r * rows] : 0;
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        if (first + r * rows >= m.rows) break;
        Pack<T, N> cos, sin;
#pragma unroll
        for (int c = 0; c < N; ++c) {
          const SinCos value = sin_cos(t[r] * frequencies.at[c]);
          store(cos.at[c], value.cos);
          store(sin.at[c], value.sin);
        }
        T* out = static_cast<T*>(m.out) + (first + r * rows) * 2 * m.half + i;
        write(out, cos);
        write(out + m.half, sin);
      }
    }
  }
}

template <typename T> void launch(const TimestepEmbed& m, void* stream) {
  with_vectors<T>(m.half, {m.frequencies, m.out}, [&](auto n) {
    auto kernel = embed<T, n>;
    const Cover cover(m.rows, m.half / n);
    MIXAR_LAUNCH(kernel, cover.grid, cover.block, static_cast<cudaStream_t>(stream), m);
  });
}

}  // namespace
}  // namespace mixar

int mixar_timestep_embed_cuda(const mixar::TimestepEmbed* m, mixar::Type type, void* stream) {
  if (type == mixar::Type::float64) return -1;
  type == mixar::Type::float32 ? mixar::launch<float>(*m, stream) : mixar::launch<mixar::bfloat16>(*m, stream);
  return int(cudaGetLastError());
}
