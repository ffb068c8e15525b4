// Small pairs, solved in one launch from the pyramid to the output. A thread block solves one pair whose pixels fit it,
// which is up to about 64 x 64. Where the GPU has clusters, a cluster of three blocks solves three pairs of up to about
// 96 x 96: each block solves all levels but the finest of one pair, then the three blocks together solve the finest
// level of one pair after the other. They share the rows of that level, and write the outermost of their rows into each
// other's shared memory.
#pragma once

#include "tile.cuh"

namespace avfast::tvl1 {

// This is enough for the largest scale_step, 0.95, and images of 10,000 pixels.
constexpr int kMaxLevels = 128;

struct Level {
  int height, width;
  __host__ __device__ int64_t area() const { return static_cast<int64_t>(height) * width; }
  __host__ __device__ int apron_width() const { return width + 2 * kApron; }
  __host__ __device__ int64_t apron_area() const { return static_cast<int64_t>(height + 2 * kApron) * apron_width(); }
};

// The pixel of a level that its image with an apron has at (x, y).
__device__ __forceinline__ int64_t apron_source(const Level& level, int x, int y) {
  const int from_x = ::min(::max(x - kApron, 0), level.width - 1);
  const int from_y = ::min(::max(y - kApron, 0), level.height - 1);
  return static_cast<int64_t>(from_y) * level.width + from_x;
}

struct Job {
  const float *a, *b;
  float* flow;
  Level levels[kMaxLevels];  // finest first
  int count;
  int64_t pairs;
  int warps, coarse_warps;  // of the finest level, of the others
  int iterations, median;
};

struct OneBlock {
  static constexpr int kThreads = 512;
};
struct Cluster {
  static constexpr int kBlocks = 3;
  static constexpr int kThreads = 384;
};
template <class Shape>
using ExchangeOf = Exchange<Shape::kThreads>;

// The rows of a level's strips: few where there are enough threads.
template <class Shape>
__host__ __device__ int strip_rows(const Level& level) {
  if (level.area() <= Shape::kThreads) return 1;
  return level.width * ((level.height + 1) / 2) <= Shape::kThreads ? 2 : kStripRows;
}

// The place of a level's images in the shared memory of a block, in floats. There lie the exchange, one level of b with
// its apron, then the images a and b of level 1, of level 2, and so on. Places are computed where they are needed: a
// register that keeps one would be missing in the iterations.
template <class Shape>
__host__ __device__ int64_t small_image(const Job& job, int level) {
  int64_t place = ExchangeOf<Shape>::kFloats + job.levels[0].apron_area();
  for (int i = 1; i < level; ++i) place += 2 * job.levels[i].area();
  return place;
}

// Image a or b of a level. The finest level, of any pair, is in global memory; the others are those of the block's own
// pair.
template <class Shape>
__device__ const float* small_level(const Job& job, const float* shared, int level, bool b, int64_t pair) {
  const int64_t area = job.levels[level].area();
  if (level == 0) return (b ? job.b : job.a) + pair * area;
  return shared + small_image<Shape>(job, level) + (b ? area : 0);
}

template <class Shape>
__device__ __forceinline__ void make_pyramid(const Job& job, float* shared) {
  for (int level = 1; level < job.count; ++level) {
    const Level& from = job.levels[level - 1];
    const Level& to = job.levels[level];
    const int size = static_cast<int>(to.area());
    for (int i = static_cast<int>(threadIdx.x); i < 2 * size; i += Shape::kThreads) {
      shared[small_image<Shape>(job, level) + i] = resample(
          small_level<Shape>(job, shared, level - 1, i >= size, blockIdx.x), {1, from.width},
          area_tap(i % size % to.width, from.width, to.width), area_tap(i % size / to.width, from.height, to.height));
    }
    __syncthreads();
  }
}

// Makes image b of a level with its apron, for linearise_small.
template <class Shape>
__device__ __forceinline__ void make_apron(const Job& job, int index, float* shared, int64_t pair) {
  const Level& level = job.levels[index];
  const float* b = small_level<Shape>(job, shared, index, true, pair);
  for (int i = static_cast<int>(threadIdx.x); i < static_cast<int>(level.apron_area()); i += Shape::kThreads) {
    shared[ExchangeOf<Shape>::kFloats + i] = b[apron_source(level, i % level.apron_width(), i / level.apron_width())];
  }
  __syncthreads();
}

// The flow of the next coarser level at a pixel of this one; its values grow with the image.
__device__ __forceinline__ Flow2<float> enlarge(const float* u1, const float* u2, Strides strides, const Level& coarse,
                                                const Level& level, int x, int y) {
  const float ratio_x = static_cast<float>(coarse.width) / static_cast<float>(level.width);
  const float ratio_y = static_cast<float>(coarse.height) / static_cast<float>(level.height);
  const Tap tx = linear_tap(x, coarse.width, ratio_x);
  const Tap ty = linear_tap(y, coarse.height, ratio_y);
  return {1.0f / ratio_x * resample(u1, strides, tx, ty), 1.0f / ratio_y * resample(u2, strides, tx, ty)};
}

// Sets the first guess of a level, of which this block has the rows from `top` on, from the flow of the coarser level.
template <int kRows>
__device__ __forceinline__ void enlarge_small(const Job& job, int index, int top, const float* u1, const float* u2,
                                              Strides from, Strip<kRows>& s) {
  const Level& level = job.levels[index];
  const Level& coarse = job.levels[index + 1];
  const int x = static_cast<int>(threadIdx.x) % level.width;
  const int y = top + static_cast<int>(threadIdx.x) / level.width * kRows;
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    if (r < s.rows()) s.u[r] = enlarge(u1, u2, from, coarse, level, x, y + r);
  }
}

