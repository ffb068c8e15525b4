// The CUDA engine of TV-L1 on the CPU, for ctypes.
#include "cuda_on_host.h"
// has to follow the replacement of CUDA
#include "../../csrc/tvl1/cuda/flow_cuda.cu"

static avfast::tvl1::Params params;

// Sets the parameter of that name for the calls that follow; a solver or a scheme by its number.
extern "C" void set_param(const char* name, double value) {
  using namespace avfast::tvl1;
#define AVFAST_PARAM(type, field, unset, needed) \
  if (std::string(name) == #field) params.field = static_cast<type>(value);
#include "../../csrc/tvl1/params.def"
#undef AVFAST_PARAM
}

extern "C" void tvl1_on_host(const float* a, const float* b, float* flow, int64_t pairs, int height, int width,
                             unsigned seed) {
  using namespace avfast::tvl1;
  cuda_on_host::seed = seed;
  // NaN, so that a value that is read before it is written shows in the flow
  const int64_t floats = cuda_scratch(pairs, height, width, params);
  std::vector<float> scratch(static_cast<size_t>(floats), std::numeric_limits<float>::quiet_NaN());
  flow_cuda(a, b, flow, pairs, height, width, params, scratch.data(), nullptr);
}
