// Sinusoidal features of a timestep: the arithmetic of one (timestep, frequency).
//
// out[r, i] = cos(t[r] f[i]) and out[r, half + i] = sin(t[r] f[i]). The angle is rounded to float32 first, like a
// product of float32 tensors. Every processor uses this sine and cosine, so that results agree up to rounding.
#pragma once

#include <cmath>

#include "types.h"

namespace mixar {

struct TimestepEmbed {
  int64_t rows, half;
  const float* t;            // [R]
  const float* frequencies;  // [half]
  void* out;                 // [R, 2 half]
};

struct SinCos {
  float sin, cos;
};

// Within 2e-7 for |x| < 1e5.
MIXAR_FN SinCos sin_cos(float x) {
  // reduce to |r| <= π/4 by multiples of π/2, given in three parts; adding 1.5 * 2^23 rounds to an integer
  const float quarter = (x * 0.6366197723675814f + 12582912.0f) - 12582912.0f;
  float r = fmaf(quarter, -1.5707963705062866f, x);
  r = fmaf(quarter, 4.371138828673793e-08f, r);
  r = fmaf(quarter, 1.7151245100058819e-15f, r);
  // minimax polynomials in r² with a relative error below 2^-28
  const float y = r * r;
  const float s = fmaf(r * y, fmaf(y, fmaf(y, -0.000195172965f, 0.008332178f), -0.166666552f), r);
  const float c = fmaf(y * y, fmaf(y, fmaf(y, 2.44384501e-05f, -0.00138873677f), 0.0416666456f), fmaf(y, -0.5f, 1.0f));
  const int turn = int(quarter);
  const float sin = (turn & 1) != 0 ? c : s, cos = (turn & 1) != 0 ? s : c;
  return {(turn & 2) != 0 ? -sin : sin, ((turn + 1) & 2) != 0 ? -cos : cos};
}

}  // namespace mixar
