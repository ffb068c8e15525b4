// There are two ways to solve pairs on a GPU, measured on an H200 in batches of 2^24 pixels:
//
// - Small pairs are solved in one launch, with their state in registers and shared memory (small.cuh). The limit is the
//   number of instructions: 83 per pixel and iteration, of which one is issued in 73 % of the clocks. At 64 x 64 with
//   preset fast, which are 67.5 full-size iterations, 571 thousand pairs/s are 39 % of that limit: linearisation and
//   medians are the other half.
// - Larger pairs are solved in global memory (large.cuh). An iteration moves 64 bytes per pixel there. A tile is kept
//   in registers for kTileIterations of them, which leaves 64 / 5 / 0.6 = 21 bytes. Two blocks share a multiprocessor,
//   so that one iterates while the other loads: at 640 x 480 that is 4 % faster than one block of twice the size, whose
//   tiles overlap less. 5 iterations are 2 to 24 % faster than 4, 7 or 10. 3.4 thousand pairs/s are 18 % of the limit.
#include "flow_cuda.h"

// tests/native/cuda_on_host.h replaces CUDA where there is no GPU
#ifndef AVFAST_CUDA_ON_HOST
#include <cuda_runtime.h>
#define AVFAST_SHARED(name) extern __shared__ float name[]
#endif

#include <algorithm>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "large.cuh"

namespace avfast::tvl1 {
namespace {

#ifndef AVFAST_CUDA_ON_HOST
void check(cudaError_t error) {
  if (error != cudaSuccess) throw std::runtime_error(std::string("CUDA: ") + cudaGetErrorString(error));
}

int attribute_of_device(cudaDeviceAttr attribute) {
  int device = 0, value = 0;
  check(cudaGetDevice(&device));
  check(cudaDeviceGetAttribute(&value, attribute, device));
  return value;
}

// The bytes of shared memory that a block may have on the current device: 163 KiB on sm_80, 227 on sm_90.
int64_t shared_limit() { return attribute_of_device(cudaDevAttrMaxSharedMemoryPerBlockOptin); }

bool has_clusters() { return attribute_of_device(cudaDevAttrComputeCapabilityMajor) >= 9; }

template <class... Parameters, class... Arguments>
void launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, int64_t shared, void* stream,
            Arguments... arguments) {
  if (shared > 0)
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared)));
  kernel<<<grid, block, static_cast<size_t>(shared), static_cast<cudaStream_t>(stream)>>>(arguments...);
  check(cudaGetLastError());
}

template <class Shape, class... Parameters, class... Arguments>
void launch_clusters(void (*kernel)(Parameters...), int64_t count, int64_t shared, void* stream,
                     Arguments... arguments) {
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared)));
  cudaLaunchAttribute cluster{};
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim = {Shape::kBlocks, 1, 1};
  cudaLaunchConfig_t config{};
  config.gridDim = dim3((count + Shape::kBlocks - 1) / Shape::kBlocks * Shape::kBlocks);
  config.blockDim = dim3(Shape::kThreads);
  config.dynamicSmemBytes = static_cast<size_t>(shared);
  config.stream = static_cast<cudaStream_t>(stream);
  config.attrs = &cluster;
  config.numAttrs = 1;
  check(cudaLaunchKernelEx(&config, kernel, arguments...));
}
#endif

Gauss make_gauss(float sigma) {
  const std::vector<float> weights = gaussian(sigma);
  Gauss gauss{};
  gauss.radius = static_cast<int>(weights.size()) / 2;
  std::copy(weights.begin(), weights.end(), gauss.weight);
  return gauss;
}

Job make_job(int height, int width, const Params& params) {
  Job job{};
  job.iterations = params.iterations * params.outer_iterations;
  job.median = params.median;
  job.levels[0] = {height, width};
  job.count = 1;
  while (job.count < params.scales && job.count < kMaxLevels) {
    const Level fine = job.levels[job.count - 1];
    Level coarse;
    if (!coarser(params.scale_step, fine.height, fine.width, &coarse.height, &coarse.width)) break;
    job.levels[job.count++] = coarse;
  }
  job.warps = params.warps_of(0, job.count);
  job.coarse_warps = params.warps_of(1, job.count);
  return job;
}

