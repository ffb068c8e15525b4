// What one thread block does with a tile of pixels in registers and shared memory. Two kernels use it: the one that
// solves a small pair, and the one that iterates on a large pair tile by tile.
//
// A thread owns a strip: `kRows` pixels of one column, with all their fields in registers. It reads its neighbours'
// values from shared memory (`Exchange`). Per pixel and iteration that takes 4 stores and 4 loads along the row and 2
// loads of its own values, and per strip 2 stores and 4 loads down the column. A kernel with all state in shared memory
// would make 26 accesses per pixel.
#pragma once

#include <cstdint>

#include "../resample.h"

namespace avfast::tvl1 {

// Exactly rounded, by one correction of the hardware's 1-ulp estimate; checked on an H200 for every float from 1e-30 to
// 1e30. nvcc's own functions do the same, and branch for values outside that range, which do not occur. A root below
// 1e-30 has no effect: it is added to 1, or compared with it.
#ifdef __CUDACC__
__device__ __forceinline__ float sqrt(float x) {
  x = fmaxf(x, 1e-30f);
  float y;
  asm("rsqrt.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  const float root = x * y;
  return __fmaf_rn(__fmaf_rn(-root, root, x), 0.5f * y, root);
}
__device__ __forceinline__ float reciprocal(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return __fmaf_rn(__fmaf_rn(-x, y, 1.0f), y, y);
}
// Waits for all threads of a cluster. What they have written to each other's shared memory is visible after it.
__device__ __forceinline__ void cluster_sync() {
  asm volatile("barrier.cluster.arrive.aligned;\n\tbarrier.cluster.wait.aligned;" ::: "memory");
}
// The same place in the shared memory of another block of the cluster.
__device__ __forceinline__ float* in_block(float* place, int rank) {
  float* there;
  asm("mapa.u64 %0, %1, %2;" : "=l"(there) : "l"(place), "r"(rank));
  return there;
}
#else
inline float sqrt(float x) { return sqrtf(x); }
inline float reciprocal(float x) { return 1.0f / x; }
#endif
__device__ __forceinline__ float min(float a, float b) { return fminf(a, b); }
__device__ __forceinline__ float max(float a, float b) { return fmaxf(a, b); }
__device__ __forceinline__ float where_above(float above, float limit, float a) { return above > limit ? a : 0.0f; }

}  // namespace avfast::tvl1

#include "../pixel.h"

namespace avfast::tvl1 {

// The longest strip. 64 of a thread's 128 registers hold its fields.
constexpr int kStripRows = 8;
// The columns and rows around an image that bicubic sampling and its derivatives may read.
constexpr int kApron = 3;

// The shared memory of a tile: six fields, column by column, and the lowest row of every strip, stored at the number of
// the thread that has the strip below.
//
// The fields lie a constant distance apart and the pixels of a strip follow each other, so that three addresses are
// enough for a strip and its neighbours. Columns of an odd length keep the threads of a warp in different banks.
template <int kThreads>
struct Exchange {
  // kThreads strips, and one more float per column; there are at most kThreads columns
  static constexpr int kFieldFloats = kThreads * (kStripRows + 1);
  static constexpr int kFloats = 6 * kFieldFloats + 4 * kThreads;

  float *drive1, *drive2, *q11, *q21;
  float *rho_c, *inv_grad;  // each thread's own: in registers there is no room for them
  float *q12, *q22;

  __device__ explicit Exchange(float* memory)
      : drive1(memory),
        drive2(memory + kFieldFloats),
        q11(memory + 2 * kFieldFloats),
        q21(memory + 3 * kFieldFloats),
        rho_c(memory + 4 * kFieldFloats),
        inv_grad(memory + 5 * kFieldFloats),
        q12(memory + 6 * kFieldFloats),
        q22(memory + 6 * kFieldFloats + 2 * kThreads) {}
};

// The floats from one column of a tile to the next, in strips of `rows` rows.
__host__ __device__ inline int exchange_column(int height, int rows) { return (height + rows - 1) / rows * rows | 1; }

// The pixels of one thread. The last strip of a column may reach below the tile; the values that it computes there are
// not used.
template <int kRows>
struct Strip {
  static constexpr int kLeft = 1, kRight = 2, kAbove = 4, kBelow = 8;
  int own;     // place of the first pixel in a field of the exchange
  int column;  // floats from column to column there
  int place;   // the neighbours it has, rows() << 4 and the tile's width << 8: three registers would be too many
  Flow2<float> u[kRows];
  Dual4<float> q[kRows];
  float ix[kRows], iy[kRows];

