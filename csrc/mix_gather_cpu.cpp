// mix_gather on the CPU: rows in parallel, the channels of a row in vector registers.
#include <algorithm>
#include <vector>

#include "kernels.h"

namespace mixar {
namespace {

constexpr int64_t kTile = 64;  // channels that are summed in registers at a time

template <typename E, typename P> void add_row(const E* row, const P* positions, P* __restrict out, int64_t width) {
  for (int64_t d = 0; d < width; ++d) store(out[d], load(row[d]) + load(positions[d]));
}

// The embeddings at masked positions. A quarter of the bits has so few combinations of signs that Σ ±W_k is computed
// once for each of them. The embedding of a token is then the sum of four of these rows.
template <typename P> class Filling {
  using A = sum_t<P>;

 public:
  explicit Filling(const MixGather& m)
      : width_(m.width), quarter_((m.bits + 3) / 4), bias_(size_t(m.width)) {
    if (m.bits < 0) return;
    const P* weight = static_cast<const P*>(m.weight);
    for (int64_t d = 0; d < width_; ++d) bias_[size_t(d)] = load(static_cast<const P*>(m.bias)[d]);
    rows_.resize(size_t((4 << quarter_) * width_));
    std::vector<A> column(bias_.size());
    for (int64_t k = 0; k < m.bits; ++k) {
      for (int64_t d = 0; d < width_; ++d) column[size_t(d)] = load(weight[d * m.bits + k]);
      for (int64_t signs = 0; signs < 1 << quarter_; ++signs) {
        const A sign = sign_of<A>(signs, int(k % quarter_));
        A* sum = rows_.data() + ((k / quarter_ << quarter_) + signs) * width_;
        for (int64_t d = 0; d < width_; ++d) sum[d] += sign * column[size_t(d)];
      }
    }
  }

  // out = positions + bias + Σ_k s_k W_k; for a dropped token, positions + bias
  void add(int64_t id, const P* positions, P* __restrict out) const {
    if (id < 0) return add_row(bias_.data(), positions, out, width_);
    const A *a = row(id, 0), *b = row(id, 1), *c = row(id, 2), *e = row(id, 3), *bias = bias_.data();
    for (int64_t d = 0; d < width_; ++d) store(out[d], (a[d] + b[d]) + (c[d] + e[d]) + bias[d] + load(positions[d]));
  }

 private:
  const A* row(int64_t id, int64_t part) const {
    const int64_t signs = id >> part * quarter_ & ((1 << quarter_) - 1);
    return rows_.data() + ((part << quarter_) + signs) * width_;
  }

  int64_t width_, quarter_;
  std::vector<A> bias_, rows_;  // [D]; [4, 2^quarter, D]
};

template <typename E, typename P> void forward(const MixGather& m, const Parallel& parallel) {
  const E* encoded = static_cast<const E*>(m.encoded);
  const P* table = static_cast<const P*>(m.weight);
  const P* positions = static_cast<const P*>(m.positions);
  const Filling<P> filling(m);
  parallel(m.sources.images * m.sources.length, [&](int64_t begin, int64_t end) {
    for (int64_t at = begin; at < end; ++at) {
      const int64_t image = at / m.sources.length, i = at % m.sources.length;
      const Source source = source_at(m.sources, image, i);
      const P* position = positions + i * m.width;
      P* out = static_cast<P*>(m.out) + at * m.width;
      if (source.slot >= 0) {
        add_row(encoded + source.slot * m.width, position, out, m.width);
      } else if (m.bits >= 0) {
        filling.add(source.id, position, out);
      } else if (source.id >= 0) {
        add_row(table + source.id * m.width, position, out, m.width);
      } else {
        std::copy_n(position, m.width, out);
      }
    }
  });
}

// The gradient of a map [n + 1, D], from four masked rows at a time. For any bits, a row of the map gets one of the
// eight sums ±a ±b ±c + e of the four gradients, or its negative: they are computed once, and each bit adds one.
template <typename P> class MapGradient {
  using A = sum_t<P>;

 public:
  MapGradient(A* map, int64_t bits, int64_t width) : map_(map), bits_(bits), width_(width), rows_(size_t(4 * width)) {
    std::fill_n(map, (bits + 1) * width, A(0));
  }

  void add(const P* grad, int64_t id) {
    if (id < 0) {  // a dropped token contributes only to the bias
      for (int64_t d = 0; d < width_; ++d) map_[bits_ * width_ + d] += load(grad[d]);
      return;
    }
    for (int64_t d = 0; d < width_; ++d) rows_[size_t(held_ * width_ + d)] = load(grad[d]);
    ids_[held_] = id;
    if (++held_ == 4) flush();
  }

  void flush() {
    std::fill(rows_.begin() + held_ * width_, rows_.end(), A(0));
    held_ = 0;
    for (int k = 0; k <= bits_; ++k) {  // bit k of the four tokens; all ones for the bias
      patterns_[k] = 0;
      for (int row = 0; row < 4; ++row) patterns_[k] |= (k == bits_ ? 1 : int(ids_[row] >> k & 1)) << row;
    }
    int64_t begin = 0;
    for (; begin + kTile <= width_; begin += kTile) flush(begin, kTile);
    flush(begin, width_ - begin);
  }

 private:
  __attribute__((always_inline)) void flush(int64_t begin, int64_t count) {
    const A *a = rows_.data() + begin, *b = a + width_, *c = b + width_, *e = c + width_;
    A sums[8][kTile];
    for (int64_t d = 0; d < count; ++d) {
      for (int i = 0; i < 8; ++i) {
        sums[i][d] = (sign_of<A>(i, 0) * a[d] + sign_of<A>(i, 1) * b[d]) + (sign_of<A>(i, 2) * c[d] + e[d]);
      }
    }
    for (int k = 0; k <= bits_; ++k) {
      const A sign = sign_of<A>(patterns_[k], 3);
      const A* sum = sums[(sign < 0 ? ~patterns_[k] : patterns_[k]) & 7];
      A* map = map_ + k * width_ + begin;
      for (int64_t d = 0; d < count; ++d) map[d] += sign * sum[d];
    }
  }

  A* map_;
  int64_t bits_, width_, held_ = 0;
  std::vector<A> rows_;
  int64_t ids_[4] = {};
  int patterns_[kMaxBits + 1] = {};
};

template <typename E, typename P> void backward(const MixGatherBackward& m, const Parallel& parallel) {
  using A = sum_t<P>;
  const P* grads = static_cast<const P*>(m.grad);
  parallel(m.groups, [&](int64_t begin, int64_t end) {
    for (int64_t group = begin; group < end; ++group) {
      // without bits nothing is added to it
      MapGradient<P> map(static_cast<A*>(m.d_map) + group * (m.bits + 1) * m.width, m.bits, m.width);
      for (int64_t i = group; i < m.sources.length; i += m.groups) {
        A* d_position = static_cast<A*>(m.d_positions) + i * m.width;
        std::fill_n(d_position, m.width, A(0));
        for (int64_t image = 0; image < m.sources.images; ++image) {
          const int64_t at = image * m.sources.length + i;
          const P* grad = grads + at * m.width;
          const Source source = source_at(m.sources, image, i);
          for (int64_t d = 0; d < m.width; ++d) d_position[d] += load(grad[d]);
          if (source.slot >= 0) {
            E* d_encoded = static_cast<E*>(m.d_encoded) + source.slot * m.width;
            for (int64_t d = 0; d < m.width; ++d) store(d_encoded[d], load(grad[d]));
          } else if (m.bits >= 0) {
            map.add(grad, source.id);
          }
        }
      }
      map.flush();
    }
  });
}

}  // namespace

bool mix_gather_cpu(const MixGather& m, Type gathered, Type rest, const Parallel& parallel) {
  return dispatch(gathered, rest, [&](auto e, auto p) { forward<decltype(e), decltype(p)>(m, parallel); });
}

bool mix_gather_backward_cpu(const MixGatherBackward& m, Type gathered, Type rest, const Parallel& parallel) {
  return dispatch(gathered, rest, [&](auto e, auto p) { backward<decltype(e), decltype(p)>(m, parallel); });
}

}  // namespace mixar
