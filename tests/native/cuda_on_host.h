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
#define AVFAST_SHARED(name) float* const name = cuda_on_host::blocks.shared[cuda_on_host::blocks.running->rank].data()
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
  size_t rank = 0;  // of its block in the cluster
  bool done = false;
};

// the blocks of a cluster, which run at the same time: mostly one. A barrier is one for all of them.
struct Blocks {
  std::vector<std::vector<float>> shared;
  std::vector<dim3> index;
  std::vector<Fibre> fibres;
  ucontext_t scheduler;
  Fibre* running = nullptr;
  std::function<void()> body;
};

inline Blocks blocks;
inline unsigned seed = 0;

inline void enter() {
  blocks.body();
  blocks.running->done = true;
  swapcontext(&blocks.running->context, &blocks.scheduler);
}

inline void run(const std::vector<dim3>& index, dim3 threads, int64_t shared_bytes, std::mt19937& random) {
  const unsigned per_block = threads.x * threads.y;
  blocks.index = index;
  blocks.shared.resize(index.size());
  for (auto& shared : blocks.shared) {
    shared.assign(static_cast<size_t>(shared_bytes / 4), std::numeric_limits<float>::quiet_NaN());
  }
  blocks.fibres.resize(per_block * index.size());
  for (unsigned i = 0; i < blocks.fibres.size(); ++i) {
    Fibre& f = blocks.fibres[i];
    f.thread = dim3(i % per_block % threads.x, i % per_block / threads.x, 0);
    f.rank = i / per_block;
    f.done = false;
    getcontext(&f.context);
    f.context.uc_stack.ss_sp = f.stack.data();
    f.context.uc_stack.ss_size = f.stack.size();
    makecontext(&f.context, enter, 0);
  }
  std::vector<unsigned> order(blocks.fibres.size());
  std::iota(order.begin(), order.end(), 0u);
  for (;;) {
    std::shuffle(order.begin(), order.end(), random);
    for (const unsigned i : order) {
      blocks.running = &blocks.fibres[i];
      swapcontext(&blocks.scheduler, &blocks.running->context);
    }
    const auto done = std::count_if(blocks.fibres.begin(), blocks.fibres.end(), [](const Fibre& f) { return f.done; });
    if (done == static_cast<long>(blocks.fibres.size())) return;
    if (done != 0) {
      std::fprintf(stderr, "%ld of %zu threads ended, the others wait at a barrier\n", done, blocks.fibres.size());
      std::abort();
    }
  }
}

}  // namespace cuda_on_host

#define threadIdx (cuda_on_host::blocks.running->thread)
#define blockIdx (cuda_on_host::blocks.index[cuda_on_host::blocks.running->rank])

inline void __syncthreads() { swapcontext(&cuda_on_host::blocks.running->context, &cuda_on_host::blocks.scheduler); }
inline void cluster_sync() { __syncthreads(); }
inline float* in_block(float* place, int rank) {
  auto& shared = cuda_on_host::blocks.shared;
  return shared[static_cast<size_t>(rank)].data() + (place - shared[cuda_on_host::blocks.running->rank].data());
}

using std::max;
using std::min;

// an sm_90's
inline int64_t shared_limit() { return 227 << 10; }
inline bool has_clusters() { return true; }

template <class... Parameters, class... Arguments>
void launch(void (*kernel)(Parameters...), dim3 grid, dim3 threads, int64_t shared_bytes, void*,
            Arguments... arguments) {
  std::mt19937 random(cuda_on_host::seed);
  cuda_on_host::blocks.body = [&] { kernel(arguments...); };
  for (unsigned z = 0; z < grid.z; ++z) {
    for (unsigned y = 0; y < grid.y; ++y) {
      for (unsigned x = 0; x < grid.x; ++x) cuda_on_host::run({dim3(x, y, z)}, threads, shared_bytes, random);
    }
  }
}

// of three blocks of 384 threads
template <class... Parameters, class... Arguments>
void launch_clusters(void (*kernel)(Parameters...), int64_t count, int64_t shared_bytes, void*,
                     Arguments... arguments) {
  std::mt19937 random(cuda_on_host::seed);
  cuda_on_host::blocks.body = [&] { kernel(arguments...); };
  for (unsigned i = 0; i < 3 * count; i += 3) {
    cuda_on_host::run({dim3(i), dim3(i + 1), dim3(i + 2)}, dim3(384), shared_bytes, random);
  }
}
