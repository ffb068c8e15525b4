// The loops over rows of pixels. There is one table of them per instruction set.
#pragma once

#include <cstdint>

namespace avfast::tvl1 {

// Lanes of the widest register. Rows are laid out so that every instruction set may read and write whole registers.
constexpr int kMaxLanes = 16;

// The fields of one pyramid level lie row by row: all fields of row 0, then all fields of row 1, and so on. An
// iteration thus runs along one stretch of memory, and two fields never lie a power of two apart, where they would
// share a set of the cache.
//
// The row of a field holds its pixels 0 .. width-1 and some room. [-2], [-1] and [width], [width + 1] may be read, and
// whole registers past the last pixel may be read and written. The values in that room have no meaning, except for
// these.
enum Field { kU1, kU2, kQ11, kQ12, kQ21, kQ22, kIx, kIy, kRhoC, kInvGrad, kBar1, kBar2, kFields };

// A texel holds the value of an image, its two derivatives and a zero, so that a warp computes addresses and weights
// once for the three.
constexpr int kTexelChannels = 4;

// The dual step of a row is done this many rows after its primal step.
constexpr int kDualLag = 2;

// The steps `begin` .. `end` - 1 of one iteration, which has height + kDualLag of them. Step y does the primal step of
// row y and the dual step of row y - kDualLag, where there are such rows. The next iteration may do step y as soon as
// this one has done step y + kDualLag.
struct Iterate {
  float* row;          // pixel 0 of field 0 of row `begin`
  int64_t row_stride;  // floats from one row to the next
  int64_t stride;      // floats from one field to the next
  int width, height;
  int begin, end;
  float* change;  // where not null, receives the squared change of the flow per pixel of the last primal step
};

struct LineariseRow {
  const float* texels;   // texel (0, 0)
  int64_t texel_stride;  // floats from one row of texels to the next
  const float* target;   // the row of the first image; whole registers may be read
  float* row;            // pixel 0 of field 0
  int64_t stride;        // floats from one field to the next
  int y, width, height;
  float reach;  // how far outside the image a point may be warped; texels reach 3 further
  bool gate;    // the data term is off where the warped point leaves the image
};

struct MedianRow {
  const float* const* rows;  // `side` rows, readable at [-2] and [width + 1]
  float* scratch;            // side * (width + 2 * kMaxLanes) floats
  float* out;                // whole registers may be written
  int side, width;
};

struct Zach;
struct ChambollePock;

struct Kernels {
  void (*zach)(const Iterate&, const Zach&);
  void (*chambolle_pock)(const Iterate&, const ChambollePock&);
  void (*linearise_row)(const LineariseRow&);
  void (*median_row)(const MedianRow&);
};

}  // namespace avfast::tvl1

namespace avfast::avx512 {
extern const tvl1::Kernels kTvl1;
}
namespace avfast::avx2 {
extern const tvl1::Kernels kTvl1;
}
namespace avfast::baseline {
extern const tvl1::Kernels kTvl1;
}
