// The loops of TV-L1, compiled once per instruction set (setup.py). See simd.h for what must not be used here.
#include "kernels.h"

#include "../common/simd.h"
#include "pixel.h"

namespace avfast::AVFAST_ISA {
namespace {

using namespace tvl1;

// A register of pixels in every field of one row. There is a pointer to each third field only; the two fields that
// follow are one and two strides further, which an address can express. A pointer to each field would need more
// registers than there are.
struct Cursor {
  float* group[kFields / 3];
  int64_t stride;

  AVFAST_INLINE Cursor(float* row, int64_t field_stride) : stride(field_stride) {
    for (int i = 0; i < kFields / 3; ++i) group[i] = row + 3 * i * field_stride;
  }
  AVFAST_INLINE float* at(Field field) const { return group[field / 3] + field % 3 * stride; }
  AVFAST_INLINE Vec load(Field field, int dx = 0) const { return Vec::load(at(field) + dx); }
  AVFAST_INLINE void advance(int64_t floats) {
    for (float*& p : group) p += floats;
  }
};

// The steps begin .. end - 1 of an iteration that also lie in r.begin .. r.end - 1: in one loop, the primal step of a
// row and the dual step of the row two above. The two do not depend on each other, so that each uses the time in which
// the other waits: for the roots, then for the division. Other orders take longer on a Zen 3 core: with the dual of the
// row just above, which depends on the primal step, 1.15 to 1.25 times; one step after the other, 1.1 times; row by
// row, each set up anew, 1.02 to 1.06 times.
template <class Solver, bool kPrimal, bool kDual, bool kBelow, bool kChange>
AVFAST_INLINE void iterate_rows(const Iterate& r, int begin, int end, const Solver& parameters) {
  constexpr bool kBar = Solver::kExtrapolates;
  // the dual follows the gradient of the flow itself, or of an extrapolated flow that is kept beside it
  constexpr Field kDrive1 = kBar ? kBar1 : kU1;
  constexpr Field kDrive2 = kBar ? kBar2 : kU2;
  begin = begin < r.begin ? r.begin : begin;
  end = end > r.end ? r.end : end;
  if (begin >= end) return;

  // copies: the compiler must assume that a store changes what a reference shows
  const Solver solver = parameters;
  const int width = r.width;
  float* change = r.change;
  const int64_t row_stride = r.row_stride;
  const int64_t to_next_row = row_stride - (width + kLanes - 1) / kLanes * kLanes;
  float* first = r.row + (begin - r.begin) * row_stride;
  Cursor row(first, r.stride);
  Cursor above(first - row_stride, r.stride);
  Cursor dual(first - kDualLag * row_stride, r.stride);
  float* past1 = first + kDrive1 * r.stride + width;
  float* past2 = first + kDrive2 * r.stride + width;

  for (int y = begin; y < end; ++y) {
    for (int x = 0; x < width; x += kLanes, row.advance(kLanes), above.advance(kLanes), dual.advance(kLanes)) {
      Ascended<Vec> ascended;
      if constexpr (kDual) {
        const Vec u1 = dual.load(kDrive1);
        const Vec u2 = dual.load(kDrive2);
        const Vec g12 = kBelow ? above.load(kDrive1) - u1 : Vec(0.0f);
        const Vec g22 = kBelow ? above.load(kDrive2) - u2 : Vec(0.0f);
        const Dual4<Vec> q{dual.load(kQ11), dual.load(kQ12), dual.load(kQ21), dual.load(kQ22)};
        ascended = solver.ascend(q, dual.load(kDrive1, 1) - u1, g12, dual.load(kDrive2, 1) - u2, g22);
      }
      if constexpr (kPrimal) {
        const Flow2<Vec> u{row.load(kU1), row.load(kU2)};
        const DataTerm<Vec> d{row.load(kIx), row.load(kIy), row.load(kRhoC), row.load(kInvGrad)};
        // above the upper border lies a row of zeros
        const Vec div1 = row.load(kQ11) - row.load(kQ11, -1) + (row.load(kQ12) - above.load(kQ12));
        const Vec div2 = row.load(kQ21) - row.load(kQ21, -1) + (row.load(kQ22) - above.load(kQ22));
        const Flow2<Vec> next = solver.primal(u, d, div1, div2);
        next.u1.store(row.at(kU1));
        next.u2.store(row.at(kU2));
        if constexpr (kBar) {
          const Flow2<Vec> drive = solver.driver(next, u);
          drive.u1.store(row.at(kBar1));
          drive.u2.store(row.at(kBar2));
        }
        if constexpr (kChange) {
          const Vec du1 = next.u1 - u.u1;
          const Vec du2 = next.u2 - u.u2;
          (du1 * du1 + du2 * du2).store(change + x);
        }
      }
      if constexpr (kDual) {
        const Dual4<Vec> next = project(solver, ascended);
        next.q11.store(dual.at(kQ11));
        next.q12.store(dual.at(kQ12));
        next.q21.store(dual.at(kQ21));
        next.q22.store(dual.at(kQ22));
      }
    }
    row.advance(to_next_row);
    above.advance(to_next_row);
    dual.advance(to_next_row);
    if constexpr (kPrimal) {
      // with this the forward difference in the last column is 0
      past1[0] = past1[-1];
      past2[0] = past2[-1];
      past1 += row_stride;
      past2 += row_stride;
    }
  }
}

// The first steps of an iteration have no dual step, the last ones no primal step, and the last row has no row below.
template <class Solver>
void iterate(const Iterate& given, const Solver& parameters) {
  const Iterate r = given;
  const Solver solver = parameters;
  const int height = r.height;
  const int alone = height < kDualLag ? height : kDualLag;
  const int done = height > kDualLag ? height : kDualLag;
  const int last = height + kDualLag - 1;
  if (r.change != nullptr) {
    iterate_rows<Solver, true, false, false, true>(r, 0, alone, solver);
    iterate_rows<Solver, true, true, true, true>(r, kDualLag, height, solver);
  } else {
    iterate_rows<Solver, true, false, false, false>(r, 0, alone, solver);
    iterate_rows<Solver, true, true, true, false>(r, kDualLag, height, solver);
  }
  iterate_rows<Solver, false, true, true, false>(r, done, last, solver);
  iterate_rows<Solver, false, true, false, false>(r, last, last + 1, solver);
}

// Where some pixels of a row lead to. This is kept between two loops over the pixels: a single loop, which waits for
// the points of each register, takes 1.1 times as long.
struct Points {
  static constexpr int kCount = 64;
  float x_weights[4][kCount], y_weights[4][kCount];
  float inside[kCount];
  int32_t first[kCount];  // floats from texel (0, 0) to the first of the 4 x 4 taps
  float warped[3][kCount];
};

AVFAST_INLINE void find_points(const LineariseRow& r, const Cursor& row, int x, int i, Points& points) {
  const Vec low(-r.reach);
  const Vec high_x(static_cast<float>(r.width - 1) + r.reach);
  const Vec high_y(static_cast<float>(r.height - 1) + r.reach);
  const Vec px = Vec(static_cast<float>(x)) + Vec::iota() + row.load(kU1);
  const Vec py = Vec(static_cast<float>(r.y)) + row.load(kU2);
  const Vec cx = clamp(px, low, high_x);
  const Vec cy = clamp(py, low, high_y);
  const Vec::Int x0 = floor_int(cx);
  const Vec::Int y0 = floor_int(cy);
  const CubicWeights<Vec> wx = cubic_weights(cx - to_float(x0));
  const CubicWeights<Vec> wy = cubic_weights(cy - to_float(y0));
  for (int k = 0; k < 4; ++k) {
    wx.w[k].store(points.x_weights[k] + i);
    wy.w[k].store(points.y_weights[k] + i);
  }
  (r.gate ? equal(px, cx) * equal(py, cy) : Vec(1.0f)).store(points.inside + i);
  const Vec::Int first = (y0 - 1) * static_cast<int32_t>(r.texel_stride) + (x0 - 1) * kTexelChannels;
  __builtin_memcpy(points.first + i, &first, sizeof first);
}

// Warps the pixels of one lane of every quad, first down the columns, pixel by pixel, then along the row. Returns their
// texels.
template <int kLane>
AVFAST_INLINE Vec warp(const LineariseRow& r, const Points& points, int i) {
  static_assert(kTexelChannels == 4, "a texel is a quad");
  constexpr int kParts = 4 / kQuads;  // registers for four texels in a row
  Vec columns[kQuads][kParts];
  for (int quad = 0; quad < kQuads; ++quad) {
    const int pixel = i + 4 * quad + kLane;
    const float* from = r.texels + points.first[pixel];
    for (int part = 0; part < kParts; ++part) {
      const auto tap = [&](int k) {
        return Vec(points.y_weights[k][pixel]) * Vec::load(from + part * kLanes + k * r.texel_stride);
      };
      columns[quad][part] = tap(0) + tap(1) + tap(2) + tap(3);
    }
  }
  Vec taps[4];
  transpose_quads(columns, taps);
  for (int k = 0; k < 4; ++k) taps[k] = spread_in_quads<kLane>(Vec::load(points.x_weights[k] + i)) * taps[k];
  return taps[0] + taps[1] + taps[2] + taps[3];
}

void linearise_row(const LineariseRow& given) {
  // a copy: the compiler must assume that a store changes what a reference shows
  const LineariseRow r = given;
  Points points;
  for (int begin = 0; begin < r.width; begin += Points::kCount) {
    const int count = r.width - begin < Points::kCount ? r.width - begin : Points::kCount;
    Cursor row(r.row + begin, r.stride);
    for (int i = 0; i < count; i += kLanes, row.advance(kLanes)) find_points(r, row, begin + i, i, points);
    for (int i = 0; i < count; i += kLanes) {
      Vec texels[4] = {warp<0>(r, points, i), warp<1>(r, points, i), warp<2>(r, points, i), warp<3>(r, points, i)};
      transpose_in_quads(texels);
      for (int c = 0; c < 3; ++c) texels[c].store(points.warped[c] + i);
    }
    row = Cursor(r.row + begin, r.stride);
    for (int i = 0; i < count; i += kLanes, row.advance(kLanes)) {
      const DataTerm<Vec> d =
          linearise(Vec::load(points.warped[0] + i), Vec::load(points.warped[1] + i), Vec::load(points.warped[2] + i),
                    Vec::load(r.target + begin + i), row.load(kU1), row.load(kU2), Vec::load(points.inside + i));
      d.ix.store(row.at(kIx));
      d.iy.store(row.at(kIy));
      d.rho_c.store(row.at(kRhoC));
      d.inv_grad.store(row.at(kInvGrad));
    }
  }
}

AVFAST_INLINE void sort(Vec& a, Vec& b) {
  const Vec low = min(a, b);
  b = max(a, b);
  a = low;
}

AVFAST_INLINE Vec median_of_3(Vec a, Vec b, Vec c) { return max(min(a, b), min(max(a, b), c)); }

// Sorts each column of kSide rows into the scratch rows, lowest value first: columns -kReach .. width - 1 + kReach.
template <int kSide>
AVFAST_INLINE void sort_columns(const MedianRow& r, int64_t scratch_stride) {
  constexpr int kReach = kSide / 2;
  for (int x = -kReach; x < r.width + kReach; x += kLanes) {
    Vec v[kSide];
    for (int i = 0; i < kSide; ++i) v[i] = Vec::load(r.rows[i] + x);
    // insertion by exchanges of neighbours; every one of the kSide results is needed
#pragma GCC unroll 8
    for (int i = 1; i < kSide; ++i) {
#pragma GCC unroll 8
      for (int j = i; j > 0; --j) sort(v[j - 1], v[j]);
    }
    for (int i = 0; i < kSide; ++i) v[i].store(r.scratch + i * scratch_stride + kReach + x);
  }
}

// The median of three sorted columns is the middle one of the largest low, the middle mid and the smallest high.
void median3_row(const MedianRow& r, int64_t scratch_stride) {
  sort_columns<3>(r, scratch_stride);
  for (int x = 0; x < r.width; x += kLanes) {
    Vec v[3][3];
    for (int i = 0; i < 3; ++i) {
      for (int k = 0; k < 3; ++k) v[i][k] = Vec::load(r.scratch + i * scratch_stride + x + k);
    }
    const Vec low = max(max(v[0][0], v[0][1]), v[0][2]);
    const Vec high = min(min(v[2][0], v[2][1]), v[2][2]);
    median_of_3(low, median_of_3(v[1][0], v[1][1], v[1][2]), high).store(r.out + x);
  }
}

// Sorts five columns, then five rows. The median of the 25 values can then only be one of 13, because each of the
// others is known to have 13 or more values above it, or below it.
void median5_row(const MedianRow& r, int64_t scratch_stride) {
  sort_columns<5>(r, scratch_stride);
  for (int x = 0; x < r.width; x += kLanes) {
    Vec v[5][5];
#pragma GCC unroll 8
    for (int i = 0; i < 5; ++i) {
#pragma GCC unroll 8
      for (int k = 0; k < 5; ++k) v[i][k] = Vec::load(r.scratch + i * scratch_stride + x + k);
#pragma GCC unroll 8
      for (int k = 1; k < 5; ++k) {
#pragma GCC unroll 8
        for (int j = k; j > 0; --j) sort(v[i][j - 1], v[i][j]);
      }
    }
    Vec held[13] = {v[0][3], v[0][4], v[1][2], v[1][3], v[1][4], v[2][1], v[2][2],
                    v[2][3], v[3][0], v[3][1], v[3][2], v[4][0], v[4][1]};
    // forgetful selection: of 8 of 13 values, the smallest and the largest cannot be the median. Both are dropped and
    // the next value is taken, until three are left
    constexpr int kCount = 13;
    constexpr int kLast = kCount / 2 + 1;
#pragma GCC unroll 16
    for (int first = 0; first <= kCount - 1 - kLast; ++first) {
      if (first > 0) held[kLast] = held[kLast + first];
#pragma GCC unroll 16
      for (int k = first + 1; k <= kLast; ++k) sort(held[first], held[k]);
#pragma GCC unroll 16
      for (int k = first + 1; k < kLast; ++k) sort(held[k], held[kLast]);
    }
    held[kCount / 2].store(r.out + x);
  }
}

void median_row(const MedianRow& r) {
  const int64_t scratch_stride = r.width + 2 * kMaxLanes;
  r.side == 3 ? median3_row(r, scratch_stride) : median5_row(r, scratch_stride);
}

}  // namespace

extern const tvl1::Kernels kTvl1 = {iterate<tvl1::Zach>, iterate<tvl1::ChambollePock>, linearise_row, median_row};

}  // namespace avfast::AVFAST_ISA
