// Backward warp by a flow in pixels (ops.def, kernels/warp.py).
#pragma once

#include <type_traits>

#include "loops.h"

namespace avfast::AVFAST_ISA {
namespace {

using Int = Vec::Int;
using Index = std::remove_reference_t<decltype(Int{}[0])>;

// One image and the flow on its grid; the rows begin .. end - 1 of the output are computed.
struct WarpImage {
  const T* image;  // [channels, height, width]
  const T* flow;   // [2, height, width]
  int channels, height, width;
  int begin, end;

  int64_t plane() const { return static_cast<int64_t>(height) * width; }
  // to the neighbours of a pixel; an image of one row or column has none
  int right() const { return width > 1 ? 1 : 0; }
  int down() const { return height > 1 ? width : 0; }
};

// ---- where a register of pixels leads, along one axis ----

struct Coordinate {
  Int first;   // the pixel at or before it, or beside the image
  Vec weight;  // of the pixel after that
  Int moving;  // -1 where the output changes with the flow, 0 where the flow's gradient is 0
};

// Assigns member by member: GCC 12 copies the whole through memory, in halves of registers.
AVFAST_LOOP void assign(Coordinate& to, const Coordinate& from) {
  to.first = from.first;
  to.weight.raw = from.weight.raw;
  to.moving = from.moving;
}

template <bool kZeros>
AVFAST_LOOP Coordinate locate(Vec coordinate, int size) {
  constexpr int kMargin = kZeros ? 1 : 0;
  const Vec low(static_cast<T>(-kMargin));
  const Vec high(static_cast<T>(size - 1 + kMargin));
  const Vec held = min(high, max(low, coordinate));  // NaN stays NaN
  // 0 for NaN, whose conversion could be anything
  Int first = floor_int(where(coordinate.raw == coordinate.raw, held, Vec(0)));
  const int last = size - 2 + kMargin < -kMargin ? -kMargin : size - 2 + kMargin;
  first = first < last ? first : Int{} + last;
  return {first, held - Vec(__builtin_convertvector(first, Vec::Raw)),
          (coordinate.raw > low.raw) & (coordinate.raw < high.raw)};
}

// The first of the two neighbouring pixels that are read along one axis. Both lie inside the image whatever the flow;
// in an image of one pixel that pixel is read twice.
template <bool kZeros>
AVFAST_LOOP Int first_tap(const Coordinate& at, int size) {
  if constexpr (!kZeros) return at.first;
  const int inner = size > 1 ? size - 2 : 0;
  return at.first < 0 ? Int{} : at.first > inner ? Int{} + inner : at.first;
}

struct Taps {
  Vec weight[2], slope[2];  // slope: the derivative of the weight by the coordinate
};

template <bool kZeros>
AVFAST_LOOP Taps taps(const Coordinate& at, int size) {
  if constexpr (!kZeros) return {{Vec(1) - at.weight, at.weight}, {Vec(-1), Vec(1)}};
  // at either end one of the two is a zero beside the image, and the other one is the end's own pixel
  const auto pick = [&](Int tap, Vec of_first, Vec of_second) __attribute__((always_inline)) {
    const Int inside = tap < size;
    return where(inside & (at.first == tap), of_first, Vec(0)) +
           where(inside & (at.first + 1 == tap), of_second, Vec(0));
  };
  Taps t;
  for (int k = 0; k < 2; ++k) {
    const Int tap = first_tap<kZeros>(at, size) + k;
    t.weight[k] = pick(tap, Vec(1) - at.weight, at.weight);
    t.slope[k] = pick(tap, Vec(-1), Vec(1));
  }
  return t;
}

// ---- reading and adding at the addresses of a register of pixels ----

// The values at plane[index] and plane[index + step]. `run`: the indices count up by one, as they do where a flow is
// smooth; otherwise neighbours are loaded two at a time (kPairs: there are neighbours).
template <bool kPairs>
AVFAST_LOOP void gather(const T* plane, const Index* index, int step, bool run, Vec* first, Vec* second) {
  if (run) {
    *first = Vec::load_first(plane + index[0], Vec::kWidth);
    *second = Vec::load_first(plane + index[0] + step, Vec::kWidth);
    return;
  }
#ifndef AVFAST_DOUBLE
  if constexpr (kPairs) {
    // two pairs of every four to each register: the shuffles then stay within 128 bits, and are one instruction each
    Vec::Doubles a, b;
    Int even, odd;
    for (int lane = 0; lane < Vec::kWidth; lane += 4) {
      for (int k = 0; k < 2; ++k) {
        double pair;
        __builtin_memcpy(&pair, plane + index[lane + k], sizeof pair);
        a[lane / 2 + k] = pair;
        __builtin_memcpy(&pair, plane + index[lane + 2 + k], sizeof pair);
        b[lane / 2 + k] = pair;
        even[lane + k] = lane + 2 * k;
        even[lane + 2 + k] = Vec::kWidth + lane + 2 * k;
      }
    }
    odd = even + 1;
    *first = Vec(__builtin_shuffle(reinterpret_cast<Vec::Raw>(a), reinterpret_cast<Vec::Raw>(b), even));
    *second = Vec(__builtin_shuffle(reinterpret_cast<Vec::Raw>(a), reinterpret_cast<Vec::Raw>(b), odd));
    return;
  }
#endif
  for (int lane = 0; lane < Vec::kWidth; ++lane) {
    first->raw[lane] = plane[index[lane]];
    second->raw[lane] = plane[index[lane] + step];
  }
}

// Adds `first` to plane[index] and `second` to plane[index + step], for the first n pixels of a register.
AVFAST_LOOP void scatter(T* plane, const Index* index, int step, int n, bool run, Vec first, Vec second) {
  if (run) {
    T* to = plane + index[0];
    T last[Vec::kWidth];
    second.store_first(last, Vec::kWidth);
    (Vec::load_first(to, Vec::kWidth) + (first + previous_lanes(second, T(0)))).store_first(to, Vec::kWidth);
    to[Vec::kWidth] += last[Vec::kWidth - 1];
  } else {
    // one by one: of a pair that overlaps the one before, the load would wait for that one's store
    T parts[2][Vec::kWidth];
    first.store_first(parts[0], Vec::kWidth);
    second.store_first(parts[1], Vec::kWidth);
    for (int lane = 0; lane < n; ++lane) {
      plane[index[lane]] += parts[0][lane];
      plane[index[lane] + step] += parts[1][lane];
    }
  }
}

// from, from + 1, from + 2, ...
AVFAST_LOOP Int count_up(Index from) {
  Int numbers;
  for (int lane = 0; lane < Vec::kWidth; ++lane) numbers[lane] = lane;
  return numbers + from;
}

// Calls body(at, n, x, y, index, run) over the rows of `p`: a register of n pixels from pixel `at` on, where they lead
// along both axes, and the first of the four pixels that each one reads, which are neighbours in a `run`. Two loops
// over stretches of a row: the gathers take their indices from memory and do not wait for the arithmetic (forward, one
// channel: 1.8 ns per pixel in one loop, 1.3 in two).
template <bool kZeros, bool kPairs, class Body>
AVFAST_LOOP void for_pixels(const WarpImage& p, const Body& body) {
  constexpr int kStretch = 128;
  Index index[kStretch];
  bool runs[kStretch / Vec::kWidth];
  Coordinate along_x[kStretch / Vec::kWidth], along_y[kStretch / Vec::kWidth];
  const T* flow_y = p.flow + p.plane();
  for (int y = p.begin; y < p.end; ++y) {
    for (int begin = 0; begin < p.width; begin += kStretch) {
      const int count = p.width - begin < kStretch ? p.width - begin : kStretch;
      const int64_t row = static_cast<int64_t>(y) * p.width + begin;
      for_lanes<Vec>(
          count, AVFAST_LANES(x, n) {
            const Vec px = Vec(static_cast<T>(begin + x)) + Vec::iota() + Vec::load_first(p.flow + row + x, n);
            const Vec py = Vec(static_cast<T>(y)) + Vec::load_first(flow_y + row + x, n);
            const Coordinate at_x = locate<kZeros>(px, p.width);
            const Coordinate at_y = locate<kZeros>(py, p.height);
            assign(along_x[x / Vec::kWidth], at_x);
            assign(along_y[x / Vec::kWidth], at_y);
            const Int first = first_tap<kZeros>(at_y, p.height) * p.width + first_tap<kZeros>(at_x, p.width);
            __builtin_memcpy(index + x, &first, sizeof first);
            runs[x / Vec::kWidth] = kPairs && n == Vec::kWidth && Vec::all(first == count_up(first[0]));
          });
      for_lanes<Vec>(
          count, AVFAST_LANES(x, n) {
            const int i = x / Vec::kWidth;
            body(row + x, n, along_x[i], along_y[i], index + x, runs[i]);
          });
    }
  }
}
#define AVFAST_PIXELS(at, n, at_x, at_y, index, run)                                                   \
  [&](int64_t at, int n, const Coordinate& at_x, const Coordinate& at_y, const Index* index, bool run) \
      __attribute__((always_inline))

// ---- the ops ----

template <bool kZeros, bool kPairs>
void warp_rows(const WarpImage& given, T* out) {
  // a copy: the compiler must assume that a store changes what a reference shows
  const WarpImage p = given;
  const int64_t plane = p.plane();
  const int right = p.right(), down = p.down();
  for_pixels<kZeros, kPairs>(
      p, AVFAST_PIXELS(at, n, at_x, at_y, index, run) {
        const Taps tx = taps<kZeros>(at_x, p.width);
        const Taps ty = taps<kZeros>(at_y, p.height);
        for (int c = 0; c < p.channels; ++c) {
          const T* image = p.image + c * plane;
          Vec v00, v01, v10, v11;
          gather<kPairs>(image, index, right, run, &v00, &v01);
          gather<kPairs>(image + down, index, right, run, &v10, &v11);
          const Vec top = tx.weight[0] * v00 + tx.weight[1] * v01;
          const Vec bottom = tx.weight[0] * v10 + tx.weight[1] * v11;
          (ty.weight[0] * top + ty.weight[1] * bottom).store_first(out + c * plane + at, n);
        }
      });
}

// grad_out [channels, height, width]; grad_image is added to, grad_flow is written; either may be null.
template <bool kZeros, bool kPairs>
void warp_gradients(const WarpImage& given, const T* grad_out, T* grad_image, T* grad_flow) {
  const WarpImage p = given;
  const int64_t plane = p.plane();
  const int right = p.right(), down = p.down();
  for_pixels<kZeros, kPairs>(
      p, AVFAST_PIXELS(at, n, at_x, at_y, index, run) {
        const Taps tx = taps<kZeros>(at_x, p.width);
        const Taps ty = taps<kZeros>(at_y, p.height);
        Vec by_x(0), by_y(0);
        for (int c = 0; c < p.channels; ++c) {
          const Vec g = Vec::load_first(grad_out + c * plane + at, n);
          if (grad_flow != nullptr) {
            const T* image = p.image + c * plane;
            Vec v00, v01, v10, v11;
            gather<kPairs>(image, index, right, run, &v00, &v01);
            gather<kPairs>(image + down, index, right, run, &v10, &v11);
            by_x = by_x + g * (ty.weight[0] * (tx.slope[0] * v00 + tx.slope[1] * v01) +
                               ty.weight[1] * (tx.slope[0] * v10 + tx.slope[1] * v11));
            by_y = by_y + g * (tx.weight[0] * (ty.slope[0] * v00 + ty.slope[1] * v10) +
                               tx.weight[1] * (ty.slope[0] * v01 + ty.slope[1] * v11));
          }
          if (grad_image != nullptr) {
            T* to = grad_image + c * plane;
            const Vec upper = g * ty.weight[0], lower = g * ty.weight[1];
            scatter(to, index, right, n, run, upper * tx.weight[0], upper * tx.weight[1]);
            scatter(to + down, index, right, n, run, lower * tx.weight[0], lower * tx.weight[1]);
          }
        }
        if (grad_flow != nullptr) {
          where(at_x.moving, by_x, Vec(0)).store_first(grad_flow + at, n);
          where(at_y.moving, by_y, Vec(0)).store_first(grad_flow + plane + at, n);
        }
      });
}

void warp_forward(const T* image, const T* flow, T* out, int64_t batch, int channels, int height, int width, bool zeros,
                  int threads) {
  const int64_t plane = static_cast<int64_t>(height) * width;
  const int64_t size = channels * plane;
  // a row of one pixel has no pairs of neighbours
  const auto run = width > 1 ? zeros ? warp_rows<true, true> : warp_rows<false, true>
                   : zeros   ? warp_rows<true, false>
                             : warp_rows<false, false>;
  share(batch * height, batch * size, threads, [&](int64_t begin, int64_t end) {
    for_rows(begin, end, height, [&](int64_t b, int64_t first, int64_t count) {
      const int y = static_cast<int>(first);
      run({image + b * size, flow + 2 * b * plane, channels, height, width, y, y + static_cast<int>(count)},
          out + b * size);
    });
  });
}

void warp_backward(const T* image, const T* flow, const T* grad_out, T* grad_image, T* grad_flow, int64_t batch,
                   int channels, int height, int width, bool zeros, int threads) {
  const int64_t plane = static_cast<int64_t>(height) * width;
  const int64_t size = channels * plane;
  const auto run = width > 1 ? zeros ? warp_gradients<true, true> : warp_gradients<false, true>
                   : zeros   ? warp_gradients<true, false>
                             : warp_gradients<false, false>;
  // a pixel of the image's gradient receives from anywhere in the image. So a plane of it belongs to one thread, and
  // its sums have one order: whole images where there are enough of them, else single planes, and the rows of the
  // flow's gradient in a second pass
  if (grad_image != nullptr && batch < threads) {
    share(batch * channels, batch * size, threads, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        set_zero(grad_image + i * plane, plane);
        run({image + i * plane, flow + 2 * (i / channels) * plane, 1, height, width, 0, height}, grad_out + i * plane,
            grad_image + i * plane, nullptr);
      }
    });
    grad_image = nullptr;
    if (grad_flow == nullptr) return;
  }
  const int rows = grad_image == nullptr ? height : 1;
  share(batch * rows, batch * size, threads, [&](int64_t begin, int64_t end) {
    for_rows(begin, end, rows, [&](int64_t b, int64_t first, int64_t count) {
      const int y = rows == 1 ? 0 : static_cast<int>(first);
      const int stop = rows == 1 ? height : y + static_cast<int>(count);
      if (grad_image != nullptr) set_zero(grad_image + b * size, size);
      run({image + b * size, flow + 2 * b * plane, channels, height, width, y, stop}, grad_out + b * size,
          grad_image == nullptr ? nullptr : grad_image + b * size,
          grad_flow == nullptr ? nullptr : grad_flow + 2 * b * plane);
    });
  });
}

}  // namespace
}  // namespace avfast::AVFAST_ISA
