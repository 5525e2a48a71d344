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
static inline void i_store(int32_t* p, I x) { _mm256_storeu_si256((__m256i*)p, x); }
// LANES words of LANES rows as columns, `ld` words apart.
static SF_INLINE void transpose_words(const char* const* row, long offset, int32_t* to, long ld) {
  SF_UNROLL for (int w = 0; w < 8; w += 4) {
    I x[4];
    SF_UNROLL for (int i = 0; i < 4; ++i) {
      const auto four = [&](int r) { return _mm_loadu_si128(reinterpret_cast<const __m128i*>(row[r] + offset + 4 * w)); };
      x[i] = _mm256_inserti128_si256(_mm256_castsi128_si256(four(i)), four(i + 4), 1);
    }
    const I a = _mm256_unpacklo_epi32(x[0], x[1]), b = _mm256_unpackhi_epi32(x[0], x[1]);
    const I c = _mm256_unpacklo_epi32(x[2], x[3]), d = _mm256_unpackhi_epi32(x[2], x[3]);
    i_store(to + w * ld, _mm256_unpacklo_epi64(a, c));
    i_store(to + (w + 1) * ld, _mm256_unpackhi_epi64(a, c));
    i_store(to + (w + 2) * ld, _mm256_unpacklo_epi64(b, d));
    i_store(to + (w + 3) * ld, _mm256_unpackhi_epi64(b, d));
  }
}
static inline F i_to_f(I x) { return _mm256_cvtepi32_ps(x); }
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

// Words: 32 bits a lane, of weights or, the same in all lanes, of activations.
static inline I i_set(int32_t x) { return _mm256_set1_epi32(x); }
static inline I i_repeat(const int32_t* p) { return _mm256_set1_epi32(*p); }

// 16-bit products: pairs of int8 or int4 weights out of words. NOTE: vpmaddwd cannot saturate for |w| <= 255, unlike
// vpmaddubsw, whose 16-bit sums overflow at 2 x 127 x 255; with the sums in 32 bits both cost the same.
static inline I w8_even(I x) { return _mm256_srai_epi16(_mm256_slli_epi16(x, 8), 8); }
static inline I w8_odd(I x) { return _mm256_srai_epi16(x, 8); }
template <int J> static inline I w4_pair(I x) { return _mm256_and_si256(_mm256_srli_epi16(x, 4 * J), _mm256_set1_epi16(15)); }
static inline I dot16(I acc, I w, I a) { return _mm256_add_epi32(acc, _mm256_madd_epi16(w, a)); }

// 8-bit products of int4 weights: bytes 0 ... 15.
static inline I w4_low(I x) { return _mm256_and_si256(x, _mm256_set1_epi8(15)); }
static inline I w4_high(I x) { return _mm256_and_si256(_mm256_srli_epi16(x, 4), _mm256_set1_epi8(15)); }
constexpr int INT_LANES = 32;  // int8 products of a vector
#ifdef __AVXVNNI__
// int8 times int8 by vpdpbusd, see simd_avx512.h.
#define SF_DOT8 1
constexpr int W8_OFFSET = 128;
static inline I w8_side(I x) { return _mm256_xor_si256(x, _mm256_set1_epi8(-128)); }
static inline I dot8(I acc, I w, I a) {  // NOTE: not an intrinsic, see SF_DOT in simd_avx512.h
  __asm__("%{vex%} vpdpbusd %2, %1, %0" : "+x"(acc) : "x"(w), "x"(a));
  return acc;
}
#else
// vpmaddubsw for int4, whose sums of two are at most 2 x 15 x 127: eight fit in 16 bits before they are widened.
#define SF_SHORT_SUMS 1
static inline I short_dot(I part, I w, I a) { return _mm256_add_epi16(part, _mm256_maddubs_epi16(w, a)); }
static inline I short_fold(I acc, I part) { return dot16(acc, part, _mm256_set1_epi16(1)); }
#endif
// Tokens of a tile of integer weights, and panels that it takes at once.
constexpr int int_rows(bool) { return 4; }
constexpr int int_panels(int) { return 1; }

constexpr int ROWS = 3, ROWS_OF_4 = 3;  // rows of a tile of the linear kernels: 3 x 4 accumulators of 16 registers

}  // namespace SF_ISA
}  // namespace sf
