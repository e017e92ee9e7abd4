// Shared by the CUDA files. MIXAR_LAUNCH replaces <<<>>>, which other compilers cannot parse.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>

#include "kernels.h"

#ifndef MIXAR_LAUNCH
#define MIXAR_LAUNCH(kernel, grid, block, stream, ...) kernel<<<grid, block, 0, stream>>>(__VA_ARGS__)
#endif

namespace mixar {

constexpr unsigned kAllLanes = 0xffffffff;
constexpr int kWarp = 32;
#ifdef MIXAR_MAX_BLOCKS
constexpr int64_t kMaxBlocks = MIXAR_MAX_BLOCKS;
#else
constexpr int64_t kMaxBlocks = 32768;  // below the limit of a grid's y; kernels stride over the rest
#endif

inline unsigned blocks(int64_t count, int64_t each) {
  return unsigned(std::max<int64_t>(1, std::min((count + each - 1) / each, kMaxBlocks)));
}

}  // namespace mixar
