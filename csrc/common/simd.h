// Registers of floats for one instruction set. A translation unit that includes this is compiled once per set, and
// AVFAST_ISA names the namespace that keeps the copies apart (setup.py).
//
// Neither this file nor the code that includes it uses functions of the standard library. The linker keeps only one
// copy of an inline function, and that could be the copy with AVX-512, on a machine that has none.
#pragma once

#include <cstdint>

#if defined(__SSE2__)
#include <immintrin.h>
#endif

#define AVFAST_INLINE inline __attribute__((always_inline))

namespace avfast::AVFAST_ISA {

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX2__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif

// kLanes floats with the arithmetic of one: every operation rounds as the scalar one does. multiply_add rounds once
// where the instruction set has it as one instruction, and twice in the baseline. Code whose results have to be the
// same bit for bit on all sets (TV-L1) does not use it.
struct Vec {
  using Scalar = float;
  static constexpr int kWidth = kLanes;
  // Adding this to a float rounds that float to a whole number n, |n| < 2^22; n is then in the lowest bits of the sum.
  static constexpr float kToLowBits = 12582912.0f;  // 1.5 * 2^23
  using Raw = float __attribute__((vector_size(kLanes * sizeof(float))));
  using Int = int32_t __attribute__((vector_size(kLanes * sizeof(int32_t))));
  using Doubles = double __attribute__((vector_size(kLanes * sizeof(float))));  // pairs of floats, to be moved as one
  Raw raw;

  Vec() = default;
  Vec(Raw r) : raw(r) {}
  Vec(float x) : raw(x - Raw{}) {}

