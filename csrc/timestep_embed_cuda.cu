// timestep_embed on CUDA: a thread for each (timestep, frequency).
#include "launch.h"

namespace mixar {
namespace {

constexpr int kThreads = 256;

template <typename T> __global__ void __launch_bounds__(kThreads) embed(TimestepEmbed m) {
  const int64_t step = int64_t(gridDim.x) * kThreads;
  for (int64_t at = int64_t(blockIdx.x) * kThreads + threadIdx.x; at < m.rows * m.half; at += step) {
    const int64_t row = at / m.half, i = at % m.half;
    const SinCos value = sin_cos(m.t[row] * m.frequencies[i]);
    T* out = static_cast<T*>(m.out) + row * 2 * m.half + i;
    store(out[0], value.cos);
    store(out[m.half], value.sin);
  }
}

template <typename T> void launch(const TimestepEmbed& m, void* stream) {
  auto kernel = embed<T>;
  const dim3 grid(blocks(m.rows * m.half, kThreads));
  MIXAR_LAUNCH(kernel, grid, dim3(kThreads), static_cast<cudaStream_t>(stream), m);
}

}  // namespace
}  // namespace mixar

int mixar_timestep_embed_cuda(const mixar::TimestepEmbed* m, mixar::Type type, void* stream) {
  if (type == mixar::Type::float64) return -1;
  type == mixar::Type::float32 ? mixar::launch<float>(*m, stream) : mixar::launch<mixar::bfloat16>(*m, stream);
  return int(cudaGetLastError());
}
