// 128-bit vectors of 64-bit Arm, with the dot product instruction where the file is compiled with it.
#pragma once
#include <arm_neon.h>

#include "types.h"

namespace sf {
namespace SF_ISA {

typedef float32x4_t F;
typedef int32x4_t I;
constexpr int LANES = 4;

static inline F f_zero() { return vdupq_n_f32(0); }
static inline F f_set(float x) { return vdupq_n_f32(x); }
static inline F f_load(const float* p) { return vld1q_f32(p); }
static inline void f_store(float* p, F x) { vst1q_f32(p, x); }
static inline F f_add(F a, F b) { return vaddq_f32(a, b); }
static inline F f_sub(F a, F b) { return vsubq_f32(a, b); }
static inline F f_mul(F a, F b) { return vmulq_f32(a, b); }
static inline F f_div(F a, F b) { return vdivq_f32(a, b); }
static inline F f_fma(F a, F b, F c) { return vfmaq_f32(c, a, b); }
// NOTE: where an operand is NaN these return NaN; on x86 the second operand.
static inline F f_min(F a, F b) { return vminq_f32(a, b); }
static inline F f_max(F a, F b) { return vmaxq_f32(a, b); }
static inline F f_abs(F x) { return vabsq_f32(x); }
static inline F f_round(F x) { return vrndnq_f32(x); }
static inline F f_pow2(F n) {  // 2^n of integral n in [-126, 127]
  return vreinterpretq_f32_s32(vshlq_n_s32(vaddq_s32(vcvtnq_s32_f32(n), vdupq_n_s32(127)), 23));
}
static inline F f_scale(F x, F n) { return f_mul(x, f_pow2(n)); }  // x * 2^n
static inline F f_zero_below(F limit, F x, F y) {  // y, but 0 in lanes where x < limit
  return vbslq_f32(vcltq_f32(x, limit), f_zero(), y);
}
static inline float f_hsum(F x) { return vaddv_f32(vadd_f32(vget_low_f32(x), vget_high_f32(x))); }
static inline float f_hmax(F x) { return vmaxvq_f32(x); }
static inline Float4 f_hsum4(F a, F b, F c, F d) { return (Float4)vpaddq_f32(vpaddq_f32(a, b), vpaddq_f32(c, d)); }

static inline F load(const float* p) { return f_load(p); }
static inline F load(const bf16* p) { return vreinterpretq_f32_u32(vshll_n_u16(vld1_u16(&p->bits), 16)); }
static inline F load(const f16* p) { return vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(&p->bits))); }
static inline void store(float* p, F x) { f_store(p, x); }
static inline void store(bf16* p, F x) {
  const uint32x4_t u = vreinterpretq_u32_f32(x), odd = vandq_u32(vshrq_n_u32(u, 16), vdupq_n_u32(1));
  const uint32x4_t r = vaddq_u32(u, vaddq_u32(odd, vdupq_n_u32(0x7fff)));
  const uint32x4_t quiet = vorrq_u32(u, vdupq_n_u32(0x400000));
  vst1_u16(&p->bits, vshrn_n_u32(vbslq_u32(vceqq_f32(x, x), r, quiet), 16));
}
static inline void store(f16* p, F x) { vst1_u16(&p->bits, vreinterpret_u16_f16(vcvt_f16_f32(x))); }
template <class T> static inline void store4(T* y, Float4 v) { store(y, (F)v); }

static inline I i_zero() { return vdupq_n_s32(0); }
static inline I i_load(const int32_t* p) { return vld1q_s32(p); }
// LANES words of LANES rows as columns, `ld` words apart.
static SF_INLINE void transpose_words(const char* const* row, long offset, int32_t* to, long ld) {
  Int4 x[4];
  for (int i = 0; i < 4; ++i) memcpy(&x[i], row[i] + offset, 16);
  transpose4(x, reinterpret_cast<char*>(to), 4 * ld);
}
static inline F i_to_f(I x) { return vcvtq_f32_s32(x); }
// Stores round-to-nearest-even integers of x, which the caller keeps in range.
static inline void store_rounded(int16_t* p, F x) { vst1_s16(p, vmovn_s32(vcvtnq_s32_f32(x))); }
static inline void store_rounded(int8_t* p, F x) {
  const int16x4_t i = vmovn_s32(vcvtnq_s32_f32(x));
  const int8x8_t bytes = vmovn_s16(vcombine_s16(i, i));
  memcpy(p, &bytes, 4);
}

static SF_INLINE void prefetch(const void* p) { __builtin_prefetch(p); }

// Words: 32 bits a lane, of weights or, the same in all lanes, of activations.
static inline I i_set(int32_t x) { return vdupq_n_s32(x); }
static inline I i_repeat(const int32_t* p) { return vld1q_dup_s32(p); }

// 16-bit products: pairs of int8 or int4 weights out of words.
static inline int16x8_t halves(I x) { return vreinterpretq_s16_s32(x); }
static inline I w8_even(I x) { return vreinterpretq_s32_s16(vshrq_n_s16(vshlq_n_s16(halves(x), 8), 8)); }
static inline I w8_odd(I x) { return vreinterpretq_s32_s16(vshrq_n_s16(halves(x), 8)); }
template <int J> static inline I w4_pair(I x) {
  const uint16x8_t u = vreinterpretq_u16_s32(x), shifted = vshlq_u16(u, vdupq_n_s16(-4 * J));
  return vreinterpretq_s32_u16(vandq_u16(shifted, vdupq_n_u16(15)));
}
static inline I dot16(I acc, I w, I a) {
  const int32x4_t low = vmull_s16(vget_low_s16(halves(w)), vget_low_s16(halves(a)));
  return vaddq_s32(acc, vpaddq_s32(low, vmull_high_s16(halves(w), halves(a))));
}

constexpr int INT_LANES = 16;  // int8 products of a vector
#ifdef __ARM_FEATURE_DOTPROD
#define SF_DOT8 1
constexpr int W8_OFFSET = 0;
static inline I w8_side(I x) { return x; }
static inline I w4_low(I x) { return vreinterpretq_s32_u8(vandq_u8(vreinterpretq_u8_s32(x), vdupq_n_u8(15))); }
static inline I w4_high(I x) { return vreinterpretq_s32_u8(vshrq_n_u8(vreinterpretq_u8_s32(x), 4)); }
static inline I dot8(I acc, I w, I a) { return vdotq_s32(acc, vreinterpretq_s8_s32(w), vreinterpretq_s8_s32(a)); }
#endif
// Tokens of a tile of integer weights, and panels that it takes at once: 4 x 4 accumulators of 32 registers.
constexpr int int_rows(bool) { return 4; }
constexpr int int_panels(int) { return 1; }

constexpr int ROWS = 4, ROWS_OF_4 = 4;  // rows of a tile of the linear kernels: 4 x 4 accumulators of 32 registers

}  // namespace SF_ISA
}  // namespace sf
