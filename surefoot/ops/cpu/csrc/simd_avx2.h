// 256-bit vectors: AVX2, FMA, F16C, and AVX-VNNI where the file is compiled with it.
#pragma once
#include <immintrin.h>

#include "types.h"

namespace sf {
namespace SF_ISA {

typedef __m256 F;   // 8 floats
typedef __m256i I;  // 8 int32
constexpr int LANES = 8;

static inline F f_zero() { return _mm256_setzero_ps(); }
static inline F f_set(float x) { return _mm256_set1_ps(x); }
static inline F f_load(const float* p) { return _mm256_loadu_ps(p); }
static inline void f_store(float* p, F x) { _mm256_storeu_ps(p, x); }
static inline F f_add(F a, F b) { return _mm256_add_ps(a, b); }
static inline F f_sub(F a, F b) { return _mm256_sub_ps(a, b); }
static inline F f_mul(F a, F b) { return _mm256_mul_ps(a, b); }
static inline F f_div(F a, F b) { return _mm256_div_ps(a, b); }
static inline F f_fma(F a, F b, F c) { return _mm256_fmadd_ps(a, b, c); }
// NOTE: where an operand is NaN these return the second one.
static inline F f_min(F a, F b) { return _mm256_min_ps(a, b); }
static inline F f_max(F a, F b) { return _mm256_max_ps(a, b); }
static inline F f_abs(F x) { return _mm256_andnot_ps(_mm256_set1_ps(-0.0f), x); }
static inline F f_round(F x) { return _mm256_round_ps(x, 8); }
static inline F f_pow2(F n) {  // 2^n of integral n in [-126, 127]
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127)), 23));
}
static inline F f_scale(F x, F n) { return f_mul(x, f_pow2(n)); }  // x * 2^n
static inline F f_zero_below(F limit, F x, F y) {  // y, but 0 in lanes where x < limit
  return _mm256_andnot_ps(_mm256_cmp_ps(x, limit, _CMP_LT_OQ), y);
}
static inline __m128 fold(__m256 x) { return _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1)); }
static inline float f_hsum(F x) {
  __m128 y = fold(x);
  y = _mm_add_ps(y, _mm_movehl_ps(y, y));
  return _mm_cvtss_f32(_mm_add_ss(y, _mm_shuffle_ps(y, y, 1)));
}
static inline float f_hmax(F x) {
  __m128 y = _mm_max_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
  y = _mm_max_ps(y, _mm_movehl_ps(y, y));
  return _mm_cvtss_f32(_mm_max_ss(y, _mm_shuffle_ps(y, y, 1)));
}
// Four sums at once: interleaving before adding halves the work of four separate reductions.
static inline Float4 f_hsum4(F a, F b, F c, F d) {
  const F ab = f_add(_mm256_unpacklo_ps(a, b), _mm256_unpackhi_ps(a, b));
  const F cd = f_add(_mm256_unpacklo_ps(c, d), _mm256_unpackhi_ps(c, d));
  const F lo = _mm256_shuffle_ps(ab, cd, 0x44), hi = _mm256_shuffle_ps(ab, cd, 0xee);
  return fold(f_add(lo, hi));
}

static inline F load(const float* p) { return f_load(p); }
static inline F load(const bf16* p) {
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p)), 16));
}
static inline F load(const f16* p) { return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p)); }
static inline __m128i narrow16(__m256i x) {  // the low halves of eight 32-bit lanes that fit in 16 unsigned bits
  return _mm_packus_epi32(_mm256_castsi256_si128(x), _mm256_extracti128_si256(x, 1));
}
static inline void store(float* p, F x) { f_store(p, x); }
static inline void store(bf16* p, F x) {
  const __m256i u = _mm256_castps_si256(x);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(u, 16), _mm256_set1_epi32(1));
  const __m256i r = _mm256_add_epi32(u, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
  const __m256i quiet = _mm256_or_si256(u, _mm256_set1_epi32(0x400000));
  const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(x, x, _CMP_UNORD_Q));
  _mm_storeu_si128((__m128i*)p, narrow16(_mm256_srli_epi32(_mm256_blendv_epi8(r, quiet, nan), 16)));
}
static inline void store(f16* p, F x) { _mm_storeu_si128((__m128i*)p, _mm256_cvtps_ph(x, 0)); }

static inline void store4(float* y, Float4 v) { _mm_storeu_ps(y, v); }
static inline void store4(bf16* y, Float4 v) {
  const __m128i u = _mm_castps_si128(v), odd = _mm_and_si128(_mm_srli_epi32(u, 16), _mm_set1_epi32(1));
  const __m128i r = _mm_add_epi32(u, _mm_add_epi32(odd, _mm_set1_epi32(0x7fff)));
  const __m128i quiet = _mm_or_si128(u, _mm_set1_epi32(0x400000)), nan = _mm_castps_si128(_mm_cmpunord_ps(v, v));
  const __m128i top = _mm_srli_epi32(_mm_blendv_epi8(r, quiet, nan), 16);
  _mm_storel_epi64((__m128i*)y, _mm_packus_epi32(top, top));
}
static inline void store4(f16* y, Float4 v) { _mm_storel_epi64((__m128i*)y, _mm_cvtps_ph(v, 0)); }