  // `first`: the first row of the tile in its fields. above, below: whether other blocks have pixels there.
  __device__ Strip(int thread, int width, int height, int columns_apart, int first = 0, bool above = false,
                   bool below = false)
      : column(columns_apart) {
    const int x = thread % width;
    const int y = thread / width * kRows;
    own = x * column + first + y;
    place = (x > 0 ? kLeft : 0) | (x + 1 < width ? kRight : 0) | (y > 0 || above ? kAbove : 0) |
            (y + kRows < height || below ? kBelow : 0) | ::max(0, ::min(kRows, height - y)) << 4 | width << 8;
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      u[r] = {};
      q[r] = {};
      ix[r] = iy[r] = 0.0f;
    }
  }

  // The number of the strip's pixels that lie in the tile: 0 for a thread without work.
  __device__ int rows() const { return place >> 4 & 15; }

  // Sets the data term of a pixel; no barrier is needed.
  template <class Exchange>
  __device__ void set_data(const Exchange& e, int r, const DataTerm<float>& d) {
    ix[r] = d.ix;
    iy[r] = d.iy;
    e.rho_c[own + r] = d.rho_c;
    e.inv_grad[own + r] = d.inv_grad;
  }

  // Writes the duals for the neighbours; a barrier has to follow.
  template <class Exchange>
  __device__ void publish_dual(const Exchange& e) const {
    if (rows() == 0) return;
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      e.q11[own + r] = q[r].q11;
      e.q21[own + r] = q[r].q21;
    }
    if (place & kBelow) {
      e.q12[threadIdx.x + (place >> 8)] = q[kRows - 1].q12;
      e.q22[threadIdx.x + (place >> 8)] = q[kRows - 1].q22;
    }
  }

  // Writes the flow to shared memory; a barrier has to follow.
  template <class Exchange>
  __device__ void publish_flow(const Exchange& e) const {
    if (rows() == 0) return;
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      e.drive1[own + r] = u[r].u1;
      e.drive2[own + r] = u[r].u2;
    }
  }
};

// What is done at the upper and lower edge of a tile that belongs to a single block, and how its threads wait for each
// other.
struct Alone {
  __device__ void sync() const { __syncthreads(); }
  __device__ void up(Flow2<float>) const {}
  __device__ void down(const Dual4<float>&) const {}
};

// Does `count` iterations on a tile. Beyond its edges the duals are 0 and the flow is constant. That is right where the
// tile ends with the image; elsewhere it makes an error that moves inwards by one pixel per iteration. All threads of
// the block call this, after the duals have been published.
template <class Solver, class Exchange, int kRows, class Link = Alone>
__device__ __forceinline__ void iterate(Strip<kRows>& s, const Solver& solver, const Exchange& e, int count,
                                        const Link& link = {}) {
  for (int n = 0; n < count; ++n) {
    if (s.rows() > 0) {
      float up12 = 0.0f, up22 = 0.0f;
      if (s.place & s.kAbove) {
        up12 = e.q12[threadIdx.x];
        up22 = e.q22[threadIdx.x];
      }
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        const Dual4<float>& q = s.q[r];
        const float left11 = s.place & s.kLeft ? e.q11[s.own - s.column + r] : 0.0f;
        const float left21 = s.place & s.kLeft ? e.q21[s.own - s.column + r] : 0.0f;
        const DataTerm<float> d{s.ix[r], s.iy[r], e.rho_c[s.own + r], e.inv_grad[s.own + r]};
        const Flow2<float> next =
            solver.primal(s.u[r], d, q.q11 - left11 + (q.q12 - up12), q.q21 - left21 + (q.q22 - up22));
        up12 = q.q12;
        up22 = q.q22;
        const Flow2<float> drive = Solver::driver(next, s.u[r]);
        s.u[r] = next;
        e.drive1[s.own + r] = drive.u1;
        e.drive2[s.own + r] = drive.u2;
        if (r == 0) link.up(drive);
      }
    }
    link.sync();
    if (s.rows() > 0) {
      // the extrapolated flow is read back: keeping it would take 16 more registers
      const auto drive = [&](int r) -> Flow2<float> {
        if (Solver::kExtrapolates) return {e.drive1[s.own + r], e.drive2[s.own + r]};
        return s.u[r];
      };
      Flow2<float> here = drive(0);
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        Flow2<float> under = here;
        if (r + 1 < kRows) {
          if (r + 1 < s.rows()) under = drive(r + 1 < kRows ? r + 1 : 0);
        } else if (s.place & s.kBelow) {
          under = {e.drive1[s.own + kRows], e.drive2[s.own + kRows]};
        }
        float g11 = 0.0f, g21 = 0.0f;
        if (s.place & s.kRight) {
          g11 = e.drive1[s.own + s.column + r] - here.u1;
          g21 = e.drive2[s.own + s.column + r] - here.u2;
        }
        s.q[r] = project(solver, solver.ascend(s.q[r], g11, under.u1 - here.u1, g21, under.u2 - here.u2));
        here = under;
      }
      s.publish_dual(e);
      link.down(s.q[kRows - 1]);
    }
    link.sync();
  }
}

