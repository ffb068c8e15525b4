// Kernels for pairs whose state lies in global memory: one launch per step of the algorithm, for all pairs at once.
#pragma once

#include "small.cuh"

namespace avfast::tvl1 {
namespace {

// The threads of the block that iterates on a tile of a large pair, and the iterations that it does before the outer
// pixels of the tile have to be read again.
constexpr int kTileThreads = 256;
constexpr int kTileIterations = 5;
constexpr int kMaxRadius = 30;

struct Gauss {
  int radius;
  float weight[2 * kMaxRadius + 1];
};

// The scratch memory of one pair begins with fields of the finest level's size: flow and duals before a pass and after
// it, and the data term.
constexpr int kFlowFields = 2;
constexpr int kDualFields = 4;
constexpr int kFields = 2 * (kFlowFields + kDualFields) + 4;

// How a level is cut into tiles: windows that overlap by kTileIterations pixels on either side of a seam. A level that
// fits one window has no seams, and all its iterations are done in one pass.
struct Tiling {
  int width, height;  // of a window
  int across, down;   // how many
  int iterations;     // per pass, at most
};

int64_t large_floats(const Job& job) {
  int64_t floats = kFields * job.levels[0].area();
  for (int i = 0; i < job.count; ++i) floats += (i > 0 ? job.levels[i].area() : 0) + job.levels[i].apron_area();
  return floats;
}

// The pixel of this thread in a grid of 32 x 8 blocks; blockIdx.z is the pair.
struct Pixel {
  int x, y;
  int64_t index;  // in a field of that width
  bool inside;
  __device__ Pixel(int width, int height)
      : x(static_cast<int>(blockIdx.x * 32 + threadIdx.x)),
        y(static_cast<int>(blockIdx.y * 8 + threadIdx.y)),
        index(static_cast<int64_t>(y) * width + x),
        inside(x < width && y < height) {}
};

// Applies a Gaussian along one axis, the rows or the columns; the border is repeated.
__global__ void smooth_kernel(const float* from, float* to, Level level, bool along, const Gauss gauss) {
  const Pixel p(level.width, level.height);
  if (!p.inside) return;
  const int i = along ? p.x : p.y;
  const int size = along ? level.width : level.height;
  const int64_t stride = along ? 1 : level.width;
  const float* line = from + blockIdx.z * level.area() + (along ? static_cast<int64_t>(p.y) * level.width : p.x);
  float sum = 0.0f;
  for (int k = -gauss.radius; k <= gauss.radius; ++k) {
    sum += gauss.weight[k + gauss.radius] * line[::min(::max(i + k, 0), size - 1) * stride];
  }
  to[blockIdx.z * level.area() + p.index] = sum;
}

__global__ void shrink_kernel(const float* from, int64_t from_pair, Level fine, float* to, int64_t to_pair,
                              Level coarse) {
  const Pixel p(coarse.width, coarse.height);
  if (!p.inside) return;
  to[blockIdx.z * to_pair + p.index] =
      resample(from + blockIdx.z * from_pair, {1, fine.width}, area_tap(p.x, fine.width, coarse.width),
               area_tap(p.y, fine.height, coarse.height));
}

__global__ void apron_kernel(const float* from, int64_t from_pair, float* to, int64_t to_pair, Level level) {
  const Pixel p(level.apron_width(), level.height + 2 * kApron);
  if (!p.inside) return;
  to[blockIdx.z * to_pair + p.index] = from[blockIdx.z * from_pair + apron_source(level, p.x, p.y)];
}

// Sets the first guess of a level's flow, from `coarse` or, where that has width 0, to zero, and the duals to zero.
// From one field to the next there are `area` floats, the area of the finest level.
__global__ void set_up_kernel(const float* coarse_u, Level coarse, float* u, float* q, int64_t area, int64_t per_pair,
                              Level level) {
  const Pixel p(level.width, level.height);
  if (!p.inside) return;
  const int64_t i = blockIdx.z * per_pair + p.index;
  Flow2<float> first{};
  if (coarse.width > 0) {
    const float* from = coarse_u + blockIdx.z * per_pair;
    first = enlarge(from, from + area, {1, coarse.width}, coarse, level, p.x, p.y);
  }
  u[i] = first.u1;
  u[i + area] = first.u2;
  for (int c = 0; c < 4; ++c) q[i + c * area] = 0.0f;
}

__global__ void linearise_kernel(const float* a, int64_t a_pair, const float* b, const float* u, float* d, int64_t area,
                                 int64_t per_pair, Level level) {
  const Pixel p(level.width, level.height);
  if (!p.inside) return;
  const int64_t i = blockIdx.z * per_pair + p.index;
  const float* origin = b + blockIdx.z * per_pair + kApron * level.apron_width() + kApron;
  const DataTerm<float> term = sample_and_linearise(origin, level.apron_width(), level.width, level.height, p.x, p.y,
                                                    {u[i], u[i + area]}, a[blockIdx.z * a_pair + p.index]);
  d[i] = term.ix;
  d[i + area] = term.iy;
  d[i + 2 * area] = term.rho_c;
  d[i + 3 * area] = term.inv_grad;
}

// Does up to `count` iterations on the window that this block reads. The block writes those pixels that no error from a
// seam has reached.
template <class Solver>
__global__ void __launch_bounds__(kTileThreads, 2)
    tile_kernel(const float* u, const float* q, float* to_u, float* to_q, const float* d, int64_t area,
                int64_t per_pair, Level level, const Tiling tiling, int count, const Solver solver) {
  AVFAST_SHARED(shared);
  const Exchange<kTileThreads> e(shared);
  const int left = static_cast<int>(blockIdx.x) * (tiling.width - 2 * kTileIterations);
  const int top = static_cast<int>(blockIdx.y) * (tiling.height - 2 * kTileIterations);
  const int width = ::min(tiling.width, level.width - left);
  const int height = ::min(tiling.height, level.height - top);
  Strip<kStripRows> s(static_cast<int>(threadIdx.x), width, height, exchange_column(height, kStripRows));
  const int x = left + static_cast<int>(threadIdx.x) % width;
  const int y = top + static_cast<int>(threadIdx.x) / width * kStripRows;
  const int64_t first = blockIdx.z * per_pair + static_cast<int64_t>(y) * level.width + x;
#pragma unroll
  for (int r = 0; r < kStripRows; ++r) {
    if (r < s.rows()) {
      const int64_t i = first + static_cast<int64_t>(r) * level.width;
      s.u[r] = {u[i], u[i + area]};
      s.q[r] = {q[i], q[i + area], q[i + 2 * area], q[i + 3 * area]};
      s.set_data(e, r, {d[i], d[i + area], d[i + 2 * area], d[i + 3 * area]});
    }
  }
  s.publish_dual(e);
  __syncthreads();
  iterate(s, solver, e, count);
  const int from_x = left > 0 ? left + kTileIterations : 0;
  const int from_y = top > 0 ? top + kTileIterations : 0;
  const int to_x = left + width < level.width ? left + width - kTileIterations : level.width;
  const int to_y = top + height < level.height ? top + height - kTileIterations : level.height;
#pragma unroll
  for (int r = 0; r < kStripRows; ++r) {
    if (r < s.rows() && x >= from_x && x < to_x && y + r >= from_y && y + r < to_y) {
      const int64_t i = first + static_cast<int64_t>(r) * level.width;
      to_u[i] = s.u[r].u1;
      to_u[i + area] = s.u[r].u2;
      to_q[i] = s.q[r].q11;
      to_q[i + area] = s.q[r].q12;
      to_q[i + 2 * area] = s.q[r].q21;
      to_q[i + 3 * area] = s.q[r].q22;
    }
  }
}

// Filters both components of the flow; a side of 1 copies them.
template <int kSide>
__global__ void median_kernel(const float* in, int64_t in_pair, float* out, int64_t out_pair, int64_t area,
                              Level level) {
  const Pixel p(level.width, level.height);
  if (!p.inside) return;
  for (int c = 0; c < 2; ++c) {
    const float* field = in + blockIdx.z * in_pair + c * area;
    float& value = out[blockIdx.z * out_pair + c * area + p.index];
    if constexpr (kSide == 1) {
      value = field[p.index];
    } else {
      value = median<kSide>(field, {1, level.width}, level.width, level.height, p.x, p.y);
    }
  }
}

}  // namespace
}  // namespace avfast::tvl1
