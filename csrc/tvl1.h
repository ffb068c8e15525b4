// TV-L1 optical flow (Zach, Pock and Bischof, DAGM 2007) of many image pairs. Knows neither Python nor torch.
#pragma once

#include <cstdint>

namespace avfast::tvl1 {

enum class Solver : int {
  kZach = 0,           // relaxed by theta, Chambolle's dual step: the published scheme
  kChambollePock = 1,  // primal-dual on the unrelaxed energy; theta is not used
};

// what surrounds the solver.
enum class Scheme : int {
  kAvfast = 0,  // pyramid by area average; no data term where a point leaves the image; median after the iterations
  kOpenCV = 1,  // bilinear pyramid; black around the image; median before them, in every outer iteration
};

struct Params {
  Solver solver = Solver::kZach;
  Scheme scheme = Scheme::kAvfast;
  float tau = 0.25f;         // step of the dual (zach) or of the primal (chambolle-pock)
  float lambda = 0.15f;      // weight of the data term, for grey levels 0..255
  float theta = 0.3f;        // coupling of the relaxation
  float scale_step = 0.5f;   // size of a pyramid level as a share of the next finer one, in (0, 1)
  int scales = 100;          // largest number of levels; the shorter side never falls below 16 pixels
  int warps = 5;             // linearisations per level
  int coarse_warps = 0;      // the same for all levels but the finest, and for an only one; 0 = as many
  int outer_iterations = 1;  // rounds of median filter and iterations per warp
  int iterations = 20;       // primal-dual iterations per round
  float epsilon = 0.f;       // a warp ends when the root mean squared change of the flow is not above it; 0 = never
  int median = 3;            // side of the median filter: 1 (off), 3 or 5
  float presmooth = 0.f;     // standard deviation in pixels of the Gaussian applied to both images first, 0 = off

  // linearisations of level number `level` of `levels`, of which 0 is the finest.
  int warps_of(int level, int levels) const {
    return coarse_warps > 0 && (level > 0 || levels == 1) ? coarse_warps : warps;
  }
};

// Flow from every image of `a` to its partner in `b`: a(p) ~ b(p + flow(p)).
//
//   a, b  [pairs, height, width]     grey levels 0..255, float or uint8_t, finite; only read
//   flow  [pairs, 2, height, width]  pixels, x then y; may not overlap a or b
//   isa   one of avfast::instruction_sets() (isa.h), or null for AVFAST_ISA's, the best where that is not set
//
// All sizes from 1 x 1 work. Pairs are shared out over at most `threads` threads, and the rows of a large pair where
// there are fewer pairs than threads (not with epsilon > 0). The result is the same bit for bit for any number of
// threads, any split of the batch and any instruction set. Throws std::bad_alloc before any work is begun, and
// std::invalid_argument for an `isa` that cannot run here.
template <class Grey>
void flow(const Grey* a, const Grey* b, float* flow, int64_t pairs, int height, int width, const Params& params,
          int threads, const char* isa);

}  // namespace avfast::tvl1