  AVFAST_INLINE static Vec load(const float* from) {
    Vec v;
    __builtin_memcpy(&v.raw, from, sizeof v.raw);
    return v;
  }
  // 0, 1, 2, ...
  AVFAST_INLINE static Vec iota() {
    Raw r;
    for (int i = 0; i < kLanes; ++i) r[i] = static_cast<float>(i);
    return r;
  }
  // Returns whether all lanes of a mask are -1.
  AVFAST_INLINE static bool all(Int mask) {
#if defined(__AVX512F__)
    return _mm512_test_epi32_mask(reinterpret_cast<__m512i>(mask), reinterpret_cast<__m512i>(mask)) == 0xffff;
#elif defined(__AVX2__)
    return _mm256_movemask_ps(reinterpret_cast<__m256>(mask)) == 0xff;
#elif defined(__SSE2__)
    return _mm_movemask_ps(reinterpret_cast<__m128>(mask)) == 0xf;
#else
    for (int i = 0; i < kLanes; ++i) {
      if (mask[i] == 0) return false;
    }
    return true;
#endif
  }
  AVFAST_INLINE void store(float* to) const { __builtin_memcpy(to, &raw, sizeof raw); }
  // Loads the first `count` lanes only, for the end of a row; 0 <= count <= kLanes. The other lanes are 0.
  AVFAST_INLINE static Vec load_first(const float* from, int count) {
    if (count == kLanes) return load(from);
    Raw r{};
    for (int i = 0; i < count; ++i) r[i] = from[i];
    return r;
  }
  AVFAST_INLINE void store_first(float* to, int count) const {
    if (count == kLanes) return store(to);
    for (int i = 0; i < count; ++i) to[i] = raw[i];
  }
};

AVFAST_INLINE Vec operator+(Vec a, Vec b) { return a.raw + b.raw; }
AVFAST_INLINE Vec operator-(Vec a, Vec b) { return a.raw - b.raw; }
AVFAST_INLINE Vec operator*(Vec a, Vec b) { return a.raw * b.raw; }
AVFAST_INLINE Vec reciprocal(Vec a) { return Vec(1.0f).raw / a.raw; }

// The smaller and the larger value, and b where one of them is NaN, which is what the instructions do. They are used
// because GCC 12 makes a comparison and a blend of the ternary operator, and does not vectorise a loop of roots.
#if defined(__AVX512F__)
AVFAST_INLINE Vec multiply_add(Vec a, Vec b, Vec c) {
  return static_cast<Vec::Raw>(_mm512_fmadd_ps(a.raw, b.raw, c.raw));
}
AVFAST_INLINE Vec min(Vec a, Vec b) { return static_cast<Vec::Raw>(_mm512_min_ps(a.raw, b.raw)); }
AVFAST_INLINE Vec max(Vec a, Vec b) { return static_cast<Vec::Raw>(_mm512_max_ps(a.raw, b.raw)); }
AVFAST_INLINE Vec sqrt(Vec a) { return static_cast<Vec::Raw>(_mm512_sqrt_ps(a.raw)); }
#elif defined(__AVX2__)
AVFAST_INLINE Vec multiply_add(Vec a, Vec b, Vec c) {
  return static_cast<Vec::Raw>(_mm256_fmadd_ps(a.raw, b.raw, c.raw));
}
AVFAST_INLINE Vec min(Vec a, Vec b) { return static_cast<Vec::Raw>(_mm256_min_ps(a.raw, b.raw)); }
AVFAST_INLINE Vec max(Vec a, Vec b) { return static_cast<Vec::Raw>(_mm256_max_ps(a.raw, b.raw)); }
AVFAST_INLINE Vec sqrt(Vec a) { return static_cast<Vec::Raw>(_mm256_sqrt_ps(a.raw)); }
#elif defined(__SSE2__)
AVFAST_INLINE Vec multiply_add(Vec a, Vec b, Vec c) { return a * b + c; }
AVFAST_INLINE Vec min(Vec a, Vec b) { return static_cast<Vec::Raw>(_mm_min_ps(a.raw, b.raw)); }
AVFAST_INLINE Vec max(Vec a, Vec b) { return static_cast<Vec::Raw>(_mm_max_ps(a.raw, b.raw)); }
AVFAST_INLINE Vec sqrt(Vec a) { return static_cast<Vec::Raw>(_mm_sqrt_ps(a.raw)); }
#else
AVFAST_INLINE Vec multiply_add(Vec a, Vec b, Vec c) { return a * b + c; }
AVFAST_INLINE Vec min(Vec a, Vec b) { return a.raw < b.raw ? a.raw : b.raw; }
AVFAST_INLINE Vec max(Vec a, Vec b) { return a.raw > b.raw ? a.raw : b.raw; }
AVFAST_INLINE Vec sqrt(Vec a) {
  for (int i = 0; i < kLanes; ++i) a.raw[i] = __builtin_sqrtf(a.raw[i]);
  return a;
}
#endif

// Returns a where `above` is greater than `limit`, else 0.
AVFAST_INLINE Vec where_above(Vec above, Vec limit, Vec a) { return above.raw > limit.raw ? a.raw : Vec::Raw{}; }

// Returns a where the mask, the result of a comparison, is -1, and b where it is 0.
AVFAST_INLINE Vec where(Vec::Int mask, Vec a, Vec b) { return mask ? a.raw : b.raw; }

// Returns 1 where a equals b, else 0.
AVFAST_INLINE Vec equal(Vec a, Vec b) { return a.raw == b.raw ? Vec(1.0f).raw : Vec::Raw{}; }

// Returns the largest whole number that is not above a, for |a| < 2^31.
AVFAST_INLINE Vec::Int floor_int(Vec a) {
  const Vec::Int cut = __builtin_convertvector(a.raw, Vec::Int);
  // a comparison is -1 where it holds
  return cut + (__builtin_convertvector(cut, Vec::Raw) > a.raw);
}
AVFAST_INLINE Vec to_float(Vec::Int a) { return __builtin_convertvector(a, Vec::Raw); }

// Returns 2 to the power of n, -126 <= n <= 127, given n + Vec::kToLowBits; any number for NaN.
AVFAST_INLINE Vec power_of_two(Vec shifted) {
  const Vec::Int bits = (reinterpret_cast<Vec::Int>(shifted.raw) << 23) + (127 << 23);
  return reinterpret_cast<Vec::Raw>(bits);
}

// Returns lanes 1, 2, ... of a, then `last`.
AVFAST_INLINE Vec next_lanes(Vec a, float last) {
  Vec::Int order;
  for (int i = 0; i < kLanes; ++i) order[i] = i + 1;
  return __builtin_shuffle(a.raw, Vec(last).raw, order);
}

// Returns `first`, then lanes 0, 1, ... of a.
AVFAST_INLINE Vec previous_lanes(Vec a, float first) {
  Vec::Int order;
  for (int i = 0; i < kLanes; ++i) order[i] = i == 0 ? kLanes : i - 1;
  return __builtin_shuffle(a.raw, Vec(first).raw, order);
}

// ---- registers seen as quads, which are four lanes each ----
constexpr int kQuads = kLanes / 4;

// Returns, in every quad, its lane kLane four times.
template <int kLane>
AVFAST_INLINE Vec spread_in_quads(Vec a) {
  Vec::Int order;
  for (int i = 0; i < kLanes; ++i) order[i] = i / 4 * 4 + kLane;
  return __builtin_shuffle(a.raw, order);
}

// Transposes: lane i of quad k of a[j] becomes lane j of quad k of a[i].
AVFAST_INLINE void transpose_in_quads(Vec (&a)[4]) {
  Vec::Int low, high, first, last;
  for (int i = 0; i < kLanes; ++i) {
    const int from = i / 4 * 4 + i % 2 * kLanes;
    low[i] = from + i % 4 / 2;
    high[i] = from + i % 4 / 2 + 2;
    first[i] = i / 4 * 4 + i % 2 + i % 4 / 2 * kLanes;
    last[i] = first[i] + 2;
  }
  const Vec::Raw low01 = __builtin_shuffle(a[0].raw, a[1].raw, low);
  const Vec::Raw low23 = __builtin_shuffle(a[2].raw, a[3].raw, low);
  const Vec::Raw high01 = __builtin_shuffle(a[0].raw, a[1].raw, high);
  const Vec::Raw high23 = __builtin_shuffle(a[2].raw, a[3].raw, high);
  a[0] = __builtin_shuffle(low01, low23, first);
  a[1] = __builtin_shuffle(low01, low23, last);
  a[2] = __builtin_shuffle(high01, high23, first);
  a[3] = __builtin_shuffle(high01, high23, last);
}

// Transposes kQuads rows of four quads each: quad k of out[i] is quad i of row k.
AVFAST_INLINE void transpose_quads(const Vec (&rows)[kQuads][4 / kQuads], Vec (&out)[4]) {
#if defined(__AVX512F__)
  // quads of two registers: 0x44 the first two of each, 0xee the last two, 0x88 the even ones, 0xdd the odd ones
  const __m512 a = _mm512_shuffle_f32x4(rows[0][0].raw, rows[1][0].raw, 0x44);
  const __m512 b = _mm512_shuffle_f32x4(rows[2][0].raw, rows[3][0].raw, 0x44);
  const __m512 c = _mm512_shuffle_f32x4(rows[0][0].raw, rows[1][0].raw, 0xee);
  const __m512 d = _mm512_shuffle_f32x4(rows[2][0].raw, rows[3][0].raw, 0xee);
  out[0] = static_cast<Vec::Raw>(_mm512_shuffle_f32x4(a, b, 0x88));
  out[1] = static_cast<Vec::Raw>(_mm512_shuffle_f32x4(a, b, 0xdd));
  out[2] = static_cast<Vec::Raw>(_mm512_shuffle_f32x4(c, d, 0x88));
  out[3] = static_cast<Vec::Raw>(_mm512_shuffle_f32x4(c, d, 0xdd));
#elif defined(__AVX2__)
  for (int i = 0; i < 2; ++i) {
    out[2 * i] = static_cast<Vec::Raw>(_mm256_permute2f128_ps(rows[0][i].raw, rows[1][i].raw, 0x20));
    out[2 * i + 1] = static_cast<Vec::Raw>(_mm256_permute2f128_ps(rows[0][i].raw, rows[1][i].raw, 0x31));
  }
#else
  for (int i = 0; i < 4; ++i) out[i] = rows[0][i];
#endif
}

// Two registers as one, for long chains of operations: with a single chain the core would wait for each result.
struct Vec2 {
  using Scalar = float;
  static constexpr int kWidth = 2 * kLanes;
  static constexpr float kToLowBits = Vec::kToLowBits;
  Vec a, b;

