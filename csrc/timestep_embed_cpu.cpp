// timestep_embed on the CPU.
#include "kernels.h"

namespace mixar {
namespace {

template <typename T> void forward(const TimestepEmbed& m, const Parallel& parallel) {
  parallel(m.rows, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      T* out = static_cast<T*>(m.out) + row * 2 * m.half;
      const float t = m.t[row];
      for (int64_t i = 0; i < m.half; ++i) {
        const SinCos value = sin_cos(t * m.frequencies[i]);
        store(out[i], value.cos);
        store(out[m.half + i], value.sin);
      }
    }
  });
}

}  // namespace

bool timestep_embed_cpu(const TimestepEmbed& m, Type type, const Parallel& parallel) {
  if (type == Type::float32) return forward<float>(m, parallel), true;
  if (type == Type::bfloat16) return forward<bfloat16>(m, parallel), true;
  return false;
}

}  // namespace mixar
