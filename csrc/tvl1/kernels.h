// the loops over rows of pixels, one table of them per instruction set.
#pragma once

#include <cstdint>

namespace avfast::tvl1 {

// the widest register: rows are laid out so that every set may read and write whole registers.
constexpr int kMaxLanes = 16;

// the fields of one pyramid level lie row by row: all fields of row 0, all fields of row 1, and so on, so that an
// iteration runs along one stretch of memory and never meets two fields a power of two apart.
//
// a field's row holds its pixels 0 .. width-1 and some room: [-2], [-1] and [width], [width + 1] may be read, whole
// registers past the last pixel read and written. What is there beyond the named elements means nothing.
enum Field { kU1, kU2, kQ11, kQ12, kQ21, kQ22, kIx, kIy, kRhoC, kInvGrad, kBar1, kBar2, kFields };

// texels: an image beside its two derivatives and a zero, so that the three share the addresses and weights of a warp.
constexpr int kTexelChannels = 4;

// the dual step of a row is done this many rows after its primal step.
constexpr int kDualLag = 2;

// steps `begin` .. `end` - 1 of the height + kDualLag of one iteration: step y does the primal step of row y and the
// dual step of row y - kDualLag, where there are such rows. The next iteration may do step y after this one has done
// step y + kDualLag.
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
