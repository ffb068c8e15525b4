// the CUDA engine of TV-L1 on the CPU, for ctypes.
#include "cuda_on_host.h"
// after what stands in for CUDA
#include "../../csrc/tvl1/flow_cuda.cu"

extern "C" void tvl1_on_host(const float* a, const float* b, float* flow, int64_t pairs, int height, int width,
                             bool chambolle_pock, float tau, float lambda, float scale_step, int scales, int warps,
                             int coarse_warps, int iterations, int median, float presmooth, unsigned seed) {
  using namespace avfast::tvl1;
  Params params;
  params.solver = chambolle_pock ? Solver::kChambollePock : Solver::kZach;
  params.tau = tau;
  params.lambda = lambda;
  params.scale_step = scale_step;
  params.scales = scales;
  params.warps = warps;
  params.coarse_warps = coarse_warps;
  params.iterations = iterations;
  params.median = median;
  params.presmooth = presmooth;
  cuda_on_host::seed = seed;
  // what is read before it is written shows in the flow
  const int64_t floats = cuda_scratch(pairs, height, width, params);
  std::vector<float> scratch(static_cast<size_t>(floats), std::numeric_limits<float>::quiet_NaN());
  flow_cuda(a, b, flow, pairs, height, width, params, scratch.data(), nullptr);
}
