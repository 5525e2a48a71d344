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
static inline F i_to_f(I x) { return f_map([&](int i) { return float(x.v[i]); }); }
static inline int32_t i_hsum(I x) {
  int32_t sum = 0;
  for (int i = 0; i < LANES; ++i) sum += x.v[i];
  return sum;
}
static inline Int4 i_hsum4(I a, I b, I c, I d) { return Int4{i_hsum(a), i_hsum(b), i_hsum(c), i_hsum(d)}; }
// Stores round-to-nearest-even integers of x, which the caller keeps in range.
template <class Q> static inline void store_rounded(Q* p, F x) {
  for (int i = 0; i < LANES; ++i) p[i] = Q(rintf(x.v[i]));
}

static inline void prefetch(const void*) {}

struct I16 { int16_t v[2 * LANES]; };
constexpr int A16_STEP = 2 * LANES;
typedef I16 W16;
static inline W16 w16_load(const int8_t* p) {
  W16 r;
  for (int i = 0; i < A16_STEP; ++i) r.v[i] = p[i];
  return r;
}
static inline I16 a16_load(const int16_t* p) {
  I16 r;
  memcpy(r.v, p, sizeof r.v);
  return r;
}
static inline I dot_a16(I acc, const W16& w, const I16& a) {
  for (int i = 0; i < LANES; ++i)
    acc.v[i] += int32_t(w.v[2 * i]) * a.v[2 * i] + int32_t(w.v[2 * i + 1]) * a.v[2 * i + 1];
  return acc;
}

typedef int16_t A8;
constexpr int A8_STEP = A16_STEP;
constexpr int A8_OFFSET = 0;
typedef W16 W8;
static inline W8 w8_load(const int8_t* p) { return w16_load(p); }
static inline I16 a8_load(const A8* p) { return a16_load(p); }
static inline I dot_a8(I acc, const W8& w, const I16& a) { return dot_a16(acc, w, a); }

// int4 weights, 64 a step: nibble j of each 16 bits goes to vector j, so vector j holds elements 4i + j.
constexpr int W4_STEP = 8 * LANES;
constexpr int W4_COLUMNS = 1, W4_ROWS = 2;
static inline void w4_load(const uint8_t* p, W16 w[4]) {
  for (int i = 0; i < A16_STEP; ++i)
    for (int j = 0; j < 4; ++j) w[j].v[i] = int16_t(p[2 * i + j / 2] >> (j % 2 * 4) & 15);
}
// Lane l of a step holds elements 8l ... 8l + 7: the two scales of groups of 32, each over four lanes.
template <class S> static inline F w4_scales_32(const S* p) {
  return f_map([&](int i) { return to_float(p[i / 4]); });
}

constexpr int ROWS = 2, ROWS_OF_4 = 2;

}  // namespace SF_ISA
}  // namespace sf
