// a small pair, solved whole in one launch, from the pyramid to the output: by one thread block where its pixels fit
// one, about 64 x 64, and by a cluster of three blocks up to about 96 x 96, where the GPU has clusters. Three share the
// rows of the finest level and write their outermost rows into each other's shared memory; each solves all coarser
// levels for itself, since the others would wait.
#pragma once

#include "tvl1_tile.cuh"

namespace avfast::tvl1 {

// enough for the finest scale_step, 0.95, on images of 10,000 pixels.
constexpr int kMaxLevels = 128;

struct Level {
  int height, width;
  __host__ __device__ int64_t area() const { return static_cast<int64_t>(height) * width; }
  __host__ __device__ int apron_width() const { return width + 2 * kApron; }
  __host__ __device__ int64_t apron_area() const { return static_cast<int64_t>(height + 2 * kApron) * apron_width(); }
};

// which pixel of a level is repeated at (x, y) of its image with an apron.
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
  int warps, coarse_warps;  // of the finest level, of the others
  int iterations, median;
};

// how many blocks a pair has, and how many threads a block.
struct OneBlock {
  static constexpr int kBlocks = 1;
  static constexpr int kThreads = 512;
};
struct Cluster {
  static constexpr int kBlocks = 3;
  static constexpr int kThreads = 384;
};
template <class Shape>
using ExchangeOf = Exchange<Shape::kThreads>;

// how many rows the strips of a level have: few where there are threads enough.
template <class Shape>
__host__ __device__ int strip_rows(const Level& level) {
  if (level.area() <= Shape::kThreads) return 1;
  return level.width * ((level.height + 1) / 2) <= Shape::kThreads ? 2 : kStripRows;
}

// shared memory of a block, in floats: the exchange, one level of b with its apron, then the images a and b of level 1,
// of level 2, ... Places are worked out where they are needed: a register kept for one would be missing in the
// iterations.
template <class Shape>
__host__ __device__ int64_t small_image(const Job& job, int level) {
  int64_t place = ExchangeOf<Shape>::kFloats + job.levels[0].apron_area();
  for (int i = 1; i < level; ++i) place += 2 * job.levels[i].area();
  return place;
}

// image a or b of a level; the finest stays in global memory.
template <class Shape>
__device__ const float* small_level(const Job& job, const float* shared, int level, bool b) {
  const int64_t area = job.levels[level].area();
  if (level == 0) return (b ? job.b : job.a) + static_cast<int64_t>(blockIdx.x / Shape::kBlocks) * area;
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
          small_level<Shape>(job, shared, level - 1, i >= size), {1, from.width},
          area_tap(i % size % to.width, from.width, to.width), area_tap(i % size / to.width, from.height, to.height));
    }
    __syncthreads();
  }
}

// image b of a level with its apron, for linearise_small.
template <class Shape>
__device__ __forceinline__ void make_apron(const Job& job, int index, float* shared) {
  const Level& level = job.levels[index];
  const float* b = small_level<Shape>(job, shared, index, true);
  for (int i = static_cast<int>(threadIdx.x); i < static_cast<int>(level.apron_area()); i += Shape::kThreads) {
    shared[ExchangeOf<Shape>::kFloats + i] = b[apron_source(level, i % level.apron_width(), i / level.apron_width())];
  }
  __syncthreads();
}

// the flow of the next coarser level at a pixel of this one, its values grown with the image.
__device__ __forceinline__ Flow2<float> enlarge(const float* u1, const float* u2, Strides strides, const Level& coarse,
                                                const Level& level, int x, int y) {
  const float ratio_x = static_cast<float>(coarse.width) / static_cast<float>(level.width);
  const float ratio_y = static_cast<float>(coarse.height) / static_cast<float>(level.height);
  const Tap tx = linear_tap(x, coarse.width, ratio_x);
  const Tap ty = linear_tap(y, coarse.height, ratio_y);
  return {1.0f / ratio_x * resample(u1, strides, tx, ty), 1.0f / ratio_y * resample(u2, strides, tx, ty)};
}

// the first guess of a level whose rows this block has from `top` on, from the coarser one's flow in the exchange.
template <class Shape, int kRows>
__device__ __forceinline__ void enlarge_small(const Job& job, int index, int top, Strip<kRows>& s) {
  AVFAST_SHARED(shared);
  const ExchangeOf<Shape> e(shared);
  const Level& level = job.levels[index];
  const Level& coarse = job.levels[index + 1];
  const Strides from{exchange_column(coarse.height, strip_rows<Shape>(coarse)), 1};
  const int x = static_cast<int>(threadIdx.x) % level.width;
  const int y = top + static_cast<int>(threadIdx.x) / level.width * kRows;
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    if (r < s.rows()) s.u[r] = enlarge(e.drive1, e.drive2, from, coarse, level, x, y + r);
  }
}

template <class Shape, int kRows>
__device__ __forceinline__ void linearise_small(const Job& job, int index, int top, Strip<kRows>& s) {
  AVFAST_SHARED(shared);
  const ExchangeOf<Shape> e(shared);
  const Level& level = job.levels[index];
  const int stride = level.apron_width();
  const float* origin = shared + ExchangeOf<Shape>::kFloats + kApron * stride + kApron;
  const int thread = opaque(static_cast<int>(threadIdx.x));
  const int x = thread % level.width;
  const int y = top + thread / level.width * kRows;
  const float* a = small_level<Shape>(job, shared, index, false) + y * level.width + x;
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    if (r < s.rows()) {
      s.set_data(e, r,
                 sample_and_linearise(origin, stride, level.width, level.height, x, y + r, s.u[r], a[r * level.width]));
    }
  }
}

