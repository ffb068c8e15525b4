// TV-L1 optical flow (Zach, Pock and Bischof, DAGM 2007) of many image pairs. Knows neither Python nor torch.
#pragma once

#include <cstdint>

namespace avfast::tvl1 {

enum class Solver : int {
  kZach = 0,           // relaxed by theta, Chambolle's dual step: the published scheme
  kChambollePock = 1,  // primal-dual on the unrelaxed energy; theta is not used
};

struct Params {
  Solver solver = Solver::kZach;
  float tau = 0.25f;      // step of the dual (zach) or of the primal (chambolle-pock)
  float lambda = 0.15f;   // weight of the data term, for grey levels 0..255
  float theta = 0.3f;     // coupling of the relaxation
  int warps = 5;          // linearisations per pyramid level
  int iterations = 20;    // primal-dual iterations per warp, always all of them
  int median = 3;         // side of the median filter after each warp: 1 (off), 3 or 5
  float presmooth = 0.f;  // standard deviation in pixels of the Gaussian applied to both images first, 0 = off
};

// Flow from every image of `a` to its partner in `b`: a(p) ~ b(p + flow(p)).
//
//   a, b  [pairs, height, width]     grey levels 0..255, finite; only read
//   flow  [pairs, 2, height, width]  pixels, x then y; may not overlap a or b
//
// All sizes from 1 x 1 work. Pairs are shared out over at most `threads` threads; the result is the same bit for bit
// for any number of threads and any split of the batch. Throws std::bad_alloc before any work is begun.
void flow(const float* a, const float* b, float* flow, int64_t pairs, int height, int width, const Params& params,
          int threads);

}  // namespace avfast::tvl1
