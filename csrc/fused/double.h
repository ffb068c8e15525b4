// One double with the interface of the registers in simd.h.
#pragma once

#include <cmath>
#include <cstdint>

#define AVFAST_INLINE inline __attribute__((always_inline))

namespace avfast::AVFAST_ISA {

struct Vec {
  using Scalar = double;
  static constexpr int kWidth = 1;
  using Raw = double __attribute__((vector_size(sizeof(double))));
  using Int = int64_t __attribute__((vector_size(sizeof(int64_t))));
  Raw raw;

  Vec() = default;
  Vec(Raw r) : raw(r) {}
  explicit Vec(double x) : raw{x} {}
  static Vec load_first(const double* from, int count) { return Vec(count == 0 ? 0.0 : *from); }
  static Vec iota() { return Vec(0.0); }
  static bool all(Int mask) { return mask[0]; }
  void store_first(double* to, int) const { *to = raw[0]; }
};
using Wide = Vec;

inline Vec operator+(Vec a, Vec b) { return a.raw + b.raw; }
inline Vec operator-(Vec a, Vec b) { return a.raw - b.raw; }
inline Vec operator*(Vec a, Vec b) { return a.raw * b.raw; }
inline Vec multiply_add(Vec a, Vec b, Vec c) { return a * b + c; }
inline Vec reciprocal(Vec a) { return Vec(1.0 / a.raw[0]); }
inline Vec exp(Vec a) { return Vec(std::exp(a.raw[0])); }
// b where a is NaN, as in simd.h
inline Vec min(Vec a, Vec b) { return a.raw[0] < b.raw[0] ? a : b; }
inline Vec max(Vec a, Vec b) { return a.raw[0] > b.raw[0] ? a : b; }
inline Vec where(Vec::Int mask, Vec a, Vec b) { return mask[0] ? a : b; }
inline Vec next_lanes(Vec, double last) { return Vec(last); }
inline Vec previous_lanes(Vec, double first) { return Vec(first); }
inline Vec::Int floor_int(Vec a) { return Vec::Int{static_cast<int64_t>(std::floor(a.raw[0]))}; }

}  // namespace avfast::AVFAST_ISA