// the 5 x 5 median of a field of the exchange, to another. A call of its own, as the one it makes: see median().
template <int kThreads>
__device__ __noinline__ void median5_small(const float* field, float* to, int column, int width, int height) {
  for (int i = static_cast<int>(threadIdx.x); i < height * width; i += kThreads) {
    const int x = i % width;
    const int y = i / width;
    to[x * column + y] = median<5>(field, {column, 1}, width, height, x, y);
  }
}

// the 3 x 3 medians of the flow in the exchange at a strip's pixels, to the place of its duals.
template <class Exchange, int kRows>
__device__ __forceinline__ void median3_small(const Exchange& e, const Strip<kRows>& s) {
  for (int c = 0; c < 2 && s.rows() > 0; ++c) {
    median3_of_strip<kRows>((c == 0 ? e.drive1 : e.drive2) + s.own, (c == 0 ? e.q11 : e.q21) + s.own,
                            s.place & s.kLeft ? -s.column : 0, s.place & s.kRight ? s.column : 0,
                            s.place & s.kAbove ? -1 : 0, s.place & s.kBelow ? kRows : s.rows() - 1);
  }
}

// takes the filtered flow from the place of the duals, which are in registers: those need not hold what is filtered.
template <class Exchange, int kRows>
__device__ __forceinline__ void take_filtered(const Exchange& e, Strip<kRows>& s) {
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    if (r < s.rows()) s.u[r] = {e.q11[s.own + r], e.q21[s.own + r]};
  }
}

// one level: the flow comes from the coarser level's in the exchange (drive1, drive2), and goes back there.
template <class Shape, class Solver, int kRows>
__device__ __forceinline__ void solve_whole_level(const Job& job, const Solver& solver, int index) {
  AVFAST_SHARED(shared);
  const ExchangeOf<Shape> e(shared);
  Strip<kRows> s(static_cast<int>(threadIdx.x), job.levels[index].width, job.levels[index].height,
                 exchange_column(job.levels[index].height, kRows));
  if (index + 1 < job.count) {
    enlarge_small<Shape>(job, index, 0, s);
    __syncthreads();
  }
  s.publish_dual(e);
  for (int warp = index == 0 ? job.warps : job.coarse_warps; warp > 0; --warp) {
    linearise_small<Shape>(job, opaque(index), 0, s);
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

// levels `count` - 1 .. `last`, each by one block.
template <class Shape, class Solver>
__device__ __forceinline__ void solve_whole_levels(const Job& job, const Solver& solver, int last) {
  AVFAST_SHARED(shared);
  for (int index = job.count - 1; index >= last; --index) {
    make_apron<Shape>(job, index, shared);
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

template <class Solver>
__global__ void __launch_bounds__(OneBlock::kThreads, 1)
    small_kernel(const __grid_constant__ Job job, const Solver solver) {
  AVFAST_SHARED(shared);
  make_pyramid<OneBlock>(job, shared);
  solve_whole_levels<OneBlock>(job, solver, 0);
  const Level& level = job.levels[0];
  const int area = static_cast<int>(level.area());
  const int column = exchange_column(level.height, strip_rows<OneBlock>(level));
  float* to = job.flow + static_cast<int64_t>(blockIdx.x) * 2 * area;
  for (int i = static_cast<int>(threadIdx.x); i < 2 * area; i += OneBlock::kThreads) {
    const int p = i % area;
    to[i] = shared[i / area * ExchangeOf<OneBlock>::kFieldFloats + p % level.width * column + p / level.width];
  }
}

// ---- a cluster's share of the finest level ----

// rows of a level that a block of a cluster has, but the last, which has the rest: whole strips.
__host__ __device__ inline int share_rows(int height) {
  constexpr int kUnit = Cluster::kBlocks * kStripRows;
  return (height + kUnit - 1) / kUnit * kStripRows;
}

// floats from column to column of a share: its rows, and one above and one below for the neighbours'. Odd.
__host__ __device__ inline int share_column(int height) { return share_rows(height) + 3; }

// the outermost strips of a share write what the block beside it reads at its own edge, each null where there is none.
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

template <class Solver>
__device__ __forceinline__ void solve_share(const Job& job, const Solver& solver) {
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
  if (job.count > 1) enlarge_small<Cluster>(job, 0, top, s);
  // nobody may write to a block that still has the coarser level's flow in its exchange
  link.sync();
  s.publish_dual(e);
  link.down(s.q[kStripRows - 1]);
  for (int warp = 0; warp < job.warps; ++warp) {
    linearise_small<Cluster>(job, 0, top, s);
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
  float* to = job.flow + static_cast<int64_t>(blockIdx.x / Cluster::kBlocks) * 2 * level.area();
  const int64_t first = static_cast<int64_t>(top + thread / level.width * kStripRows) * level.width + x;
#pragma unroll
  for (int r = 0; r < kStripRows; ++r) {
    if (r < s.rows()) {
      to[first + static_cast<int64_t>(r) * level.width] = s.u[r].u1;
      to[level.area() + first + static_cast<int64_t>(r) * level.width] = s.u[r].u2;
    }
  }
  // nor may a block end while another writes to it
  link.sync();
}

template <class Solver>
__global__ void __launch_bounds__(Cluster::kThreads, 1)
    cluster_kernel(const __grid_constant__ Job job, const Solver solver) {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
  AVFAST_SHARED(shared);
  make_pyramid<Cluster>(job, shared);
  solve_whole_levels<Cluster>(job, solver, 1);
  make_apron<Cluster>(job, 0, shared);
  solve_share(job, solver);
#endif
}

}  // namespace avfast::tvl1
