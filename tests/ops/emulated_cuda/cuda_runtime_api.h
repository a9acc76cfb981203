// Stands in for CUDA's header: enough of CUDA C++ to run this project's kernels on a CPU, so that
// their arithmetic and indexing can be tested without a GPU. Every CUDA thread of a block is a
// coroutine; barriers and shuffles hand over to the next one until all have arrived. One block
// runs at a time. It says nothing about speed, races between blocks or alignment.
#pragma once

#include <ucontext.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <memory>
#include <stdexcept>
#include <vector>

#define __global__
#define __device__
#define __shared__
#define __forceinline__ inline
#define __launch_bounds__(...)

using cudaStream_t = void*;

struct float4 {
  float x, y, z, w;
};
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

namespace emulation {

struct Index {
  unsigned x = 0, y = 0, z = 0;
};

struct Warp {
  uint64_t slots[32] = {};
  int64_t arrived = 0;
};

struct Thread {
  ucontext_t context;
  bool finished = false;
  int64_t warp_barriers = 0, block_barriers = 0;
};

struct Block {
  std::vector<Thread> threads;
  std::vector<Warp> warps;
  int64_t arrived = 0;
  unsigned current = 0;
  ucontext_t scheduler;
  std::function<void()> body;
};

inline Block* block = nullptr;
inline Index thread_index, block_index, block_size;

constexpr size_t kStackBytes = 64 * 1024;

// Stacks are kept: one block runs at a time.
inline char* stack_of(unsigned thread) {
  static std::vector<std::unique_ptr<char[]>> stacks;
  while (stacks.size() <= thread) stacks.emplace_back(new char[kStackBytes]);
  return stacks[thread].get();
}

inline Thread& self() { return block->threads[block->current]; }

inline void yield() { swapcontext(&self().context, &block->scheduler); }

// Waits until all `members` threads have come here as often as the caller.
inline void wait_for(int64_t& arrived, int64_t& own, int64_t members) {
  ++arrived;
  ++own;
  while (arrived < own * members) yield();
}

inline void warp_barrier() {
  wait_for(block->warps[block->current / 32].arrived, self().warp_barriers, 32);
}

template <typename T>
T exchange(T value, int source_lane) {
  static_assert(sizeof(T) <= sizeof(uint64_t));
  Warp& warp = block->warps[block->current / 32];
  std::memcpy(&warp.slots[block->current % 32], &value, sizeof(T));
  warp_barrier();
  T received;
  std::memcpy(&received, &warp.slots[source_lane], sizeof(T));
  warp_barrier();
  return received;
}

inline void run_thread() {
  block->body();
  self().finished = true;
  yield();
}

inline void run_block(unsigned threads, const std::function<void()>& body) {
  if (threads % 32 != 0) throw std::runtime_error("a block must consist of whole warps");
  Block here;
  here.threads.resize(threads);
  here.warps.resize(threads / 32);
  here.body = body;
  block = &here;
  block_size.x = threads;
  for (unsigned t = 0; t < threads; ++t) {
    Thread& thread = here.threads[t];
    getcontext(&thread.context);
    thread.context.uc_stack.ss_sp = stack_of(t);
    thread.context.uc_stack.ss_size = kStackBytes;
    makecontext(&thread.context, run_thread, 0);
  }
  for (bool running = true; running;) {
    running = false;
    for (unsigned t = 0; t < threads; ++t) {
      if (here.threads[t].finished) continue;
      running = true;
      here.current = t;
      thread_index.x = t;
      swapcontext(&here.scheduler, &here.threads[t].context);
    }
  }
  block = nullptr;
}

}  // namespace emulation

#define threadIdx emulation::thread_index
#define blockIdx emulation::block_index
#define blockDim emulation::block_size

inline void __syncthreads() {
  emulation::wait_for(emulation::block->arrived, emulation::self().block_barriers,
                      static_cast<int64_t>(emulation::block->threads.size()));
}

template <typename T>
T __shfl_sync(unsigned, T value, int lane, int width) {
  const int own = emulation::block->current % 32;
  return emulation::exchange(value, own / width * width + lane % width);
}

template <typename T>
T __shfl_xor_sync(unsigned, T value, int mask, int) {
  return emulation::exchange(value, (emulation::block->current % 32) ^ mask);
}

template <typename T>
T atomicAdd(T* target, T value) {
  const T before = *target;
  *target += value;
  return before;
}

template <typename T>
T atomicOr(T* target, T value) {
  const T before = *target;
  *target |= value;
  return before;
}

inline long long __double2ll_rn(double number) { return std::llrint(number); }
