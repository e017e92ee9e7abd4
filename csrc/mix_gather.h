// DC-Mix and TI-Mix (Eqs. 9 and 12) in one pass to the decoder's input: the arithmetic of one position.
//
// out[b, p] = positions[p] + (encoded[slot] at a visible position, else the embedding of the discrete token)
// The embedding is bias + Σ_k s_k W_k over the token's bits s in {-1, +1}, or a row of a table.
#pragma once

#include "types.h"

namespace mixar {

constexpr int kMaxBits = 24;

// The source of the token at each position of a batch.
struct Sources {
  int64_t images, length, prefix;  // B, P, and P - N, the number of positions without codes, which come first
  const int64_t* slots;            // [B, P] rows of the packed encoder output, negative where masked
  const int64_t* codes;            // [B, N] x_d, negative where dropped; null: there are no codes
  const int64_t* drawn;            // [B, N] the prior's tokens; null without TI-Mix, as are the two below
  const float* rho;                // [B, N]
  const float* share;              // [1] λ
};

struct MixGather {
  Sources sources;
  int64_t width, tokens, bits, entries;  // D, T, n, K; `weight` is a table if bits < 0
  const void* encoded;                   // [T, D]
  const void* weight;                    // [D, n], or the table [K, D]
  const void* bias;                      // [D], only with bits
  const void* positions;                 // [P, D]
  void* out;                             // [B, P, D]
};

struct MixGatherBackward {
  Sources sources;
  int64_t width, tokens, bits, groups;
  const void* grad;   // [B, P, D]
  void* d_encoded;    // [T, D]
  void* d_positions;  // [P, D], in the type of accumulators
  void* d_map;        // [groups, n + 1, D], likewise: weight and bias, summed over the positions i = group mod groups
};

struct Source {
  int64_t slot, id;
};

// The source of a position of an image: the slot of a visible token, else the mixed id (Eq. 12).
MIXAR_FN Source source_at(const Sources& sources, int64_t image, int64_t position) {
  const int64_t slot = sources.slots[image * sources.length + position], column = position - sources.prefix;
  if (slot >= 0 || column < 0 || sources.codes == nullptr) return {slot, -1};
  const int64_t code = image * (sources.length - sources.prefix) + column;
  const bool generated = sources.drawn != nullptr && sources.rho[code] >= *sources.share;
  return {slot, generated ? sources.drawn[code] : sources.codes[code]};
}

// The k-th bit of a token as -1 or +1, selected, since a conversion of integers is slow on a GPU.
template <typename A> MIXAR_FN A sign_of(int64_t id, int k) { return (uint32_t(id) >> k & 1) != 0 ? A(1) : A(-1); }

}  // namespace mixar
