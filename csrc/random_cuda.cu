// Random numbers on CUDA. Each thread draws some neighbouring columns of many images' rows.
#include "launch.h"

namespace mixar {
namespace {

// N columns of a row from `column` on, a multiple of N.
template <typename Draw, int N>
__device__ Pack<typename Draw::type, N> numbers(uint64_t row, uint64_t start, int64_t column) {
  constexpr int each = Draw::each;
  if constexpr (N < each) {
    return {{Draw::of(bits_of(row, start, column / each)).at[column % each]}};
  } else {
    Pack<typename Draw::type, N> out;
#pragma unroll
    for (int c = 0; c < N; c += each) {
      const auto drawn = Draw::of(bits_of(row, start, (column + c) / each));
      for (int i = 0; i < each; ++i) out.at[c + i] = drawn.at[i];
    }
    return out;
  }
}

template <typename Draw, int N> __global__ void __launch_bounds__(kThreads) draw(Random m) {
  using T = typename Draw::type;
  const int64_t columns = int64_t(gridDim.x) * blockDim.x * N, rows = int64_t(gridDim.y) * blockDim.y;
  for (int64_t column = (int64_t(blockIdx.x) * blockDim.x + threadIdx.x) * N; column < m.count; column += columns) {
    for (int64_t first = int64_t(blockIdx.y) * blockDim.y + threadIdx.y; first < m.images; first += kRows * rows) {
      int64_t index[kRows];
#pragma unroll
      for (int r = 0; r < kRows; ++r) index[r] = first + r * rows < m.images ? m.index[first + r * rows] : 0;
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        if (first + r * rows >= m.images) break;
        T* out = static_cast<T*>(m.out) + (first + r * rows) * m.count + column;
        write(out, numbers<Draw, N>(row_of(m.key, index[r]), m.start, column));
      }
    }
  }
}

template <typename Draw> int launch(const Random* m, void* stream) {
  with_vectors<typename Draw::type>(m->count, {m->out}, [&](auto n) {
    auto kernel = draw<Draw, n>;
    const Cover cover(m->images, m->count / n);
    MIXAR_LAUNCH(kernel, cover.grid, cover.block, static_cast<cudaStream_t>(stream), *m);
  });
  return int(cudaGetLastError());
}

}  // namespace
}  // namespace mixar

int mixar_random_bits_cuda(const mixar::Random* m, void* stream) { return mixar::launch<mixar::Bits>(m, stream); }
int mixar_random_uniform_cuda(const mixar::Random* m, void* stream) { return mixar::launch<mixar::Uniform>(m, stream); }
int mixar_random_normal_cuda(const mixar::Random* m, void* stream) { return mixar::launch<mixar::Normal>(m, stream); }
