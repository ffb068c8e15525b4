// TV-L1 on a CUDA device, for scheme avfast with a fixed number of iterations. No CUDA type appears here, so that the
// binding compiles without CUDA's headers.
#pragma once

#include <cstdint>

#include "../params.h"

namespace avfast::tvl1 {

// Returns the floats of scratch memory that `flow_cuda` needs for so many pairs; 0 where a pair fits one thread block.
int64_t cuda_scratch(int64_t pairs, int height, int width, const Params& params);

// As `flow`, on the current device: all pointers are device memory, work is queued on `stream` (a cudaStream_t) and
// nothing is allocated or waited for, so a CUDA graph can capture it.
//
//   scratch  cuda_scratch() floats, in use until the stream is done
//
// The result is the CPU's, bit for bit. Throws std::runtime_error with CUDA's message when a launch fails.
void flow_cuda(const float* a, const float* b, float* flow, int64_t pairs, int height, int width, const Params& params,
               float* scratch, void* stream);

}  // namespace avfast::tvl1