static inline I i_zero() { return _mm256_setzero_si256(); }
static inline I i_load(const int32_t* p) { return _mm256_loadu_si256((const __m256i*)p); }
static inline F i_to_f(I x) { return _mm256_cvtepi32_ps(x); }
static inline Int4 i_hsum4(I a, I b, I c, I d) {
  const I s = _mm256_hadd_epi32(_mm256_hadd_epi32(a, b), _mm256_hadd_epi32(c, d));
  return (Int4)_mm_add_epi32(_mm256_castsi256_si128(s), _mm256_extracti128_si256(s, 1));
}
// Stores round-to-nearest-even integers of x, which the caller keeps in range.
static inline __m128i rounded16(F x) {
  const __m256i i = _mm256_cvtps_epi32(x);
  return _mm_packs_epi32(_mm256_castsi256_si128(i), _mm256_extracti128_si256(i, 1));
}
static inline void store_rounded(int8_t* p, F x) {
  const __m128i i = rounded16(x);
  _mm_storel_epi64((__m128i*)p, _mm_packs_epi16(i, i));
}
static inline void store_rounded(int16_t* p, F x) { _mm_storeu_si128((__m128i*)p, rounded16(x)); }

// NOTE: always inline: GCC takes a function that only prefetches for one without effect and drops the calls.
static SF_INLINE void prefetch(const void* p) { _mm_prefetch((const char*)p, _MM_HINT_T0); }

// int8 weights times int16 activations, 16 products a step. NOTE: vpmaddwd cannot saturate for |w| <= 128, unlike
// vpmaddubsw, whose 16-bit sums overflow at 2 x 127 x 255; with the sums in 32 bits both cost the same.
constexpr int A16_STEP = 16;
typedef __m256i W16;
static inline W16 w16_load(const int8_t* p) { return _mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i*)p)); }
static inline I a16_load(const int16_t* p) { return _mm256_loadu_si256((const __m256i*)p); }
static inline I dot_a16(I acc, W16 w, I a) { return _mm256_add_epi32(acc, _mm256_madd_epi16(w, a)); }

#ifdef __AVXVNNI__
// int8 times int8 by vpdpbusd, see simd_avx512.h.
typedef int8_t A8;
constexpr int A8_STEP = 32;
constexpr int A8_OFFSET = 128;
typedef __m256i W8;
static inline W8 w8_load(const int8_t* p) {
  return _mm256_xor_si256(_mm256_loadu_si256((const __m256i*)p), _mm256_set1_epi8(-128));
}
static inline I a8_load(const A8* p) { return _mm256_loadu_si256((const __m256i*)p); }
static inline I dot_a8(I acc, W8 w, I a) {  // NOTE: not an intrinsic, see SF_DOT in simd_avx512.h
  __asm__("%{vex%} vpdpbusd %2, %1, %0" : "+x"(acc) : "x"(w), "x"(a));
  return acc;
}
// Panels: 128 is added when they are packed.
#define SF_DOT_INT8 1
constexpr int PANEL_ROWS = 4, PANEL_VECTORS = 3;
static inline W8 w8_packed(const char* p) { return _mm256_loadu_si256((const __m256i*)p); }
static inline I a8_repeat(const A8* p) {
  int32_t four;
  memcpy(&four, p, 4);
  return _mm256_set1_epi32(four);
}
static inline I i_set(int32_t x) { return _mm256_set1_epi32(x); }
#else
// int8 activations widened to int16: the same integers, hence the same sums.
typedef int16_t A8;
constexpr int A8_STEP = A16_STEP;
constexpr int A8_OFFSET = 0;
typedef W16 W8;
static inline W8 w8_load(const int8_t* p) { return w16_load(p); }
static inline I a8_load(const A8* p) { return a16_load(p); }
static inline I dot_a8(I acc, W8 w, I a) { return dot_a16(acc, w, a); }
#endif

// int4 weights, 64 a step: nibble j of each 16 bits goes to vector j, so vector j holds elements 4i + j.
constexpr int W4_STEP = 64;
constexpr int W4_COLUMNS = 1, W4_ROWS = 3;
static inline void w4_load(const uint8_t* p, W16 w[4]) {
  const __m256i x = _mm256_loadu_si256((const __m256i*)p), mask = _mm256_set1_epi16(15);
  w[0] = _mm256_and_si256(x, mask);
  w[1] = _mm256_and_si256(_mm256_srli_epi16(x, 4), mask);
  w[2] = _mm256_and_si256(_mm256_srli_epi16(x, 8), mask);
  w[3] = _mm256_srli_epi16(x, 12);
}
#ifdef SF_DOT_INT8
// The same as bytes, for int8 activations: low nibbles (elements 2i), high nibbles.
constexpr int W4A8_COLUMNS = 1, W4A8_ROWS = 4;
static inline void w4_bytes(const uint8_t* p, W8 w[2]) {
  const __m256i x = _mm256_loadu_si256((const __m256i*)p), mask = _mm256_set1_epi8(15);
  w[0] = _mm256_and_si256(x, mask);
  w[1] = _mm256_and_si256(_mm256_srli_epi16(x, 4), mask);
}
#endif
// Lane l of a step holds elements 8l ... 8l + 7: the two scales of groups of 32, each over four lanes.
template <class S> static inline F w4_scales_32(const S* p) {
  return _mm256_set_m128(_mm_set1_ps(to_float(p[1])), _mm_set1_ps(to_float(p[0])));
}

constexpr int ROWS = 3, ROWS_OF_4 = 3;  // rows of a tile of the linear kernels: 3 x 4 accumulators of 16 registers

}  // namespace SF_ISA
}  // namespace sf