// The data term of one pixel, from the image and its central differences (the texels of the CPU's engine) at (x, y) +
// u. `image` points to pixel (0, 0) of an image whose border is repeated kApron times, with `stride` floats from row to
// row.
__device__ inline DataTerm<float> sample_and_linearise(const float* image, int stride, int width, int height, int x,
                                                       int y, Flow2<float> u, float target) {
  const float px = static_cast<float>(x) + u.u1;
  const float py = static_cast<float>(y) + u.u2;
  // a NaN becomes 0 here, so that nothing outside the image is read
  const float cx = clamp(px, 0.0f, static_cast<float>(width - 1));
  const float cy = clamp(py, 0.0f, static_cast<float>(height - 1));
  const int x0 = static_cast<int>(cx);
  const int y0 = static_cast<int>(cy);
  const CubicWeights<float> wx = cubic_weights(cx - static_cast<float>(x0));
  const CubicWeights<float> wy = cubic_weights(cy - static_cast<float>(y0));
  const float* from = image + static_cast<int64_t>(y0 - 2) * stride + (x0 - 1);
  float value[3];
#pragma unroll
  for (int i = 0; i < 4; ++i, ++from) {
    // outside the image a difference is that of the border
    const float* by_x = from + (::min(::max(x0 - 1 + i, 0), width - 1) - (x0 - 1 + i));
    // twice the differences: taking the half is exact, and is done once at the end
    float here[6], dx[4], dy[4];
#pragma unroll
    for (int j = 0; j < 6; ++j) here[j] = from[j * static_cast<int64_t>(stride)];
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const float* row = by_x + (j + 1) * static_cast<int64_t>(stride);
      dx[j] = row[1] - row[-1];
      dy[j] = here[j + 2] - here[j];
    }
    if (y0 == 0) dy[0] = dy[1];
    if (y0 == height - 1) dy[2] = dy[1];
    if (y0 >= height - 2) dy[3] = dy[2];
    const float columns[3] = {wy.w[0] * here[1] + wy.w[1] * here[2] + wy.w[2] * here[3] + wy.w[3] * here[4],
                              wy.w[0] * dx[0] + wy.w[1] * dx[1] + wy.w[2] * dx[2] + wy.w[3] * dx[3],
                              wy.w[0] * dy[0] + wy.w[1] * dy[1] + wy.w[2] * dy[2] + wy.w[3] * dy[3]};
#pragma unroll
    for (int c = 0; c < 3; ++c) value[c] = i == 0 ? wx.w[0] * columns[c] : value[c] + wx.w[i] * columns[c];
  }
  const float inside = px == cx && py == cy ? 1.0f : 0.0f;
  return linearise(value[0], 0.5f * value[1], 0.5f * value[2], target, u.u1, u.u2, inside);
}

// The floats from column to column and from row to row of an image.
struct Strides {
  int64_t x, y;
};

