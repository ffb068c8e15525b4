// floats in the registers of one instruction set. The translation unit says which: it is compiled once per set, with
// AVFAST_ISA naming the namespace that keeps the copies apart (setup.py).
//
// no function of the standard library is used here or in what includes this: the linker keeps one copy of an inline
// function, and would take the one with AVX-512 in it for the machine that has none.
#pragma once

#include <cstdint>

#if defined(__SSE2__)
#include <immintrin.h>
#endif

namespace avfast::AVFAST_ISA {

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX2__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif

// kLanes floats with the arithmetic of one; every operation rounds as the scalar one does.
struct Vec {
  using Raw = float __attribute__((vector_size(kLanes * sizeof(float))));
  using Int = int32_t __attribute__((vector_size(kLanes * sizeof(int32_t))));
  Raw raw;

  Vec() = default;
  Vec(Raw r) : raw(r) {}
  Vec(float x) : raw(x - Raw{}) {}

  static Vec load(const float* from) {
    Vec v;
    __builtin_memcpy(&v.raw, from, sizeof v.raw);
    return v;
  }
  // 0, 1, 2, ...
  static Vec iota() {
    Raw r;
    for (int i = 0; i < kLanes; ++i) r[i] = static_cast<float>(i);
    return r;
  }
  void store(float* to) const { __builtin_memcpy(to, &raw, sizeof raw); }
};

#define AVFAST_INLINE inline __attribute__((always_inline))

AVFAST_INLINE Vec operator+(Vec a, Vec b) { return a.raw + b.raw; }
AVFAST_INLINE Vec operator-(Vec a, Vec b) { return a.raw - b.raw; }
AVFAST_INLINE Vec operator*(Vec a, Vec b) { return a.raw * b.raw; }
AVFAST_INLINE Vec reciprocal(Vec a) { return Vec(1.0f).raw / a.raw; }

// the smaller and the larger, b where one is NaN: what the instructions do. GCC 12 makes a comparison and a blend of
// the ternary operator, and no root at all of a loop.
#if defined(__AVX512F__)
AVFAST_INLINE Vec min(Vec a, Vec b) { return static_cast<Vec::Raw>(_mm512_min_ps(a.raw, b.raw)); }
AVFAST_INLINE Vec max(Vec a, Vec b) { return static_cast<Vec::Raw>(_mm512_max_ps(a.raw, b.raw)); }
AVFAST_INLINE Vec sqrt(Vec a) { return static_cast<Vec::Raw>(_mm512_sqrt_ps(a.raw)); }
#elif defined(__AVX2__)
AVFAST_INLINE Vec min(Vec a, Vec b) { return static_cast<Vec::Raw>(_mm256_min_ps(a.raw, b.raw)); }
AVFAST_INLINE Vec max(Vec a, Vec b) { return static_cast<Vec::Raw>(_mm256_max_ps(a.raw, b.raw)); }
AVFAST_INLINE Vec sqrt(Vec a) { return static_cast<Vec::Raw>(_mm256_sqrt_ps(a.raw)); }
#elif defined(__SSE2__)
AVFAST_INLINE Vec min(Vec a, Vec b) { return static_cast<Vec::Raw>(_mm_min_ps(a.raw, b.raw)); }
AVFAST_INLINE Vec max(Vec a, Vec b) { return static_cast<Vec::Raw>(_mm_max_ps(a.raw, b.raw)); }
AVFAST_INLINE Vec sqrt(Vec a) { return static_cast<Vec::Raw>(_mm_sqrt_ps(a.raw)); }
#else
AVFAST_INLINE Vec min(Vec a, Vec b) { return a.raw < b.raw ? a.raw : b.raw; }
AVFAST_INLINE Vec max(Vec a, Vec b) { return a.raw > b.raw ? a.raw : b.raw; }
AVFAST_INLINE Vec sqrt(Vec a) {
  for (int i = 0; i < kLanes; ++i) a.raw[i] = __builtin_sqrtf(a.raw[i]);
  return a;
}
#endif

// a where `above` is greater than `limit`, else 0.
AVFAST_INLINE Vec where_above(Vec above, Vec limit, Vec a) { return above.raw > limit.raw ? a.raw : Vec::Raw{}; }

// 1 where a equals b, else 0.
AVFAST_INLINE Vec equal(Vec a, Vec b) { return a.raw == b.raw ? Vec(1.0f).raw : Vec::Raw{}; }

// the largest whole number not above a, for |a| < 2^31, as floats and as integers.
AVFAST_INLINE Vec::Int floor_int(Vec a) {
  const Vec::Int cut = __builtin_convertvector(a.raw, Vec::Int);
  // the comparison is -1 where it holds
  return cut + (__builtin_convertvector(cut, Vec::Raw) > a.raw);
}
AVFAST_INLINE Vec to_float(Vec::Int a) { return __builtin_convertvector(a, Vec::Raw); }

}  // namespace avfast::AVFAST_ISA
