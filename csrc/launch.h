// Shared by the CUDA files. MIXAR_LAUNCH replaces <<<>>>, which other compilers cannot parse.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <initializer_list>
#include <type_traits>

#include "kernels.h"

#ifndef MIXAR_LAUNCH
#define MIXAR_LAUNCH(kernel, grid, block, stream, ...) kernel<<<grid, block, 0, stream>>>(__VA_ARGS__)
#endif

namespace mixar {

constexpr unsigned kAllLanes = 0xffffffff;
constexpr int kWarp = 32, kThreads = 256;
constexpr int kRows = 4;  // rows that a thread reads before it computes, so that as many loads are in flight
#ifdef MIXAR_MAX_BLOCKS
constexpr int64_t kMaxBlocks = MIXAR_MAX_BLOCKS;
#else
constexpr int64_t kMaxBlocks = 32768;  // below the limit of a grid's y; kernels stride over the rest
#endif

inline unsigned blocks(int64_t count, int64_t each) {
  return unsigned(std::max<int64_t>(1, std::min((count + each - 1) / each, kMaxBlocks)));
}

// A thread for each column of kRows rows, so that no kernel divides an index by a width.
struct Cover {
  dim3 block, grid;

  Cover(int64_t rows, int64_t columns)
      : block(unsigned(std::max<int64_t>(1, std::min<int64_t>(columns, kThreads)))) {
    block.y = kThreads / block.x;
    grid = dim3(blocks(columns, block.x), blocks(rows, block.y * kRows));
  }
};

template <int N, typename T> __device__ Pack<T, N> read(const T* from) {
  return *reinterpret_cast<const Pack<T, N>*>(from);
}

template <typename T, int N> __device__ void write(T* to, const Pack<T, N>& values) {
#ifdef __CUDA_ARCH__
  if constexpr (N > 1) {  // in PTX, since the compiler may store a struct element by element
    constexpr int count = sizeof values / 4;
    uint32_t words[count];
    memcpy(words, &values, sizeof values);
    const size_t address = __cvta_generic_to_global(to);
    if constexpr (count == 2) {
      asm volatile("st.global.v2.b32 [%0], {%1, %2};" ::"l"(address), "r"(words[0]), "r"(words[1]) : "memory");
    } else {
      for (int i = 0; i < count; i += 4) {
        asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(address + 4 * i), "r"(words[i]),
                     "r"(words[i + 1]), "r"(words[i + 2]), "r"(words[i + 3]) : "memory");
      }
    }
    return;
  }
#endif
  *reinterpret_cast<Pack<T, N>*>(to) = values;
}

// Calls launch with how many elements of T a thread accesses at once, as a constant: 16 bytes of them, or one where the
// rows of `width` elements, which begin at these addresses, are not made of whole 16 bytes.
template <typename T, typename F>
void with_vectors(int64_t width, std::initializer_list<const void*> addresses, F launch) {
  constexpr int N = 16 / sizeof(T);
  bool whole = width % N == 0;
  for (const void* address : addresses) whole &= reinterpret_cast<uintptr_t>(address) % 16 == 0;
  whole ? launch(std::integral_constant<int, N>{}) : launch(std::integral_constant<int, 1>{});
}

}  // namespace mixar
