// Plain C++ for any processor: short arrays that a compiler turns into whatever vectors it has.
#pragma once
#include <math.h>

#include "types.h"

namespace sf {
namespace SF_ISA {

constexpr int LANES = 8;
struct F { float v[LANES]; };
struct I { int32_t v[LANES]; };

template <class Op> static inline F f_map(const Op& op) {
  F r;
  for (int i = 0; i < LANES; ++i) r.v[i] = op(i);
  return r;
}
static inline F f_set(float x) { return f_map([&](int) { return x; }); }
static inline F f_zero() { return f_set(0.0f); }
static inline F f_load(const float* p) { return f_map([&](int i) { return p[i]; }); }
static inline void f_store(float* p, F x) { memcpy(p, x.v, sizeof x.v); }
static inline F f_add(F a, F b) { return f_map([&](int i) { return a.v[i] + b.v[i]; }); }
static inline F f_sub(F a, F b) { return f_map([&](int i) { return a.v[i] - b.v[i]; }); }
static inline F f_mul(F a, F b) { return f_map([&](int i) { return a.v[i] * b.v[i]; }); }
static inline F f_div(F a, F b) { return f_map([&](int i) { return a.v[i] / b.v[i]; }); }
static inline F f_fma(F a, F b, F c) { return f_map([&](int i) { return a.v[i] * b.v[i] + c.v[i]; }); }
// NOTE: where an operand is NaN these return the second one.
static inline F f_min(F a, F b) { return f_map([&](int i) { return a.v[i] < b.v[i] ? a.v[i] : b.v[i]; }); }
static inline F f_max(F a, F b) { return f_map([&](int i) { return a.v[i] > b.v[i] ? a.v[i] : b.v[i]; }); }
static inline F f_abs(F x) { return f_map([&](int i) { return fabsf(x.v[i]); }); }
static inline F f_round(F x) { return f_map([&](int i) { return rintf(x.v[i]); }); }
static inline F f_pow2(F n) {  // 2^n of integral n in [-126, 127]
  return f_map([&](int i) { return n.v[i] == n.v[i] ? bits_to_float(uint32_t(int32_t(n.v[i]) + 127) << 23) : n.v[i]; });
}
static inline F f_scale(F x, F n) { return f_mul(x, f_pow2(n)); }  // x * 2^n
static inline F f_zero_below(F limit, F x, F y) {  // y, but 0 in lanes where x < limit
  return f_map([&](int i) { return x.v[i] < limit.v[i] ? 0.0f : y.v[i]; });
}
static inline float f_hsum(F x) {
  return ((x.v[0] + x.v[4]) + (x.v[2] + x.v[6])) + ((x.v[1] + x.v[5]) + (x.v[3] + x.v[7]));
}
static inline float f_hmax(F x) {
  float m = x.v[0];
  for (int i = 1; i < LANES; ++i) m = m > x.v[i] ? m : x.v[i];
  return m;
}
static inline Float4 f_hsum4(F a, F b, F c, F d) { return Float4{f_hsum(a), f_hsum(b), f_hsum(c), f_hsum(d)}; }

template <class T> static inline F load(const T* p) { return f_map([&](int i) { return to_float(p[i]); }); }
template <class T> static inline void store(T* p, F x) {
  for (int i = 0; i < LANES; ++i) from_float(p + i, x.v[i]);
}

template <class T> static inline void store4(T* y, Float4 v) {
  for (int j = 0; j < 4; ++j) from_float(y + j, v[j]);
}

static inline I i_zero() { return I{}; }
static inline I i_load(const int32_t* p) {
  I r;
  memcpy(r.v, p, sizeof r.v);
  return r;
}
// LANES words of LANES rows as columns, `ld` words apart.
static inline void transpose_words(const char* const* row, long offset, int32_t* to, long ld) {
  for (int i = 0; i < LANES; ++i)
    for (int w = 0; w < LANES; ++w) memcpy(to + w * ld + i, row[i] + offset + 4 * w, 4);
}
static inline F i_to_f(I x) { return f_map([&](int i) { return float(x.v[i]); }); }
// Stores round-to-nearest-even integers of x, which the caller keeps in range.
template <class Q> static inline void store_rounded(Q* p, F x) {
  for (int i = 0; i < LANES; ++i) p[i] = Q(rintf(x.v[i]));
}

static inline void prefetch(const void*) {}

// Words: 32 bits a lane, of weights or, the same in all lanes, of activations.
template <class Op> static inline I i_map(const Op& op) {
  I r;
  for (int i = 0; i < LANES; ++i) r.v[i] = op(i);
  return r;
}
static inline I i_set(int32_t x) { return i_map([&](int) { return x; }); }
static inline I i_repeat(const int32_t* p) { return i_set(*p); }

// 16-bit products: pairs of int8 or int4 weights out of words.
static inline int32_t low16(int32_t x) { return int16_t(x); }
static inline int32_t high16(int32_t x) { return int16_t(uint32_t(x) >> 16); }
static inline int32_t pair16(int32_t low, int32_t high) { return int32_t(uint32_t(low & 0xffff) | uint32_t(high) << 16); }
static inline I w8_even(I x) { return i_map([&](int i) { return pair16(int8_t(x.v[i]), int8_t(x.v[i] >> 16)); }); }
static inline I w8_odd(I x) { return i_map([&](int i) { return pair16(int8_t(x.v[i] >> 8), int8_t(x.v[i] >> 24)); }); }
template <int J> static inline I w4_pair(I x) {
  return i_map([&](int i) { return x.v[i] >> (4 * J) & 0x000f000f; });
}
static inline I dot16(I acc, const I& w, const I& a) {
  return i_map([&](int i) { return acc.v[i] + low16(w.v[i]) * low16(a.v[i]) + high16(w.v[i]) * high16(a.v[i]); });
}

constexpr int INT_LANES = 4 * LANES;  // int8 products of a vector
// Tokens of a tile of integer weights, and panels that it takes at once.
constexpr int int_rows(bool) { return 2; }
constexpr int int_panels(int) { return 1; }

constexpr int ROWS = 2, ROWS_OF_4 = 2;

}  // namespace SF_ISA
}  // namespace sf
