// Random numbers as a function of a key, an image and a counter: the arithmetic of one number.
//
// The generator is SplitMix64 (Steele, Lea, Flood 2014): a counter times the golden ratio, followed by a 64-bit
// finaliser. An image's row of numbers starts at the finalised sum of the key and the image's index, scaled likewise.
#pragma once

#include "timestep_embed.h"

namespace mixar {

struct Random {
  int64_t images, count;  // B, and how many numbers each image gets
  uint64_t key, start;    // the hash of seed and stream, and the counter before the first number
  const int64_t* index;   // [B]
  void* out;              // [B, count]
};

constexpr uint64_t kGolden = 0x9E3779B97F4A7C15;

MIXAR_FN uint64_t finalise(uint64_t x) {
  x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9;
  x = (x ^ x >> 27) * 0x94D049BB133111EB;
  return x ^ x >> 31;
}

MIXAR_FN uint64_t row_of(uint64_t key, int64_t index) { return finalise(key + uint64_t(index) * kGolden); }

// The i-th 64 bits of a row.
MIXAR_FN uint64_t bits_of(uint64_t row, uint64_t start, int64_t i) {
  return finalise(row + (start + 1 + uint64_t(i)) * kGolden);
}

// What is made of 64 bits: so many (`each`) neighbouring numbers.
struct Bits {
  using type = int64_t;
  static constexpr int each = 1;
  static MIXAR_FN Pack<type, each> of(uint64_t bits) { return {{int64_t(bits)}}; }
};

// Uniform on [0, 1) in steps of 2^-24.
struct Uniform {
  using type = float;
  static constexpr int each = 1;
  static MIXAR_FN Pack<type, each> of(uint64_t bits) { return {{float(uint32_t(bits >> 40)) * 0x1p-24f}}; }
};

// Standard normal, a pair by Box and Muller.
struct Normal {
  using type = float;
  static constexpr int each = 2;
  static MIXAR_FN Pack<type, each> of(uint64_t bits) {
    const float u1 = float(uint32_t(bits >> 40) + 1) * 0x1p-24f;  // (0, 1]: its logarithm is finite
    const float u2 = float(uint32_t(bits >> 8) & 0xFFFFFF) * 0x1p-24f;
    const float radius = sqrtf(-2 * logf(u1));
    const SinCos angle = sin_cos(6.2831853071795865f * u2);
    return {{radius * angle.cos, radius * angle.sin}};
  }
};

}  // namespace mixar
