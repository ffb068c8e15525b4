// the inner loops of the fused ops, over registers F: Vec of simd.h, or the one double of fused.cpp. Formulas:
// kernels/reference.py.
#pragma once

#include <type_traits>

#include "fused_kernels.h"

namespace avfast::fused {

// inside the anonymous namespace of the including file: compiled for one instruction set, used by no other
namespace {

#define AVFAST_LOOP inline __attribute__((always_inline))

// e to the power of x, x held to [-87, 87], where the result is a normal number; NaN stays NaN. Within 1.3e-7 of the
// exact value, relatively: a power of two times a polynomial on [-ln 2 / 2, ln 2 / 2] (coefficients: Cephes, expf).
template <class F>
AVFAST_LOOP F exp(F x) {
  constexpr float kTail[] = {1.3981999507e-3f, 8.3334519073e-3f, 4.1665795894e-2f, 1.6666665459e-1f, 5.0000001201e-1f};
  const F held = min(F(87), max(F(-87), x));
  const F shifted = multiply_add(held, F(1.44269504f), F(F::kToLowBits));
  const F n = shifted - F(F::kToLowBits);
  // ln 2 in two parts, the first with so few bits that its product with n is exact
  const F r = multiply_add(n, F(2.12194440e-4f), multiply_add(n, F(-0.693359375f), held));
  F p(1.9875691500e-4f);
  for (const float c : kTail) p = multiply_add(p, r, F(c));
  return multiply_add(p, r * r, r + F(1)) * power_of_two(shifted);
}

template <class F>
AVFAST_LOOP F sigmoid(F x) {
  return reciprocal(F(1) + exp(F(0) - x));
}

// within 1.2e-7 absolutely, not relatively: near 0 the two terms cancel.
template <class F>
AVFAST_LOOP F tanh(F x) {
  return multiply_add(F(2), sigmoid(x + x), F(-1));
}

// body(x, n) for stretches of n elements: registers full of them, then what is left over. n is a constant in the first
// case, where the whole body is compiled for it.
template <class F, class Body>
AVFAST_LOOP void for_lanes(int64_t count, const Body& body) {
  int64_t x = 0;
  for (; x + F::kWidth <= count; x += F::kWidth) body(x, F::kWidth);
  if (x < count) body(x, static_cast<int>(count - x));
}
#define AVFAST_LANES(x, n) [&](int64_t x, int n) __attribute__((always_inline))

// ---- ConvLSTM gates ----

// body(begin, count) for stretches of at most 512 elements.
template <class Body>
AVFAST_LOOP void for_stretches(int64_t total, const Body& body) {
  constexpr int64_t kMost = 512;
  for (int64_t begin = 0; begin < total; begin += kMost) body(begin, total - begin < kMost ? total - begin : kMost);
}

template <class F>
struct Activated {
  F i, f, o, g;
};

template <class F>
AVFAST_LOOP Activated<F> activated(const typename F::Scalar* gates, int64_t area, int n) {
  return {sigmoid(F::load_first(gates, n)), sigmoid(F::load_first(gates + area, n)),
          sigmoid(F::load_first(gates + 2 * area, n)), tanh(F::load_first(gates + 3 * area, n))};
}

// two loops over stretches that stay in the level 1 cache: in one, the second exponential would wait for the first and
// the core with it (3.5 ns per element, 2.3 in two). The output gate waits in the place of the hidden state.
template <class F>
void gates_forward(const Gates<typename F::Scalar>& given, typename F::Scalar* hidden, typename F::Scalar* new_cell) {
  const auto p = given;
  for_stretches(p.count, [&](int64_t begin, int64_t count) {
    for_lanes<F>(
        count, AVFAST_LANES(x, n) {
          const auto [i, f, o, g] = activated<F>(p.gates + begin + x, p.area, n);
          (f * F::load_first(p.cell + begin + x, n) + i * g).store_first(new_cell + begin + x, n);
          o.store_first(hidden + begin + x, n);
        });
    for_lanes<F>(
        count, AVFAST_LANES(x, n) {
          const F o = F::load_first(hidden + begin + x, n);
          (o * tanh(F::load_first(new_cell + begin + x, n))).store_first(hidden + begin + x, n);
        });
  });
}

// the activations are computed again: keeping them would cost five values of memory per element, and their traffic. Two
// loops, as above; the activations and the new cell wait in the place of the gradients.
template <class F>
void gates_backward(const Gates<typename F::Scalar>& given, const typename F::Scalar* grad_hidden,
                    const typename F::Scalar* grad_new_cell, typename F::Scalar* grad_gates,
                    typename F::Scalar* grad_cell) {
  const auto p = given;
  for_stretches(p.count, [&](int64_t begin, int64_t count) {
    const auto* cell = p.cell + begin;
    auto* to = grad_gates + begin;
    auto* to_cell = grad_cell + begin;
    for_lanes<F>(
        count, AVFAST_LANES(x, n) {
          const auto [i, f, o, g] = activated<F>(p.gates + begin + x, p.area, n);
          i.store_first(to + x, n);
          f.store_first(to + p.area + x, n);
          o.store_first(to + 2 * p.area + x, n);
          g.store_first(to + 3 * p.area + x, n);
          (f * F::load_first(cell + x, n) + i * g).store_first(to_cell + x, n);
        });
    for_lanes<F>(
        count, AVFAST_LANES(x, n) {
          const F i = F::load_first(to + x, n);
          const F f = F::load_first(to + p.area + x, n);
          const F o = F::load_first(to + 2 * p.area + x, n);
          const F g = F::load_first(to + 3 * p.area + x, n);
          const F out = tanh(F::load_first(to_cell + x, n));
          const F dh = F::load_first(grad_hidden + begin + x, n);
          const F dc = F::load_first(grad_new_cell + begin + x, n) + dh * o * (F(1) - out * out);
          (dc * g * i * (F(1) - i)).store_first(to + x, n);
          (dc * F::load_first(cell + x, n) * f * (F(1) - f)).store_first(to + p.area + x, n);
          (dh * out * o * (F(1) - o)).store_first(to + 2 * p.area + x, n);
          (dc * i * (F(1) - g * g)).store_first(to + 3 * p.area + x, n);
          (dc * f).store_first(to_cell + x, n);
        });
  });
}

// ---- backward warp ----

// where a register of pixels falls along one axis.
template <class F>
struct Place {
  typename F::Int first;   // the pixel at or before it, or beside the image
  F weight;                // of the pixel after that
  typename F::Int moving;  // -1 where the gradient of the flow is that of the image, 0 where it is 0
};

// `=` member by member: GCC 12 copies the whole through memory, in halves of registers.
template <class F>
AVFAST_LOOP void keep(Place<F>& to, const Place<F>& from) {
  to.first = from.first;
  to.weight.raw = from.weight.raw;
  to.moving = from.moving;
}

template <class F, bool kZeros>
AVFAST_LOOP Place<F> place(F coordinate, int size) {
  using T = typename F::Scalar;
  using Int = typename F::Int;
  constexpr int kMargin = kZeros ? 1 : 0;
  const F low(static_cast<T>(-kMargin));
  const F high(static_cast<T>(size - 1 + kMargin));
  const F held = min(high, max(low, coordinate));  // NaN stays NaN
  // 0 for NaN, whose conversion could be anything
  Int first = floor_int(where(coordinate.raw == coordinate.raw, held, F(0)));
  const int last = size - 2 + kMargin < -kMargin ? -kMargin : size - 2 + kMargin;
  first = first < last ? first : Int{} + last;
  return {first, held - F(__builtin_convertvector(first, typename F::Raw)),
          (coordinate.raw > low.raw) & (coordinate.raw < high.raw)};
}

// the first of the two neighbouring pixels taken along one axis, which lie inside the image whatever the flow (of an
// image of one pixel, it is taken twice).
template <class F, bool kZeros>
AVFAST_LOOP typename F::Int base(const Place<F>& at, int size) {
  using Int = typename F::Int;
  if constexpr (!kZeros) return at.first;
  const int inner = size > 1 ? size - 2 : 0;
  return at.first < 0 ? Int{} : at.first > inner ? Int{} + inner : at.first;
}

// the weights that fall on those two.
template <class F>
struct Taps {
  F weight[2], slope[2];  // slope: the weights' derivatives by the coordinate
};

template <class F, bool kZeros>
AVFAST_LOOP Taps<F> taps(const Place<F>& at, int size) {
  if constexpr (!kZeros) return {{F(1) - at.weight, at.weight}, {F(-1), F(1)}};
  // at either end one of the two is a zero beside the image, and the other one is the end's own pixel
  const auto pick = [&](typename F::Int tap, F of_first, F of_second) __attribute__((always_inline)) {
    const typename F::Int inside = tap < size;
    return where(inside & (at.first == tap), of_first, F(0)) + where(inside & (at.first + 1 == tap), of_second, F(0));
  };
  Taps<F> t;
  for (int k = 0; k < 2; ++k) {
    const typename F::Int tap = base<F, kZeros>(at, size) + k;
    t.weight[k] = pick(tap, F(1) - at.weight, at.weight);
    t.slope[k] = pick(tap, F(-1), F(1));
  }
  return t;
}

template <class F>
using Index = std::remove_reference_t<decltype(typename F::Int{}[0])>;

// the values at plane[index] and plane[index + step] of a register of pixels. `run`: the indices count up by one, as
// they do where a flow is smooth; otherwise neighbours are loaded two at a time.
template <class F, bool kPairs>
AVFAST_LOOP void gather(const typename F::Scalar* plane, const Index<F>* index, int step, bool run, F* first,
                        F* second) {
  using T = typename F::Scalar;
  if (run) {
    *first = F::load_first(plane + index[0], F::kWidth);
    *second = F::load_first(plane + index[0] + step, F::kWidth);
  } else if constexpr (kPairs && sizeof(T) == 4) {
    // two pairs of every four to each register: the shuffles then stay within 128 bits, and are one instruction each
    typename F::Doubles a, b;
    typename F::Int even, odd;
    for (int lane = 0; lane < F::kWidth; lane += 4) {
      for (int k = 0; k < 2; ++k) {
        double pair;
        __builtin_memcpy(&pair, plane + index[lane + k], sizeof pair);
        a[lane / 2 + k] = pair;
        __builtin_memcpy(&pair, plane + index[lane + 2 + k], sizeof pair);
        b[lane / 2 + k] = pair;
        even[lane + k] = lane + 2 * k;
        even[lane + 2 + k] = F::kWidth + lane + 2 * k;
      }
    }
    odd = even + 1;
    *first = F(__builtin_shuffle(reinterpret_cast<typename F::Raw>(a), reinterpret_cast<typename F::Raw>(b), even));
    *second = F(__builtin_shuffle(reinterpret_cast<typename F::Raw>(a), reinterpret_cast<typename F::Raw>(b), odd));
  } else {
    for (int lane = 0; lane < F::kWidth; ++lane) {
      first->raw[lane] = plane[index[lane]];
      second->raw[lane] = plane[index[lane] + step];
    }
  }
}

// adds `first` to plane[index] and `second` to plane[index + step], for the first n pixels of a register.
template <class F>
AVFAST_LOOP void scatter(typename F::Scalar* plane, const Index<F>* index, int step, int n, bool run, F first,
                         F second) {
  using T = typename F::Scalar;
  if (run) {
    T* to = plane + index[0];
    T last[F::kWidth];
    second.store_first(last, F::kWidth);
    (F::load_first(to, F::kWidth) + (first + previous_lanes(second, T(0)))).store_first(to, F::kWidth);
    to[F::kWidth] += last[F::kWidth - 1];
  } else {
    // one by one: of a pair that overlaps the one before, the load would wait for that one's store
    T parts[2][F::kWidth];
    first.store_first(parts[0], F::kWidth);
    second.store_first(parts[1], F::kWidth);
    for (int lane = 0; lane < n; ++lane) {
      plane[index[lane]] += parts[0][lane];
      plane[index[lane] + step] += parts[1][lane];
    }
  }
}

// from, from + 1, from + 2, ...
template <class F>
AVFAST_LOOP typename F::Int count_up(Index<F> from) {
  typename F::Int numbers;
  for (int lane = 0; lane < F::kWidth; ++lane) numbers[lane] = lane;
  return numbers + from;
}

// body(at, n, x, y, index, run) over the rows of `p`: a register of n pixels from pixel `at` on, their places along
// both axes, and the first of the four pixels that each one takes, which are neighbours in a `run`. In two loops over
// stretches of a row: the gathers take their indices from memory and do not wait for the arithmetic (forward, one
// channel: 1.8 ns per pixel in one loop, 1.3 in two).
template <class F, bool kZeros, bool kPairs, class Body>
AVFAST_LOOP void for_pixels(const Warp<typename F::Scalar>& p, const Body& body) {
  using T = typename F::Scalar;
  constexpr int kMost = 128;
  Index<F> index[kMost];
  bool runs[kMost / F::kWidth];
  Place<F> places_x[kMost / F::kWidth], places_y[kMost / F::kWidth];
  const T* flow_y = p.flow + static_cast<int64_t>(p.height) * p.width;
  for (int y = p.begin; y < p.end; ++y) {
    for (int begin = 0; begin < p.width; begin += kMost) {
      const int count = p.width - begin < kMost ? p.width - begin : kMost;
      const int64_t row = static_cast<int64_t>(y) * p.width + begin;
      for_lanes<F>(
          count, AVFAST_LANES(x, n) {
            const F px = F(static_cast<T>(begin + x)) + F::iota() + F::load_first(p.flow + row + x, n);
            const F py = F(static_cast<T>(y)) + F::load_first(flow_y + row + x, n);
            const Place<F> at_x = place<F, kZeros>(px, p.width);
            const Place<F> at_y = place<F, kZeros>(py, p.height);
            keep(places_x[x / F::kWidth], at_x);
            keep(places_y[x / F::kWidth], at_y);
            const typename F::Int first = base<F, kZeros>(at_y, p.height) * p.width + base<F, kZeros>(at_x, p.width);
            __builtin_memcpy(index + x, &first, sizeof first);
            runs[x / F::kWidth] = kPairs && n == F::kWidth && F::all(first == count_up<F>(first[0]));
          });
      for_lanes<F>(
          count, AVFAST_LANES(x, n) {
            const int i = x / F::kWidth;
            body(row + x, n, places_x[i], places_y[i], index + x, runs[i]);
          });
    }
  }
}

template <class F, bool kZeros, bool kPairs>
void warp_forward_as(const Warp<typename F::Scalar>& given, typename F::Scalar* out) {
  const auto p = given;
  const int64_t plane = static_cast<int64_t>(p.height) * p.width;
  const int right = p.width > 1 ? 1 : 0;
  const int down = p.height > 1 ? p.width : 0;
  for_pixels<F, kZeros, kPairs>(p, [&](int64_t at, int n, const Place<F>& at_x, const Place<F>& at_y,
                                       const Index<F>* index, bool run) __attribute__((always_inline)) {
    const Taps<F> tx = taps<F, kZeros>(at_x, p.width);
    const Taps<F> ty = taps<F, kZeros>(at_y, p.height);
    for (int c = 0; c < p.channels; ++c) {
      const auto* image = p.image + c * plane;
      F v00, v01, v10, v11;
      gather<F, kPairs>(image, index, right, run, &v00, &v01);
      gather<F, kPairs>(image + down, index, right, run, &v10, &v11);
      const F top = tx.weight[0] * v00 + tx.weight[1] * v01;
      const F bottom = tx.weight[0] * v10 + tx.weight[1] * v11;
      (ty.weight[0] * top + ty.weight[1] * bottom).store_first(out + c * plane + at, n);
    }
  });
}

template <class F, bool kZeros, bool kPairs>
void warp_backward_as(const Warp<typename F::Scalar>& given, const typename F::Scalar* grad_out,
                      typename F::Scalar* grad_image, typename F::Scalar* grad_flow) {
  using T = typename F::Scalar;
  const auto p = given;
  const int64_t plane = static_cast<int64_t>(p.height) * p.width;
  const int right = p.width > 1 ? 1 : 0;
  const int down = p.height > 1 ? p.width : 0;
  for_pixels<F, kZeros, kPairs>(p, [&](int64_t at, int n, const Place<F>& at_x, const Place<F>& at_y,
                                       const Index<F>* index, bool run) __attribute__((always_inline)) {
    const Taps<F> tx = taps<F, kZeros>(at_x, p.width);
    const Taps<F> ty = taps<F, kZeros>(at_y, p.height);
    F by_x(0), by_y(0);
    for (int c = 0; c < p.channels; ++c) {
      const F g = F::load_first(grad_out + c * plane + at, n);
      if (grad_flow != nullptr) {
        const auto* image = p.image + c * plane;
        F v00, v01, v10, v11;
        gather<F, kPairs>(image, index, right, run, &v00, &v01);
        gather<F, kPairs>(image + down, index, right, run, &v10, &v11);
        by_x = by_x + g * (ty.weight[0] * (tx.slope[0] * v00 + tx.slope[1] * v01) +
                           ty.weight[1] * (tx.slope[0] * v10 + tx.slope[1] * v11));
        by_y = by_y + g * (tx.weight[0] * (ty.slope[0] * v00 + ty.slope[1] * v10) +
                           tx.weight[1] * (ty.slope[0] * v01 + ty.slope[1] * v11));
      }
      if (grad_image != nullptr) {
        auto* to = grad_image + c * plane;
        const F upper = g * ty.weight[0], lower = g * ty.weight[1];
        scatter<F>(to, index, right, n, run, upper * tx.weight[0], upper * tx.weight[1]);
        scatter<F>(to + down, index, right, n, run, lower * tx.weight[0], lower * tx.weight[1]);
      }
    }
    if (grad_flow != nullptr) {
      where(at_x.moving, by_x, F(0)).store_first(grad_flow + at, n);
      where(at_y.moving, by_y, F(0)).store_first(grad_flow + plane + at, n);
    }
  });
}

template <class F>
void warp_forward(const Warp<typename F::Scalar>& p, typename F::Scalar* out) {
  // a row of one pixel has no pairs
  if (p.width > 1) {
    p.zeros ? warp_forward_as<F, true, true>(p, out) : warp_forward_as<F, false, true>(p, out);
  } else {
    p.zeros ? warp_forward_as<F, true, false>(p, out) : warp_forward_as<F, false, false>(p, out);
  }
}

template <class F>
void warp_backward(const Warp<typename F::Scalar>& p, const typename F::Scalar* grad_out,
                   typename F::Scalar* grad_image, typename F::Scalar* grad_flow) {
  if (p.width > 1) {
    p.zeros ? warp_backward_as<F, true, true>(p, grad_out, grad_image, grad_flow)
            : warp_backward_as<F, false, true>(p, grad_out, grad_image, grad_flow);
  } else {
    p.zeros ? warp_backward_as<F, true, false>(p, grad_out, grad_image, grad_flow)
            : warp_backward_as<F, false, false>(p, grad_out, grad_image, grad_flow);
  }
}

// ---- flow loss ----

// the sum of all lanes, in double.
template <class F>
AVFAST_LOOP double total(F x) {
  double sum = 0.0;
  for (int lane = 0; lane < F::kWidth; ++lane) sum += static_cast<double>(x.raw[lane]);
  return sum;
}

template <class F>
AVFAST_LOOP F absolute(F x) {
  return max(x, F(0) - x);
}

template <class F>
AVFAST_LOOP F sign(F x) {
  return where(x.raw > F(0).raw, F(1), where(x.raw < F(0).raw, F(-1), F(0)));
}

// the values to the right of the register `here` of a row at x; 0 for the row's last pixel, whose difference has no
// weight. Loading them would end at the last pixel by single values, which took a third of the time at 48 pixels.
template <class F>
AVFAST_LOOP F to_the_right(const typename F::Scalar* at, F here, int64_t x, int width) {
  return next_lanes(here, x + F::kWidth < width ? at[F::kWidth] : typename F::Scalar(0));
}

// row by row. The derivative of an absolute difference is written to scratch, with an edge weight of 0 in the last
// column and row; the gradient is then the difference of two neighbours, the first one's left and upper being 0.
template <class F>
double flow_loss(const FlowLoss<typename F::Scalar>& given, typename F::Scalar* grad) {
  using T = typename F::Scalar;
  const auto p = given;
  const int64_t plane = static_cast<int64_t>(p.height) * p.width;
  const int64_t room = p.width + 1;
  T* const edge_x = p.scratch;
  T* const edge_y = edge_x + room;
  T* const along = edge_y + room;  // one element before the first pixel: 0
  T* const down[2][2] = {{along + room, along + 2 * room},
                         {along + 3 * room, along + 4 * room}};  // [parity][component]
  along[0] = T(0);
  for (int x = 0; x < p.width; ++x) down[1][0][x] = down[1][1][x] = T(0);
  const F per_channel(T(1) / static_cast<T>(p.channels));
  double sum = 0.0;
  for (int y = 0; y < p.height; ++y) {
    const int64_t row = static_cast<int64_t>(y) * p.width;
    const bool last_row = y == p.height - 1;
    const int64_t below = last_row ? 0 : p.width;
    for_lanes<F>(
        p.width, AVFAST_LANES(x, n) {
          F change_x(0), change_y(0);
          for (int c = 0; c < p.channels; ++c) {
            const T* at = p.frame + c * plane + row + x;
            const F here = F::load_first(at, n);
            change_x = change_x + absolute(to_the_right(at, here, x, p.width) - here);
            change_y = change_y + absolute(F::load_first(at + below, n) - here);
          }
          exp(F(0) - change_x * per_channel).store_first(edge_x + x, n);
          exp(F(0) - change_y * per_channel).store_first(edge_y + x, n);
        });
    edge_x[p.width - 1] = T(0);
    if (last_row) {
      for (int x = 0; x < p.width; ++x) edge_y[x] = T(0);
    }
    for (int component = 0; component < 2; ++component) {
      T* const here_down = down[y % 2][component];
      const T* const above_down = down[1 - y % 2][component];
      F data(0), smooth(0);
      for_lanes<F>(
          p.width, AVFAST_LANES(x, n) {
            const int64_t at = component * plane + row + x;
            const F u = F::load_first(p.prediction + at, n);
            const F error = u - F::load_first(p.target + at, n);
            const F dx = to_the_right(p.prediction + at, u, x, p.width) - u;
            const F dy = F::load_first(p.prediction + at + below, n) - u;
            const F wx = F::load_first(edge_x + x, n);
            const F wy = F::load_first(edge_y + x, n);
            data = data + error * error;
            smooth = smooth + absolute(dx) * wx + absolute(dy) * wy;
            if (grad != nullptr) {
              (sign(dx) * wx).store_first(along + 1 + x, n);
              (sign(dy) * wy).store_first(here_down + x, n);
            }
          });
      sum += static_cast<double>(p.data_weight) * total(data) + static_cast<double>(p.smooth_weight) * total(smooth);
      if (grad == nullptr) continue;
      for_lanes<F>(
          p.width, AVFAST_LANES(x, n) {
            const int64_t at = component * plane + row + x;
            const F error = F::load_first(p.prediction + at, n) - F::load_first(p.target + at, n);
            const F flat = F::load_first(along + x, n) - F::load_first(along + 1 + x, n) +
                           F::load_first(above_down + x, n) - F::load_first(here_down + x, n);
            (F(2) * F(p.data_weight) * error + F(p.smooth_weight) * flat).store_first(grad + at, n);
          });
    }
  }
  return sum;
}

// ---- modulate ----

template <class F>
void modulate_forward(const Modulate<typename F::Scalar>& given, typename F::Scalar* out) {
  const auto p = given;
  for_lanes<F>(
      p.count, AVFAST_LANES(x, n) { (F(p.gamma) * F::load_first(p.in + x, n) + F(p.beta)).store_first(out + x, n); });
}

template <class F>
void modulate_backward(const Modulate<typename F::Scalar>& given, const typename F::Scalar* grad_out,
                       typename F::Scalar* grad_in, typename F::Scalar* grad_gamma, typename F::Scalar* grad_beta) {
  const auto p = given;
  F by_gamma(0), by_beta(0);
  for_lanes<F>(
      p.count, AVFAST_LANES(x, n) {
        const F g = F::load_first(grad_out + x, n);
        by_gamma = by_gamma + g * F::load_first(p.in + x, n);
        by_beta = by_beta + g;
        (F(p.gamma) * g).store_first(grad_in + x, n);
      });
  *grad_gamma = static_cast<typename F::Scalar>(total(by_gamma));
  *grad_beta = static_cast<typename F::Scalar>(total(by_beta));
}

// ---- tiles ----

template <class F, int kInputs, bool kAdd>
void combine_as(const Combination<typename F::Scalar>& given) {
  const auto p = given;
  for_lanes<F>(
      p.count, AVFAST_LANES(x, n) {
        F values[kInputs];
        for (int k = 0; k < kInputs; ++k) values[k] = F::load_first(p.from[k] + x, n);
        const typename F::Scalar* factor = p.matrix;
        for (int a = 0; a < p.outputs; ++a, factor += kInputs) {
          F sum = F(factor[0]) * values[0];
          for (int k = 1; k < kInputs; ++k) sum = multiply_add(F(factor[k]), values[k], sum);
          if (kAdd) sum = sum + F::load_first(p.to[a] + x, n);
          sum.store_first(p.to[a] + x, n);
        }
      });
}

template <class F, int kInputs = 1>
void combine(const Combination<typename F::Scalar>& p) {
  if (p.inputs == kInputs) {
    p.add ? combine_as<F, kInputs, true>(p) : combine_as<F, kInputs, false>(p);
  } else if constexpr (kInputs < kMostCombined) {
    combine<F, kInputs + 1>(p);
  }
}

// `F2`: the wider registers for the ops whose chains are long.
template <class F, class F2>
constexpr Kernels<typename F::Scalar> kernels() {
  return {gates_forward<F2>, gates_backward<F2>,  warp_forward<F>,      warp_backward<F>,
          flow_loss<F>,      modulate_forward<F>, modulate_backward<F>, combine<F2>};
}

}  // namespace
}  // namespace avfast::fused