template <class Shape, int kRows>
__device__ __forceinline__ void linearise_small(const Job& job, int index, int top, int64_t pair, Strip<kRows>& s) {
  AVFAST_SHARED(shared);
  const ExchangeOf<Shape> e(shared);
  const Level& level = job.levels[index];
  const int stride = level.apron_width();
  const float* origin = shared + ExchangeOf<Shape>::kFloats + kApron * stride + kApron;
  const int thread = opaque(static_cast<int>(threadIdx.x));
  const int x = thread % level.width;
  const int y = top + thread / level.width * kRows;
  const float* a = small_level<Shape>(job, shared, index, false, pair) + y * level.width + x;
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    if (r < s.rows()) {
      s.set_data(e, r,
                 sample_and_linearise(origin, stride, level.width, level.height, x, y + r, s.u[r], a[r * level.width]));
    }
  }
}

// The 5 x 5 median of a field of the exchange, written to another field. It is not inlined, nor is median(), which says
// why.
template <int kThreads>
__device__ __noinline__ void median5_small(const float* field, float* to, int column, int width, int height) {
  for (int i = static_cast<int>(threadIdx.x); i < height * width; i += kThreads) {
    const int x = i % width;
    const int y = i / width;
    to[x * column + y] = median<5>(field, {column, 1}, width, height, x, y);
  }
}

// Writes the 3 x 3 medians of the flow in the exchange, at a strip's pixels, to the fields of the duals.
template <class Exchange, int kRows>
__device__ __forceinline__ void median3_small(const Exchange& e, const Strip<kRows>& s) {
  for (int c = 0; c < 2 && s.rows() > 0; ++c) {
    median3_of_strip<kRows>((c == 0 ? e.drive1 : e.drive2) + s.own, (c == 0 ? e.q11 : e.q21) + s.own,
                            s.place & s.kLeft ? -s.column : 0, s.place & s.kRight ? s.column : 0,
                            s.place & s.kAbove ? -1 : 0, s.place & s.kBelow ? kRows : s.rows() - 1);
  }
}

// Reads the filtered flow from the fields of the duals. The duals themselves are in registers.
template <class Exchange, int kRows>
__device__ __forceinline__ void take_filtered(const Exchange& e, Strip<kRows>& s) {
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    if (r < s.rows()) s.u[r] = {e.q11[s.own + r], e.q21[s.own + r]};
  }
}

