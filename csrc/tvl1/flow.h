// TV-L1 optical flow (Zach, Pock and Bischof, DAGM 2007) of many image pairs. Knows neither Python nor torch.
#pragma once

#include <cstdint>

#include "params.h"

namespace avfast::tvl1 {

// Flow from every image of `a` to its partner in `b`: a(p) ~ b(p + flow(p)).
//
//   a, b  [pairs, height, width]     grey levels 0..255, float or uint8_t, finite; only read
//   flow  [pairs, 2, height, width]  pixels, x then y; may not overlap a or b
//
// All sizes from 1 x 1 work. Pairs are shared out over at most `threads` threads, and the rows of a large pair where
// there are fewer pairs than threads (not with epsilon > 0). The result is the same bit for bit for any number of
// threads, any split of the batch and any instruction set (isa.h says which one runs). Throws std::bad_alloc before any
// work is begun, and std::invalid_argument where AVFAST_ISA names a set that cannot run here.
template <class Grey>
void flow(const Grey* a, const Grey* b, float* flow, int64_t pairs, int height, int width, const Params& params,
          int threads);

}  // namespace avfast::tvl1