template <class Shape>
int64_t shared_bytes(const Job& job) {
  return small_image<Shape>(job, job.count) * 4;
}

template <class Shape>
bool fits_threads(int height, int width) {
  return static_cast<int64_t>(width) * ((height + kStripRows - 1) / kStripRows) <= Shape::kThreads;
}

bool fits_a_block(const Job& job) {
  const Level& level = job.levels[0];
  return fits_threads<OneBlock>(level.height, level.width) && shared_bytes<OneBlock>(job) <= shared_limit();
}

bool fits_a_cluster(const Job& job) {
  const Level& level = job.levels[0];
  return job.median != 5 && has_clusters() && fits_threads<Cluster>(share_rows(level.height), level.width) &&
         static_cast<int64_t>(level.width) * share_column(level.height) <= ExchangeOf<Cluster>::kFieldFloats &&
         (job.count == 1 || fits_threads<Cluster>(job.levels[1].height, job.levels[1].width)) &&
         shared_bytes<Cluster>(job) <= shared_limit();
}

dim3 pixel_grid(int width, int height, int64_t pairs) { return dim3((width + 31) / 32, (height + 7) / 8, pairs); }

// The tiling with the fewest windows of kTileThreads strips.
Tiling make_tiling(const Level& level, int iterations) {
  const auto windows = [](int size, int window) {
    if (size <= window) return 1;
    const int step = window - 2 * kTileIterations;
    return step > 0 ? (size - 2 * kTileIterations + step - 1) / step : size;
  };
  Tiling best{};
  int64_t fewest = INT64_MAX;
  for (int strips = 1; strips <= 16; ++strips) {
    const Tiling t{kTileThreads / strips, strips * kStripRows, windows(level.width, kTileThreads / strips),
                   windows(level.height, strips * kStripRows), kTileIterations};
    const int64_t count = static_cast<int64_t>(t.across) * t.down;
    if (count < fewest) {
      best = t;
      fewest = count;
    }
  }
  if (fewest == 1) best.iterations = iterations;
  return best;
}

template <class Solver>
void solve_large(const Job& job, const Solver& solver, int64_t pairs, float* scratch, void* stream) {
  const dim3 block(32, 8);
  const int64_t per_pair = large_floats(job);
  const int64_t area = job.levels[0].area();
  // flow and duals, both where a pass reads them and where it writes them
  float* u[2] = {scratch, scratch + kFlowFields * area};
  float* q[2] = {u[1] + kFlowFields * area, u[1] + (kFlowFields + kDualFields) * area};
  float* data = q[1] + kDualFields * area;
  // images: the coarser levels of a, and every level of b with an apron
  std::vector<float*> image_a(job.count), image_b(job.count);
  float* next = scratch + kFields * area;
  for (int i = 0; i < job.count; ++i) {
    image_a[i] = next;
    image_b[i] = next + (i > 0 ? job.levels[i].area() : 0);
    next = image_b[i] + job.levels[i].apron_area();
  }

  // the levels of b without an apron are kept in the memory of the flow, two of them at a time
  for (int image = 0; image < 2; ++image) {
    const float* from = image == 0 ? job.a : job.b;
    int64_t from_pair = area;
    for (int i = 0; i < job.count; ++i) {
      const Level level = job.levels[i];
      if (i > 0) {
        float* to = image == 0 ? image_a[i] : u[i % 2];
        launch(shrink_kernel, pixel_grid(level.width, level.height, pairs), block, 0, stream, from, from_pair,
               job.levels[i - 1], to, per_pair, level);
        from = to;
        from_pair = per_pair;
      }
      if (image == 1) {
        launch(apron_kernel, pixel_grid(level.apron_width(), level.height + 2 * kApron, pairs), block, 0, stream, from,
               from_pair, image_b[i], per_pair, level);
      }
    }
  }

  Level coarse{0, 0};
  for (int i = job.count - 1; i >= 0; --i) {
    const Level level = job.levels[i];
    const dim3 grid = pixel_grid(level.width, level.height, pairs);
    const float* a = i == 0 ? job.a : image_a[i];
    const int64_t a_pair = i == 0 ? area : per_pair;
    launch(set_up_kernel, grid, block, 0, stream, u[0], coarse, u[1], q[0], area, per_pair, level);
    std::swap(u[0], u[1]);
    const Tiling tiling = make_tiling(level, job.iterations);
    const dim3 tiles(tiling.across, tiling.down, pairs);
    const int warps = i == 0 ? job.warps : job.coarse_warps;
    for (int warp = 0; warp < warps; ++warp) {
      launch(linearise_kernel, grid, block, 0, stream, a, a_pair, image_b[i], u[0], data, area, per_pair, level);
      for (int left = job.iterations; left > 0; left -= tiling.iterations) {
        launch(tile_kernel<Solver>, tiles, dim3(kTileThreads), Exchange<kTileThreads>::kFloats * 4, stream, u[0], q[0],
               u[1], q[1], data, area, per_pair, level, tiling, std::min(left, tiling.iterations), solver);
        std::swap(u[0], u[1]);
        std::swap(q[0], q[1]);
      }
      const bool last = i == 0 && warp + 1 == warps;
      if (job.median > 1 || last) {
        const auto kernel = job.median == 1 ? median_kernel<1> : job.median == 3 ? median_kernel<3> : median_kernel<5>;
        launch(kernel, grid, block, 0, stream, u[0], per_pair, last ? job.flow : u[1], last ? 2 * area : per_pair, area,
               level);
        std::swap(u[0], u[1]);
      }
    }
    coarse = level;
  }
}

