// Element types and launching, for the CPU and CUDA files alike. No torch header is included here or in any kernel.
#pragma once

#include <cstdint>
#include <cstring>
#include <functional>

#ifdef __CUDACC__
#define MIXAR_FN __host__ __device__ inline
#else
#define MIXAR_FN inline
#endif

namespace mixar {

enum class Type { float32, bfloat16, float64 };

struct bfloat16 {
  uint16_t bits;
};

// The type of accumulators.
template <typename T> struct Sum { using type = float; };
template <> struct Sum<double> { using type = double; };
template <typename T> using sum_t = typename Sum<T>::type;

MIXAR_FN float load(float x) { return x; }
MIXAR_FN double load(double x) { return x; }
MIXAR_FN float load(bfloat16 x) {
  const uint32_t bits = uint32_t(x.bits) << 16;
  float value;
  memcpy(&value, &bits, sizeof value);
  return value;
}

MIXAR_FN void store(float& to, float x) { to = x; }
MIXAR_FN void store(double& to, double x) { to = x; }
MIXAR_FN void store(bfloat16& to, float x) {
#ifdef __CUDA_ARCH__
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(to.bits) : "f"(x));
#else
  uint32_t bits;
  memcpy(&bits, &x, sizeof bits);
  // to the nearest, ties to even; a NaN stays a NaN, though rounding could clear its mantissa
  to.bits = uint16_t(x != x ? 0x7fc0 : (bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
#endif
}

// N neighbouring elements, which a thread reads or writes at once, 16 bytes in each access.
template <typename T, int N> struct alignas(sizeof(T) * N < 16 ? sizeof(T) * N : 16) Pack {
  T at[N];
};

// Calls f with a value of each of two types: of gathered values, and of parameters and output.
template <typename F> bool dispatch(Type gathered, Type rest, F f) {
  if (gathered == Type::float32 && rest == Type::float32) return f(float{}, float{}), true;
  if (gathered == Type::bfloat16 && rest == Type::float32) return f(bfloat16{}, float{}), true;
  if (gathered == Type::bfloat16 && rest == Type::bfloat16) return f(bfloat16{}, bfloat16{}), true;
  if (gathered == Type::float64 && rest == Type::float64) return f(double{}, double{}), true;
  return false;
}

// Calls f, which says whether it knows the value's type, with a value of a type of 16 or 32 bits.
template <typename F> bool with_type(Type type, F f) {
  if (type == Type::float32) return f(float{});
  return type == Type::bfloat16 && f(bfloat16{});
}

// Runs body(begin, end) over parts of 0..count, in threads if possible.
using Body = std::function<void(int64_t begin, int64_t end)>;
using Parallel = std::function<void(int64_t count, const Body& body)>;

}  // namespace mixar
