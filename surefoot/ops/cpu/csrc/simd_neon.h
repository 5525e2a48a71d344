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
static inline float f_hsum(F x) { return vaddvq_f32(x); }
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
static inline F i_to_f(I x) { return vcvtq_f32_s32(x); }
static inline Int4 i_hsum4(I a, I b, I c, I d) { return (Int4)vpaddq_s32(vpaddq_s32(a, b), vpaddq_s32(c, d)); }
// Stores round-to-nearest-even integers of x, which the caller keeps in range.
static inline void store_rounded(int16_t* p, F x) { vst1_s16(p, vmovn_s32(vcvtnq_s32_f32(x))); }
static inline void store_rounded(int8_t* p, F x) {
  const int16x4_t i = vmovn_s32(vcvtnq_s32_f32(x));
  const int8x8_t bytes = vmovn_s16(vcombine_s16(i, i));
  memcpy(p, &bytes, 4);
}

static SF_INLINE void prefetch(const void* p) { __builtin_prefetch(p); }

// int8 weights times int16 activations, 8 products a step.
constexpr int A16_STEP = 8;
typedef int16x8_t W16;
static inline W16 w16_load(const int8_t* p) { return vmovl_s8(vld1_s8(p)); }
static inline int16x8_t a16_load(const int16_t* p) { return vld1q_s16(p); }
static inline I dot_a16(I acc, W16 w, int16x8_t a) {
  return vmlal_high_s16(vmlal_s16(acc, vget_low_s16(w), vget_low_s16(a)), w, a);
}

#ifdef __ARM_FEATURE_DOTPROD
typedef int8_t A8;
constexpr int A8_STEP = 16;
typedef int8x16_t W8;
static inline W8 w8_load(const int8_t* p) { return vld1q_s8(p); }
static inline int8x16_t a8_load(const A8* p) { return vld1q_s8(p); }
static inline I dot_a8(I acc, W8 w, int8x16_t a) { return vdotq_s32(acc, w, a); }
#define SF_DOT_INT8 1
constexpr int PANEL_ROWS = 8, PANEL_VECTORS = 3;
static inline W8 w8_packed(const char* p) { return vld1q_s8(reinterpret_cast<const int8_t*>(p)); }
static inline int8x16_t a8_repeat(const A8* p) {
  int32_t four;
  memcpy(&four, p, 4);
  return vreinterpretq_s8_s32(vdupq_n_s32(four));
}
static inline I i_set(int32_t x) { return vdupq_n_s32(x); }
#else
// int8 activations widened to int16: the same integers, hence the same sums.
typedef int16_t A8;
constexpr int A8_STEP = A16_STEP;
typedef W16 W8;
static inline W8 w8_load(const int8_t* p) { return w16_load(p); }
static inline int16x8_t a8_load(const A8* p) { return a16_load(p); }
static inline I dot_a8(I acc, W8 w, int16x8_t a) { return dot_a16(acc, w, a); }
#endif
constexpr int A8_OFFSET = 0;

// int4 weights, 32 a step: nibble j of each 16 bits goes to vector j, so vector j holds elements 4i + j.
constexpr int W4_STEP = 32;
constexpr int W4_COLUMNS = 1, W4_ROWS = 4;
static inline void w4_load(const uint8_t* p, W16 w[4]) {
  const uint16x8_t x = vreinterpretq_u16_u8(vld1q_u8(p)), mask = vdupq_n_u16(15);
  w[0] = vreinterpretq_s16_u16(vandq_u16(x, mask));
  w[1] = vreinterpretq_s16_u16(vandq_u16(vshrq_n_u16(x, 4), mask));
  w[2] = vreinterpretq_s16_u16(vandq_u16(vshrq_n_u16(x, 8), mask));
  w[3] = vreinterpretq_s16_u16(vshrq_n_u16(x, 12));
}
#ifdef SF_DOT_INT8
// The same as bytes, for int8 activations: low nibbles (elements 2i), high nibbles.
constexpr int W4A8_COLUMNS = 2, W4A8_ROWS = 4;
static inline void w4_bytes(const uint8_t* p, W8 w[2]) {
  const uint8x16_t x = vld1q_u8(p);
  w[0] = vreinterpretq_s8_u8(vandq_u8(x, vdupq_n_u8(15)));
  w[1] = vreinterpretq_s8_u8(vshrq_n_u8(x, 4));
}
#endif
// A step is one group of 32. (Which of its elements a lane sums up does not matter: all lanes have its scale.)
template <class S> static inline F w4_scales_32(const S* p) { return f_set(to_float(p[0])); }

constexpr int ROWS = 4, ROWS_OF_4 = 4;  // rows of a tile of the linear kernels: 4 x 4 accumulators of 32 registers

}  // namespace SF_ISA
}  // namespace sf