// Smooths both images into scratch memory, which has three fields of `count` pixels; the last one is for intermediate
// values.
void smooth_images(Job& job, const Gauss& gauss, int64_t pairs, float* scratch, void* stream) {
  const Level level = job.levels[0];
  const dim3 grid = pixel_grid(level.width, level.height, pairs);
  const int64_t count = pairs * level.area();
  float* way = scratch + 2 * count;
  for (int image = 0; image < 2; ++image) {
    const float*& from = image == 0 ? job.a : job.b;
    float* to = scratch + image * count;
    launch(smooth_kernel, grid, dim3(32, 8), 0, stream, from, way, level, true, gauss);
    launch(smooth_kernel, grid, dim3(32, 8), 0, stream, way, to, level, false, gauss);
    from = to;
  }
}

int64_t smooth_floats(const Job& job, const Params& params) {
  return params.presmooth > 0.0f ? 3 * job.levels[0].area() : 0;
}

template <class Solver>
void solve(const Job& job, const Solver& solver, int64_t pairs, float* scratch, void* stream) {
  if (fits_a_block(job)) {
    launch(small_kernel<Solver>, dim3(pairs), dim3(OneBlock::kThreads), shared_bytes<OneBlock>(job), stream, job,
           solver);
  } else if (fits_a_cluster(job)) {
    launch_clusters<Cluster>(cluster_kernel<Solver>, pairs, shared_bytes<Cluster>(job), stream, job, solver);
  } else {
    solve_large(job, solver, pairs, scratch, stream);
  }
}

}  // namespace

int64_t cuda_scratch(int64_t pairs, int height, int width, const Params& params) {
  const Job job = make_job(height, width, params);
  return pairs * (smooth_floats(job, params) + (fits_a_block(job) || fits_a_cluster(job) ? 0 : large_floats(job)));
}

void flow_cuda(const float* a, const float* b, float* flow, int64_t pairs, int height, int width, const Params& params,
               float* scratch, void* stream) {
  if (height == 0 || width == 0) return;
  // blockIdx.z, which has 16 bits, is the number of a pair
  constexpr int64_t kMost = 65535;
  for (int64_t done = 0; done < pairs; done += kMost) {
    Job job = make_job(height, width, params);
    const int64_t area = job.levels[0].area();
    const int64_t count = std::min(pairs - done, kMost);
    job.pairs = count;
    job.a = a + done * area;
    job.b = b + done * area;
    job.flow = flow + done * 2 * area;
    if (params.presmooth > 0.0f) smooth_images(job, make_gauss(params.presmooth), count, scratch, stream);
    float* rest = scratch + count * smooth_floats(job, params);
    if (params.solver == Solver::kZach) {
      solve(job, Zach::of(params), count, rest, stream);
    } else {
      solve(job, ChambollePock::of(params), count, rest, stream);
    }
  }
}

}  // namespace avfast::tvl1
