// As much of CUDA as the kernels use, on the host, so that their source runs as it stands.
//
// A thread is a fiber. Blocks run one after the other and warps of a block in random order, each up to its next barrier,
// so that what a missing barrier would let another warp read early or late is read early or late. Lanes of a warp run in
// random order up to each shuffle. Barriers and shuffles that not all threads reach together, in the same line, are faults.
#pragma once

#include <ucontext.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <random>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#endif

#define __global__
#define __device__
#define __launch_bounds__(...)
#define __shared__ static  // blocks do not overlap in time
#define MIXAR_LAUNCH(kernel, grid, block, stream, ...) \
  ((void)(stream), emulation::launch(grid, block, [=] { kernel(__VA_ARGS__); }))

using cudaStream_t = void*;

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

namespace emulation {

constexpr int kWarp = 32;
constexpr size_t kStack = 1 << 16;

enum class State { ready, barrier, shuffle, done };

struct Fiber {
  ucontext_t context;
  std::unique_ptr<char[]> stack{new char[kStack]};
  dim3 thread;
  int lane = 0, warp = 0, line = 0;
  unsigned turn = 0;  // shuffles so far: they alternate between two boards, so that none is written while it is read
  State state = State::ready;
};

struct Board {
  char values[kWarp][16];
};

inline std::mt19937 order{0};
inline std::vector<std::unique_ptr<Fiber>> fibers;
inline std::vector<Board> boards;  // two a warp
inline Fiber* running = nullptr;
inline ucontext_t scheduler;
inline std::function<void()> body;
inline dim3 grid, block, at;
inline const char* fault = nullptr;  // the first one since the last cudaGetLastError
inline int fault_line = 0;

inline void fail(const char* what, int line) {
  if (fault == nullptr) fault = what, fault_line = line;
}

#if defined(__SANITIZE_ADDRESS__)
inline const void* main_stack = nullptr;
inline size_t main_size = 0;
inline void leave(void** fake, const void* to, size_t size) { __sanitizer_start_switch_fiber(fake, to, size); }
inline void arrive(void* fake, const void** from, size_t* size) { __sanitizer_finish_switch_fiber(fake, from, size); }
#else
inline const void* main_stack = nullptr;
inline size_t main_size = 0;
inline void leave(void**, const void*, size_t) {}
inline void arrive(void*, const void**, size_t*) {}
#endif

inline void pause(State state, int line) {
  running->state = state, running->line = line;
  void* fake = nullptr;
  leave(&fake, main_stack, main_size);
  swapcontext(&running->context, &scheduler);
  arrive(fake, &main_stack, &main_size);
}

inline void enter() {
  arrive(nullptr, &main_stack, &main_size);
  body();
  running->state = State::done;
  leave(nullptr, main_stack, main_size);
}

inline void resume(Fiber& fiber) {
  running = &fiber, fiber.state = State::ready;
  void* fake = nullptr;
  leave(&fake, fiber.stack.get(), kStack);
  swapcontext(&scheduler, &fiber.context);
  arrive(fake, nullptr, nullptr);
}

// Whether all fibers are done, or wait for the same thing in the same line.
inline bool together(const std::vector<Fiber*>& all, State state) {
  for (const Fiber* fiber : all) {
    if (fiber->state != state || (state != State::done && fiber->line != all[0]->line)) return false;
  }
  return true;
}

// Runs a warp until its lanes all wait at a barrier or are done.
inline void run_warp(std::vector<Fiber*> lanes) {
  for (;;) {
    std::shuffle(lanes.begin(), lanes.end(), order);
    for (Fiber* lane : lanes) {
      if (lane->state == State::ready || lane->state == State::shuffle) resume(*lane);
    }
    bool shuffles = false;
    for (Fiber* lane : lanes) shuffles |= lane->state == State::shuffle;
    if (!shuffles) return;
    if (!together(lanes, State::shuffle)) return fail("a shuffle that not all lanes of the warp take part in", lanes[0]->line);
  }
}

inline void run_block() {
  const int threads = int(block.x * block.y * block.z), warps = (threads + kWarp - 1) / kWarp;
  while (int(fibers.size()) < threads) fibers.push_back(std::make_unique<Fiber>());
  boards.assign(size_t(2 * warps), Board{});
  std::vector<std::vector<Fiber*>> members(static_cast<size_t>(warps));
  std::vector<Fiber*> all;
  for (int i = 0; i < threads; ++i) {
    Fiber& fiber = *fibers[size_t(i)];
    fiber.thread = dim3(unsigned(i) % block.x, unsigned(i) / block.x % block.y, unsigned(i) / block.x / block.y);
    fiber.lane = i % kWarp, fiber.warp = i / kWarp, fiber.turn = 0, fiber.state = State::ready;
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.get();
    fiber.context.uc_stack.ss_size = kStack;
    fiber.context.uc_link = &scheduler;
    makecontext(&fiber.context, enter, 0);
    members[size_t(fiber.warp)].push_back(&fiber);
    all.push_back(&fiber);
  }
  for (;;) {
    std::shuffle(members.begin(), members.end(), order);
    for (auto& lanes : members) run_warp(lanes);
    if (fault != nullptr || together(all, State::done)) return;
    if (!together(all, State::barrier)) return fail("a barrier that not all threads of the block reach", all[0]->line);
    for (Fiber* fiber : all) fiber->state = State::ready;
  }
}

inline void launch(dim3 blocks, dim3 threads, std::function<void()> kernel) {
  grid = blocks, block = threads, body = std::move(kernel);
  const unsigned count = grid.x * grid.y * grid.z;
  std::vector<unsigned> numbers(count);
  for (unsigned i = 0; i < count; ++i) numbers[i] = i;
  std::shuffle(numbers.begin(), numbers.end(), order);
  for (unsigned number : numbers) {
    at = dim3(number % grid.x, number / grid.x % grid.y, number / grid.x / grid.y);
    run_block();
    if (fault != nullptr) return;
  }
}

template <typename T> T shuffle(T value, int lane, int line) {
  static_assert(sizeof(T) <= sizeof(Board::values[0]));
  Board& board = boards[size_t(2 * running->warp) + running->turn++ % 2];
  std::memcpy(board.values[running->lane], &value, sizeof value);
  pause(State::shuffle, line);
  std::memcpy(&value, board.values[unsigned(lane) % kWarp], sizeof value);
  return value;
}

}  // namespace emulation

#define threadIdx (emulation::running->thread)
#define blockIdx (emulation::at)
#define blockDim (emulation::block)
#define gridDim (emulation::grid)
#define __syncthreads() emulation::pause(emulation::State::barrier, __LINE__)
#define __shfl_sync(mask, value, lane) emulation::shuffle(value, lane, (void(mask), __LINE__))

// The line of a fault, which is also told; 0 without one.
inline int cudaGetLastError() {
  if (emulation::fault == nullptr) return 0;
  std::fprintf(stderr, "emulation: %s, line %d\n", emulation::fault, emulation::fault_line);
  emulation::fault = nullptr;
  return emulation::fault_line;
}