  Vec2() = default;
  Vec2(Vec first, Vec second) : a(first), b(second) {}
  explicit Vec2(float x) : a(x), b(x) {}
  AVFAST_INLINE static Vec2 load_first(const float* from, int count) {
    if (count == kWidth) return {Vec::load(from), Vec::load(from + kLanes)};
    const int first = count < kLanes ? count : kLanes;
    return {Vec::load_first(from, first), Vec::load_first(from + first, count - first)};
  }
  AVFAST_INLINE void store_first(float* to, int count) const {
    const int first = count < kLanes ? count : kLanes;
    a.store_first(to, first);
    b.store_first(to + first, count - first);
  }
};
AVFAST_INLINE Vec2 operator+(Vec2 x, Vec2 y) { return {x.a + y.a, x.b + y.b}; }
AVFAST_INLINE Vec2 operator-(Vec2 x, Vec2 y) { return {x.a - y.a, x.b - y.b}; }
AVFAST_INLINE Vec2 operator*(Vec2 x, Vec2 y) { return {x.a * y.a, x.b * y.b}; }
AVFAST_INLINE Vec2 multiply_add(Vec2 x, Vec2 y, Vec2 z) {
  return {multiply_add(x.a, y.a, z.a), multiply_add(x.b, y.b, z.b)};
}
AVFAST_INLINE Vec2 reciprocal(Vec2 x) { return {reciprocal(x.a), reciprocal(x.b)}; }
AVFAST_INLINE Vec2 min(Vec2 x, Vec2 y) { return {min(x.a, y.a), min(x.b, y.b)}; }
AVFAST_INLINE Vec2 max(Vec2 x, Vec2 y) { return {max(x.a, y.a), max(x.b, y.b)}; }
AVFAST_INLINE Vec2 power_of_two(Vec2 x) { return {power_of_two(x.a), power_of_two(x.b)}; }

}  // namespace avfast::AVFAST_ISA