// A linear map at one pixel, in the order of the CPU's engine: down the columns first. Taps of weight 0 are not read.
__device__ __forceinline__ float resample(const float* image, Strides s, const Tap& tx, const Tap& ty) {
  float sum = 0.0f;
#pragma unroll
  for (int i = 0; i < 3; ++i) {
    if (tx.weight[i] == 0.0f) continue;
    float column = 0.0f;
#pragma unroll
    for (int j = 0; j < 3; ++j) {
      if (ty.weight[j] != 0.0f) column += ty.weight[j] * image[tx.index[i] * s.x + ty.index[j] * s.y];
    }
    sum += tx.weight[i] * column;
  }
  return sum;
}

// The median over kSide x kSide pixels around (x, y), the border repeated, by forgetful selection: of n/2 + 2 of n
// values the smallest and the largest cannot be the median; both are dropped and the next value is taken, until three
// are left. It is not inlined: inlined, it makes the small kernel spill a few registers.
template <int kSide>
__device__ __noinline__ float median(const float* field, Strides strides, int width, int height, int x, int y) {
  constexpr int kCount = kSide * kSide;
  constexpr int kLast = kCount / 2 + 1;
  const auto at = [&](int k) {
    const int sx = ::min(::max(x + k % kSide - kSide / 2, 0), width - 1);
    const int sy = ::min(::max(y + k / kSide - kSide / 2, 0), height - 1);
    return field[sx * strides.x + sy * strides.y];
  };
  float held[kLast + 1];
#pragma unroll
  for (int k = 0; k <= kLast; ++k) held[k] = at(k);
#pragma unroll
  for (int first = 0; first <= kCount - 1 - kLast; ++first) {
    if (first > 0) held[kLast] = at(kLast + first);
#pragma unroll
    for (int k = first + 1; k <= kLast; ++k) {
      const float low = fminf(held[first], held[k]);
      held[k] = fmaxf(held[first], held[k]);
      held[first] = low;
    }
#pragma unroll
    for (int k = first + 1; k < kLast; ++k) {
      const float low = fminf(held[k], held[kLast]);
      held[kLast] = fmaxf(held[k], held[kLast]);
      held[k] = low;
    }
  }
  return held[kCount / 2];
}

// Returns x, in a way that hides its origin from the compiler: what is computed from it is not moved out of a loop.
__device__ __forceinline__ int opaque(int x) {
#ifdef __CUDACC__
  asm volatile("" : "+r"(x));
#endif
  return x;
}

struct Sorted3 {
  float low, mid, high;
};
__device__ __forceinline__ Sorted3 sort3(float a, float b, float c) {
  const float low = fminf(a, b);
  const float high = fmaxf(a, b);
  const float rest = fmaxf(low, c);
  return {fminf(low, c), fminf(rest, high), fmaxf(rest, high)};
}

// The median of three sorted rows is the middle one of the largest low, the middle mid and the smallest high.
__device__ __forceinline__ float median_of_rows(const Sorted3& a, const Sorted3& b, const Sorted3& c) {
  const float low = fmaxf(fmaxf(a.low, b.low), c.low);
  const float high = fminf(fminf(a.high, b.high), c.high);
  return sort3(low, sort3(a.mid, b.mid, c.mid).mid, high).mid;
}

// The 3 x 3 medians at the pixels of a strip; `field` and `to` point to the first of them, and the border is repeated.
// A row is sorted once for the three medians that it is part of. The neighbouring columns lie `left` and `right` floats
// away, and the rows around the strip end at `first` and `last`. It is not inlined: inlined, it makes the small kernel
// spill a few registers.
template <int kRows>
__device__ __noinline__ void median3_of_strip(const float* field, float* to, int left, int right, int first, int last) {
  Sorted3 rows[3];
#pragma unroll
  for (int k = -1; k <= kRows; ++k) {
    const float* at = field + (k < 0 ? first : ::min(k, last));
    rows[(k + 1) % 3] = sort3(at[left], at[0], at[right]);
    if (k > 0) to[k - 1] = median_of_rows(rows[0], rows[1], rows[2]);
  }
}

}  // namespace avfast::tvl1
