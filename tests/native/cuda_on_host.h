// Enough of CUDA to run a kernel on the CPU, for tests where there is no GPU. The threads of a block are fibres that
// take turns between barriers, in an order that is drawn anew for every turn, so that a missing barrier changes the
// result from seed to seed. Shared memory begins as NaN, and a barrier that not all threads reach is an error.
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
  enum State { kReady, kAtBlock, kAtCluster, kDone };
  ucontext_t context;
  std::vector<char> stack = std::vector<char>(256 << 10);
  dim3 thread;
  size_t rank = 0;  // of its block in the cluster
  State state = kReady;
};

// The blocks of a cluster, which run at the same time. Most kernels have one block.
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

// Gives the processor back until the scheduler releases all fibres that wait in the same way.
inline void wait_at(Fibre::State state) {
  blocks.running->state = state;
  swapcontext(&blocks.running->context, &blocks.scheduler);
}

inline void enter() {
  blocks.body();
  wait_at(Fibre::kDone);
}

// Releases the fibres begin .. end - 1 if all of them are in that state; returns whether they were.
inline bool release(size_t begin, size_t end, Fibre::State state) {
  for (size_t i = begin; i < end; ++i) {
    if (blocks.fibres[i].state != state) return false;
  }
  for (size_t i = begin; i < end; ++i) blocks.fibres[i].state = Fibre::kReady;
  return true;
}

inline void run(const std::vector<dim3>& index, dim3 threads, int64_t shared_bytes, std::mt19937& random) {
  const size_t per_block = threads.x * threads.y;
  blocks.index = index;
  blocks.shared.resize(index.size());
  for (auto& shared : blocks.shared) {
    shared.assign(static_cast<size_t>(shared_bytes / 4), std::numeric_limits<float>::quiet_NaN());
  }
  blocks.fibres.resize(per_block * index.size());
  const size_t all = blocks.fibres.size();
  for (size_t i = 0; i < all; ++i) {
    Fibre& f = blocks.fibres[i];
    const unsigned thread = static_cast<unsigned>(i % per_block);
    f.thread = dim3(thread % threads.x, thread / threads.x, 0);
    f.rank = i / per_block;
    f.state = Fibre::kReady;
    getcontext(&f.context);
    f.context.uc_stack.ss_sp = f.stack.data();
    f.context.uc_stack.ss_size = f.stack.size();
    makecontext(&f.context, enter, 0);
  }
  std::vector<size_t> order(all);
  std::iota(order.begin(), order.end(), size_t{0});
  for (;;) {
    std::shuffle(order.begin(), order.end(), random);
    for (const size_t i : order) {
      if (blocks.fibres[i].state != Fibre::kReady) continue;
      blocks.running = &blocks.fibres[i];
      swapcontext(&blocks.scheduler, &blocks.running->context);
    }
    bool any = release(0, all, Fibre::kAtCluster);
    for (size_t begin = 0; begin < all; begin += per_block) {
      any = release(begin, begin + per_block, Fibre::kAtBlock) || any;
    }
    if (any) continue;
    const auto done = [](const Fibre& f) { return f.state == Fibre::kDone; };
    if (std::all_of(blocks.fibres.begin(), blocks.fibres.end(), done)) return;
    std::fprintf(stderr, "threads wait at barriers that others do not reach\n");
    std::abort();
  }
}

}  // namespace cuda_on_host

#define threadIdx (cuda_on_host::blocks.running->thread)
#define blockIdx (cuda_on_host::blocks.index[cuda_on_host::blocks.running->rank])

inline void __syncthreads() { cuda_on_host::wait_at(cuda_on_host::Fibre::kAtBlock); }
inline void cluster_sync() { cuda_on_host::wait_at(cuda_on_host::Fibre::kAtCluster); }
inline float* in_block(float* place, int rank) {
  auto& shared = cuda_on_host::blocks.shared;
  return shared[static_cast<size_t>(rank)].data() + (place - shared[cuda_on_host::blocks.running->rank].data());
}

using std::max;
using std::min;

// as on an sm_90
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

// Launches clusters for `count` pairs; a cluster has as many blocks as it takes pairs.
template <class Shape, class... Parameters, class... Arguments>
void launch_clusters(void (*kernel)(Parameters...), int64_t count, int64_t shared_bytes, void*,
                     Arguments... arguments) {
  std::mt19937 random(cuda_on_host::seed);
  cuda_on_host::blocks.body = [&] { kernel(arguments...); };
  for (unsigned first = 0; first < count; first += Shape::kBlocks) {
    std::vector<dim3> cluster;
    for (unsigned i = 0; i < Shape::kBlocks; ++i) cluster.emplace_back(first + i);
    cuda_on_host::run(cluster, dim3(Shape::kThreads), shared_bytes, random);
  }
}
