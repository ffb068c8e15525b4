// What the fused ops share: work on several threads, loops over registers, and functions of a register.
//
// Everything is inside the anonymous namespace of kernels.cpp, so that the copy for one instruction set is used by no
// other. F is a type of registers: Vec, or Wide for arithmetic in long chains, where one register would leave the core
// waiting.
#pragma once

#include "../common/threads.h"
#include "ops.h"

namespace avfast::AVFAST_ISA {
namespace {

using T = Vec::Scalar;
using fused::AxisSizes;
using fused::List;

#define AVFAST_LOOP inline __attribute__((always_inline))

AVFAST_LOOP int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
AVFAST_LOOP int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }

// ---- threads ----

// Elements for which a second thread is worth its cost: they take 10 to 20 us.
constexpr int64_t kGrain = 1 << 13;
// Work is cut into parts of half of that, of which the threads take one after the other. A thread that is woken late,
// or whose core another process uses, thus leaves its work to the others. Large work has at most so many parts per
// thread.
constexpr int64_t kPartWork = kGrain / 2;
constexpr int64_t kMaxPartsPerThread = 16;

// Calls body(begin, end) on stretches that cover 0 .. count - 1, which are `work` elements in all.
template <class Body>
void share(int64_t count, int64_t work, int threads, const Body& body) {
  const int64_t workers = smaller(smaller(threads, count), work / kGrain);
  if (workers <= 1) return body(int64_t{0}, count);
  const int64_t parts = smaller(count, smaller(work / kPartWork, kMaxPartsPerThread * workers));
  run_parts(parts, static_cast<int>(workers),
            [&](int64_t part) { body(count * part / parts, count * (part + 1) / parts); });
}

// Calls body(row, first, count) for the elements begin .. end - 1 of [rows, area], row by row.
template <class Body>
void for_rows(int64_t begin, int64_t end, int64_t area, const Body& body) {
  while (begin < end) {
    const int64_t row = begin / area;
    const int64_t stop = smaller(end, (row + 1) * area);
    body(row, begin - row * area, stop - begin);
    begin = stop;
  }
}

// ---- memory ----

// An array of the standard library would be code that all instruction sets share (simd.h).
template <class Element>
class Array {
 public:
  explicit Array(int64_t size) : data_(new Element[size]) {}
  Array(const Array&) = delete;
  Array& operator=(const Array&) = delete;
  ~Array() { delete[] data_; }
  Element* data() { return data_; }
  Element& operator[](int64_t i) { return data_[i]; }

 private:
  Element* const data_;
};

AVFAST_LOOP void copy(const T* from, int64_t count, T* to) { __builtin_memcpy(to, from, count * sizeof(T)); }
AVFAST_LOOP void set_zero(T* to, int64_t count) { __builtin_memset(to, 0, count * sizeof(T)); }

// ---- registers ----

// Calls body(x, n) for stretches of n elements: first full registers, then the rest. n is a constant in the first case,
// and the whole body is compiled for it.
template <class F, class Body>
AVFAST_LOOP void for_lanes(int64_t count, const Body& body) {
  int64_t x = 0;
  for (; x + F::kWidth <= count; x += F::kWidth) body(x, F::kWidth);
  if (x < count) body(x, static_cast<int>(count - x));
}
#define AVFAST_LANES(x, n) [&](int64_t x, int n) __attribute__((always_inline))

// e to the power of x. x is held to [-87, 87], where the result is a normal number; NaN stays NaN. The relative error
// is at most 1.3e-7: a power of two times a polynomial on [-ln 2 / 2, ln 2 / 2] (coefficients: Cephes, expf).
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

// The absolute error is at most 1.2e-7. The relative error is larger near 0, where the two terms cancel.
template <class F>
AVFAST_LOOP F tanh(F x) {
  return multiply_add(F(2), sigmoid(x + x), F(-1));
}

AVFAST_LOOP Vec absolute(Vec x) { return max(x, Vec(0) - x); }

AVFAST_LOOP Vec sign(Vec x) { return where(x.raw > Vec(0).raw, Vec(1), where(x.raw < Vec(0).raw, Vec(-1), Vec(0))); }

// The sum of all lanes, in double.
AVFAST_LOOP double total(Vec x) {
  double sum = 0.0;
  for (int lane = 0; lane < Vec::kWidth; ++lane) sum += static_cast<double>(x.raw[lane]);
  return sum;
}

}  // namespace
}  // namespace avfast::AVFAST_ISA