// Solves one level. The exchange (drive1, drive2) holds the coarser level's flow before, and this level's flow after.
template <class Shape, class Solver, int kRows>
__device__ __forceinline__ void solve_whole_level(const Job& job, const Solver& solver, int index) {
  AVFAST_SHARED(shared);
  const ExchangeOf<Shape> e(shared);
  Strip<kRows> s(static_cast<int>(threadIdx.x), job.levels[index].width, job.levels[index].height,
                 exchange_column(job.levels[index].height, kRows));
  if (index + 1 < job.count) {
    const Level& coarse = job.levels[index + 1];
    enlarge_small(job, index, 0, e.drive1, e.drive2, {exchange_column(coarse.height, strip_rows<Shape>(coarse)), 1}, s);
    __syncthreads();
  }
  s.publish_dual(e);
  for (int warp = index == 0 ? job.warps : job.coarse_warps; warp > 0; --warp) {
    linearise_small<Shape>(job, opaque(index), 0, blockIdx.x, s);
    __syncthreads();
    iterate(s, solver, e, job.iterations);
    if (job.median > 1) {
      s.publish_flow(e);
      __syncthreads();
      if (job.median == 3) {
        median3_small(e, s);
      } else {
        const Level& level = job.levels[opaque(index)];
        median5_small<Shape::kThreads>(e.drive1, e.q11, s.column, level.width, level.height);
        median5_small<Shape::kThreads>(e.drive2, e.q21, s.column, level.width, level.height);
        __syncthreads();
      }
      take_filtered(e, s);
      s.publish_dual(e);
    }
  }
  __syncthreads();
  s.publish_flow(e);
  __syncthreads();
}

// Solves the levels `count` - 1 .. `last` of the block's own pair.
template <class Shape, class Solver>
__device__ __forceinline__ void solve_whole_levels(const Job& job, const Solver& solver, int last) {
  AVFAST_SHARED(shared);
  for (int index = job.count - 1; index >= last; --index) {
    make_apron<Shape>(job, index, shared, blockIdx.x);
    const int rows = strip_rows<Shape>(job.levels[index]);
    if (rows == 1) {
      solve_whole_level<Shape, Solver, 1>(job, solver, index);
    } else if (rows == 2) {
      solve_whole_level<Shape, Solver, 2>(job, solver, index);
    } else {
      solve_whole_level<Shape, Solver, kStripRows>(job, solver, index);
    }
  }
}

// Copies the flow of the level that was solved last from the exchange to two planes.
template <class Shape>
__device__ __forceinline__ void copy_flow(const Level& level, const float* shared, float* to) {
  const int area = static_cast<int>(level.area());
  const int column = exchange_column(level.height, strip_rows<Shape>(level));
  for (int i = static_cast<int>(threadIdx.x); i < 2 * area; i += Shape::kThreads) {
    const int p = i % area;
    to[i] = shared[i / area * ExchangeOf<Shape>::kFieldFloats + p % level.width * column + p / level.width];
  }
}

template <class Solver>
__global__ void __launch_bounds__(OneBlock::kThreads, 1)
    small_kernel(const __grid_constant__ Job job, const Solver solver) {
  AVFAST_SHARED(shared);
  make_pyramid<OneBlock>(job, shared);
  solve_whole_levels<OneBlock>(job, solver, 0);
  copy_flow<OneBlock>(job.levels[0], shared, job.flow + static_cast<int64_t>(blockIdx.x) * 2 * job.levels[0].area());
}

// ---- a cluster's share of the finest level ----

// The rows of a level that each block of a cluster has, in whole strips; the last block has the rest.
__host__ __device__ inline int share_rows(int height) {
  constexpr int kUnit = Cluster::kBlocks * kStripRows;
  return (height + kUnit - 1) / kUnit * kStripRows;
}

// The floats from one column of a share to the next: its rows, one row above and one below for the neighbours', and one
// more where that makes it odd.
__host__ __device__ inline int share_column(int height) { return share_rows(height) + 3; }

// What the outermost strips of a share write, and the neighbouring block reads at its own edge. A pointer is null where
// there is no neighbour.
struct Linked {
  static constexpr int kField = ExchangeOf<Cluster>::kFieldFloats;
  float* above_drive;  // the row below its last one
  float* below_drive;  // the row above its first one
  float* below_q12;    // what its top strips find as the duals above them

