// Random numbers on the CPU.
#include <algorithm>

#include "kernels.h"

namespace mixar {
namespace {

constexpr int64_t kPart = 32768;  // numbers that one thread draws at a time: fewer are not worth a second thread

template <typename Draw> void draw(const Random& m, const Parallel& parallel) {
  const int64_t all = m.images * m.count;
  parallel((all + kPart - 1) / kPart, [&](int64_t begin, int64_t end) {
    for (int64_t at = begin * kPart; at < std::min(end * kPart, all);) {
      const int64_t image = at / m.count, first = at % m.count;
      const int64_t last = std::min(m.count, first + std::min(end * kPart, all) - at);
      const uint64_t row = row_of(m.key, m.index[image]), start = m.start;
      auto* out = static_cast<typename Draw::type*>(m.out) + image * m.count;
      for (int64_t column = first; column < last; ++column) {
        out[column] = Draw::of(bits_of(row, start, column)).at[0];
      }
      at += last - first;
    }
  });
}

}  // namespace

void random_bits_cpu(const Random& m, const Parallel& parallel) { draw<Bits>(m, parallel); }
void random_uniform_cpu(const Random& m, const Parallel& parallel) { draw<Uniform>(m, parallel); }

}  // namespace mixar
