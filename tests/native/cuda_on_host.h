// enough of CUDA to run a kernel on the CPU, for tests where there is no GPU: a block's threads are fibres that take
// turns between barriers, in an order drawn anew for every turn, so that a missing barrier changes the result from seed
// to seed. Shared memory begins as NaN, and a barrier that not all threads reach is an error.
#pragma once

#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <limits>
#include <numeric>
#include <random>
#include <vector>

#define AVFAST_CUDA_ON_HOST
#define AVFAST_SHARED(name) float* const name = cuda_on_host::block.shared.data()
#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __noinline__
#define __launch_bounds__(...)
#define __grid_constant__

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
  explicit dim3(unsigned a = 1, unsigned b = 1, unsigned c = 1) : x(a), y(b), z(c) {}
};

namespace cuda_on_host {

struct Fibre {
  ucontext_t context;
  std::vector<char> stack = std::vector<char>(256 << 10);
  dim3 thread;
  bool done = false;
};

struct Block {
  std::vector<float> shared;
  std::vector<Fibre> fibres;
  ucontext_t scheduler;
  Fibre* running = nullptr;
  std::function<void()> body;
  dim3 index;
};

inline Block block;
inline unsigned seed = 0;

inline void enter() {
  block.body();
  block.running->done = true;
  swapcontext(&block.running->context, &block.scheduler);
}

inline void run_block(dim3 threads, std::mt19937& random) {
  block.fibres.resize(threads.x * threads.y);
  for (unsigned i = 0; i < block.fibres.size(); ++i) {
    Fibre& f = block.fibres[i];
    f.thread = dim3(i % threads.x, i / threads.x, 0);
    f.done = false;
    getcontext(&f.context);
    f.context.uc_stack.ss_sp = f.stack.data();
    f.context.uc_stack.ss_size = f.stack.size();
    makecontext(&f.context, enter, 0);
  }
  std::vector<unsigned> order(block.fibres.size());
  std::iota(order.begin(), order.end(), 0u);
  for (;;) {
    std::shuffle(order.begin(), order.end(), random);
    for (const unsigned i : order) {
      block.running = &block.fibres[i];
      swapcontext(&block.scheduler, &block.running->context);
    }
    const auto done = std::count_if(block.fibres.begin(), block.fibres.end(), [](const Fibre& f) { return f.done; });
    if (done == static_cast<long>(block.fibres.size())) return;
    if (done != 0) {
      std::fprintf(stderr, "%ld of %zu threads ended, the others wait at a barrier\n", done, block.fibres.size());
      std::abort();
    }
  }
}

}  // namespace cuda_on_host

#define threadIdx (cuda_on_host::block.running->thread)
#define blockIdx (cuda_on_host::block.index)

inline void __syncthreads() { swapcontext(&cuda_on_host::block.running->context, &cuda_on_host::block.scheduler); }

using std::max;
using std::min;

// an sm_90's
inline int64_t shared_limit() { return 227 << 10; }

template <class... Parameters, class... Arguments>
void launch(void (*kernel)(Parameters...), dim3 grid, dim3 threads, int64_t shared_bytes, void*,
            Arguments... arguments) {
  cuda_on_host::Block& block = cuda_on_host::block;
  std::mt19937 random(cuda_on_host::seed);
  block.body = [&] { kernel(arguments...); };
  for (unsigned z = 0; z < grid.z; ++z) {
    for (unsigned y = 0; y < grid.y; ++y) {
      for (unsigned x = 0; x < grid.x; ++x) {
        block.index = dim3(x, y, z);
        block.shared.assign(static_cast<size_t>(shared_bytes / 4), std::numeric_limits<float>::quiet_NaN());
        cuda_on_host::run_block(threads, random);
      }
    }
  }
}