  __device__ void sync() const { cluster_sync(); }
  __device__ void up(Flow2<float> drive) const {
    if (above_drive == nullptr) return;
    above_drive[0] = drive.u1;
    above_drive[kField] = drive.u2;
  }
  __device__ void down(const Dual4<float>& q) const {
    if (below_q12 == nullptr) return;
    below_q12[0] = q.q12;
    below_q12[2 * Cluster::kThreads] = q.q22;
  }
  __device__ void down(Flow2<float> drive) const {
    if (below_drive == nullptr) return;
    below_drive[0] = drive.u1;
    below_drive[kField] = drive.u2;
  }
};

// Solves the block's rows of the finest level of a pair. Block `owner` of the cluster has solved the coarser levels of
// that pair; their flow lies at `coarse` there.
template <class Solver>
__device__ __forceinline__ void solve_share(const Job& job, const Solver& solver, int64_t pair, float* coarse,
                                            int owner) {
  AVFAST_SHARED(shared);
  const ExchangeOf<Cluster> e(shared);
  const Level& level = job.levels[0];
  const int thread = static_cast<int>(threadIdx.x);
  const int rank = static_cast<int>(blockIdx.x) % Cluster::kBlocks;
  const int rows = share_rows(level.height);
  const int top = rank * rows;
  const int column = share_column(level.height);
  const bool above = rank > 0;
  const bool below = top + rows < level.height;
  Strip<kStripRows> s(thread, level.width, ::min(rows, level.height - top), column, 1, above, below);
  const int x = thread % level.width;
  Linked link{};
  if (s.rows() > 0 && above && thread < level.width) {
    link.above_drive = in_block(e.drive1 + x * column + 1 + rows, rank - 1);
  }
  if (s.rows() > 0 && below && (thread / level.width + 1) * kStripRows == rows) {
    link.below_drive = in_block(e.drive1 + x * column, rank + 1);
    link.below_q12 = in_block(e.q12 + x, rank + 1);
  }
  if (job.count > 1) {
    const float* u1 = in_block(coarse, owner);
    enlarge_small(job, 0, top, u1, u1 + job.levels[1].area(), {1, job.levels[1].width}, s);
  }
  s.publish_dual(e);
  link.down(s.q[kStripRows - 1]);
  for (int warp = 0; warp < job.warps; ++warp) {
    linearise_small<Cluster>(job, 0, top, pair, s);
    link.sync();
    iterate(s, solver, e, job.iterations, link);
    if (job.median > 1) {
      s.publish_flow(e);
      link.up(s.u[0]);
      link.down(s.u[kStripRows - 1]);
      link.sync();
      median3_small(e, s);
      take_filtered(e, s);
      s.publish_dual(e);
    }
  }
  float* to = job.flow + pair * 2 * level.area();
  const int64_t first = static_cast<int64_t>(top + thread / level.width * kStripRows) * level.width + x;
#pragma unroll
  for (int r = 0; r < kStripRows; ++r) {
    if (r < s.rows()) {
      to[first + static_cast<int64_t>(r) * level.width] = s.u[r].u1;
      to[level.area() + first + static_cast<int64_t>(r) * level.width] = s.u[r].u2;
    }
  }
  // no block may continue, or end, while another one still writes to it
  link.sync();
}

template <class Solver>
__global__ void __launch_bounds__(Cluster::kThreads, 1)
    cluster_kernel(const __grid_constant__ Job job, const Solver solver) {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
  AVFAST_SHARED(shared);
  // the memory of the images of level 1 is free by then
  float* coarse = shared + small_image<Cluster>(job, 1);
  if (blockIdx.x < job.pairs) {
    make_pyramid<Cluster>(job, shared);
    solve_whole_levels<Cluster>(job, solver, 1);
    if (job.count > 1) copy_flow<Cluster>(job.levels[1], shared, coarse);
  }
  cluster_sync();
  const int64_t first = blockIdx.x / Cluster::kBlocks * Cluster::kBlocks;
  for (int owner = 0; owner < Cluster::kBlocks && first + owner < job.pairs; ++owner) {
    make_apron<Cluster>(job, 0, shared, first + owner);
    solve_share(job, solver, first + owner, coarse, owner);
  }
#endif
}

}  // namespace avfast::tvl1
