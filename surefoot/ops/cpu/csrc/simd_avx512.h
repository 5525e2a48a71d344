// 512-bit vectors: AVX512 F, BW, DQ, VL, VNNI, and BF16 where the file is compiled with it.
#pragma once
#include <immintrin.h>

#include "types.h"

namespace sf {
namespace SF_ISA {

typedef __m512 F;   // 16 floats
typedef __m512i I;  // 16 int32
constexpr int LANES = 16;

static inline F f_zero() { return _mm512_setzero_ps(); }
static inline F f_set(float x) { return _mm512_set1_ps(x); }
static inline F f_load(const float* p) { return _mm512_loadu_ps(p); }
static inline void f_store(float* p, F x) { _mm512_storeu_ps(p, x); }
static inline F f_add(F a, F b) { return _mm512_add_ps(a, b); }
static inline F f_sub(F a, F b) { return _mm512_sub_ps(a, b); }
static inline F f_mul(F a, F b) { return _mm512_mul_ps(a, b); }
static inline F f_div(F a, F b) { return _mm512_div_ps(a, b); }
static inline F f_fma(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }
// NOTE: where an operand is NaN these return the second one.
static inline F f_min(F a, F b) { return _mm512_min_ps(a, b); }
static inline F f_max(F a, F b) { return _mm512_max_ps(a, b); }
static inline F f_abs(F x) { return _mm512_abs_ps(x); }
static inline F f_round(F x) { return _mm512_roundscale_ps(x, 8); }
static inline F f_scale(F x, F n) { return _mm512_scalef_ps(x, n); }  // x * 2^n
static inline F f_zero_below(F limit, F x, F y) {  // y, but 0 in lanes where x < limit
  return _mm512_mask_mov_ps(y, _mm512_cmp_ps_mask(x, limit, _CMP_LT_OQ), _mm512_setzero_ps());
}
static inline float f_hsum(F x) { return _mm512_reduce_add_ps(x); }
static inline float f_hmax(F x) { return _mm512_reduce_max_ps(x); }

static inline __m128 fold(__m512 x) {
  const __m256 y = _mm256_add_ps(_mm512_castps512_ps256(x), _mm512_extractf32x8_ps(x, 1));
  return _mm_add_ps(_mm256_castps256_ps128(y), _mm256_extractf128_ps(y, 1));
}
// Four sums at once: interleaving before adding halves the work of four separate reductions.
static inline Float4 f_hsum4(F a, F b, F c, F d) {
  const F ab = f_add(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
  const F cd = f_add(_mm512_unpacklo_ps(c, d), _mm512_unpackhi_ps(c, d));
  const F lo = _mm512_shuffle_ps(ab, cd, 0x44), hi = _mm512_shuffle_ps(ab, cd, 0xee);
  return fold(f_add(lo, hi));
}

static inline F load(const float* p) { return f_load(p); }
static inline F load(const bf16* p) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p)), 16));
}
static inline F load(const f16* p) { return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p)); }
static inline void store(float* p, F x) { f_store(p, x); }
static inline void store(bf16* p, F x) {
#ifdef __AVX512BF16__
  if (!_mm512_fpclass_ps_mask(x, 0x20)) {  // the instruction would turn subnormals into 0
    const __m256bh r = _mm512_cvtneps_pbh(x);
    memcpy(p, &r, sizeof r);
    return;
  }
#endif
  const __m512i u = _mm512_castps_si512(x);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(u, 16), _mm512_set1_epi32(1));
  __m512i r = _mm512_add_epi32(u, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
  r = _mm512_mask_or_epi32(r, _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q), u, _mm512_set1_epi32(0x400000));
  _mm256_storeu_si256((__m256i*)p, _mm512_cvtepi32_epi16(_mm512_srli_epi32(r, 16)));
}
static inline void store(f16* p, F x) { _mm256_storeu_si256((__m256i*)p, _mm512_cvtps_ph(x, 0)); }

static inline void store4(float* y, Float4 v) { _mm_storeu_ps(y, v); }
static inline void store4(bf16* y, Float4 v) {
  const __m128i u = _mm_castps_si128(v), odd = _mm_and_si128(_mm_srli_epi32(u, 16), _mm_set1_epi32(1));
  const __m128i r = _mm_add_epi32(u, _mm_add_epi32(odd, _mm_set1_epi32(0x7fff)));
  const __m128i quiet = _mm_or_si128(u, _mm_set1_epi32(0x400000)), nan = _mm_castps_si128(_mm_cmpunord_ps(v, v));
  const __m128i top = _mm_srli_epi32(_mm_blendv_epi8(r, quiet, nan), 16);
  _mm_storel_epi64((__m128i*)y, _mm_packus_epi32(top, top));
}
static inline void store4(f16* y, Float4 v) { _mm_storel_epi64((__m128i*)y, _mm_cvtps_ph(v, 0)); }

static inline I i_zero() { return _mm512_setzero_si512(); }
static inline I i_load(const int32_t* p) { return _mm512_loadu_si512(p); }
static inline void i_store(int32_t* p, I x) { _mm512_storeu_si512(p, x); }
// LANES words of LANES rows as columns, `ld` words apart.
static SF_INLINE void transpose_words(const char* const* row, long offset, int32_t* to, long ld) {
  I a[16], b[16];
  SF_UNROLL for (int i = 0; i < 16; ++i) a[i] = _mm512_loadu_si512(row[i] + offset);
  SF_UNROLL for (int i = 0; i < 16; i += 4) {  // within 128 bits: b[i + j] has word j of each four, of rows i ... i + 3
    const I x = _mm512_unpacklo_epi32(a[i], a[i + 1]), y = _mm512_unpackhi_epi32(a[i], a[i + 1]);
    const I z = _mm512_unpacklo_epi32(a[i + 2], a[i + 3]), u = _mm512_unpackhi_epi32(a[i + 2], a[i + 3]);
    b[i] = _mm512_unpacklo_epi64(x, z);
    b[i + 1] = _mm512_unpackhi_epi64(x, z);
    b[i + 2] = _mm512_unpacklo_epi64(y, u);
    b[i + 3] = _mm512_unpackhi_epi64(y, u);
  }
  SF_UNROLL for (int j = 0; j < 4; ++j) {
    const I x = _mm512_shuffle_i32x4(b[j], b[j + 4], 0x88), y = _mm512_shuffle_i32x4(b[j + 8], b[j + 12], 0x88);
    const I z = _mm512_shuffle_i32x4(b[j], b[j + 4], 0xdd), u = _mm512_shuffle_i32x4(b[j + 8], b[j + 12], 0xdd);
    i_store(to + j * ld, _mm512_shuffle_i32x4(x, y, 0x88));
    i_store(to + (j + 4) * ld, _mm512_shuffle_i32x4(z, u, 0x88));
    i_store(to + (j + 8) * ld, _mm512_shuffle_i32x4(x, y, 0xdd));
    i_store(to + (j + 12) * ld, _mm512_shuffle_i32x4(z, u, 0xdd));
  }
}
static inline F i_to_f(I x) { return _mm512_cvtepi32_ps(x); }
// Stores round-to-nearest-even integers of x, which the caller keeps in range.
static inline void store_rounded(int8_t* p, F x) { _mm_storeu_si128((__m128i*)p, _mm512_cvtepi32_epi8(_mm512_cvtps_epi32(x))); }
static inline void store_rounded(int16_t* p, F x) {
  _mm256_storeu_si256((__m256i*)p, _mm512_cvtepi32_epi16(_mm512_cvtps_epi32(x)));
}

// NOTE: as intrinsics these make GCC 12 copy every accumulator to memory and back; "+v" ties it to one register.
#define SF_DOT(instruction, acc, w, a) __asm__(instruction " %2, %1, %0" : "+v"(acc) : "v"(w), "v"(a))

// NOTE: always inline: GCC takes a function that only prefetches for one without effect and drops the calls.
static SF_INLINE void prefetch(const void* p) { _mm_prefetch((const char*)p, _MM_HINT_T0); }

// Words: 32 bits a lane, of weights or, the same in all lanes, of activations.
static inline I i_set(int32_t x) { return _mm512_set1_epi32(x); }
static inline I i_repeat(const int32_t* p) { return _mm512_set1_epi32(*p); }

// 16-bit products: pairs of int8 or int4 weights out of words.
static inline I w8_even(I x) { return _mm512_srai_epi16(_mm512_slli_epi16(x, 8), 8); }
static inline I w8_odd(I x) { return _mm512_srai_epi16(x, 8); }
template <int J> static inline I w4_pair(I x) { return _mm512_and_si512(_mm512_srli_epi16(x, 4 * J), _mm512_set1_epi16(15)); }
static inline I dot16(I acc, I w, I a) { SF_DOT("vpdpwssd", acc, w, a); return acc; }

// 8-bit products. NOTE: vpdpbusd wants one unsigned side: int8 weights get 128 added (their top bit flipped) and the
// caller subtracts 128 times the sum of the row's activations; int4 weights are stored plus 8. It adds into 32 bits
// without saturating.
#define SF_DOT8 1
constexpr int W8_OFFSET = 128, INT_LANES = 64;  // int8 products of a vector
static inline I w8_side(I x) { return _mm512_xor_si512(x, _mm512_set1_epi8(-128)); }
static inline I w4_low(I x) { return _mm512_and_si512(x, _mm512_set1_epi8(15)); }
static inline I w4_high(I x) { return _mm512_and_si512(_mm512_srli_epi16(x, 4), _mm512_set1_epi8(15)); }
static inline I dot8(I acc, I w, I a) { SF_DOT("vpdpbusd", acc, w, a); return acc; }
// Tokens of a tile of integer weights, at most, and panels that it takes at once: 12 x 2 accumulators of 32 registers, or
// 8 x 2 where their sums are scaled as they grow. Two share what a token's word costs; a single token reads one stream.
constexpr int int_rows(bool scaled) { return scaled ? 8 : 12; }
constexpr int int_panels(int rows) { return rows == 1 ? 1 : 2; }

#ifdef __AVX512BF16__
// bf16 times bf16, summed in fp32, 32 products a step.
#define SF_DOT_BF16 1
constexpr int BF16_STEP = 32;
static inline I bf16_load(const bf16* p) { return _mm512_loadu_si512(p); }
static inline F dot_bf16(F acc, I w, I a) { SF_DOT("vdpbf16ps", acc, w, a); return acc; }
// even[0], odd[0], even[1], ...: the first and the second 16 pairs.
static SF_INLINE void bf16_zip(I even, I odd, I& low, I& high) {
  const I first = _mm512_set_epi16(47, 15, 46, 14, 45, 13, 44, 12, 43, 11, 42, 10, 41, 9, 40, 8, 39, 7, 38, 6, 37, 5, 36, 4, 35,
                                   3, 34, 2, 33, 1, 32, 0);
  low = _mm512_permutex2var_epi16(even, first, odd);
  high = _mm512_permutex2var_epi16(even, _mm512_add_epi16(first, _mm512_set1_epi16(16)), odd);
}
// Two vectors, one behind the other. Rounds like `store`, but flushes subnormals, as does bf16_pairs.
static inline void bf16_row(F first, F second, bf16* to) {
  _mm512_storeu_si512(to, (__m512i)_mm512_cvtne2ps_pbh(second, first));
}
static inline void bf16_pairs(F even, F odd, bf16* to) {  // even[0], odd[0], even[1], ...
  const __m512i both = (__m512i)_mm512_cvtne2ps_pbh(odd, even);
  const __m512i each = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6, 21, 5,
                                        20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
  _mm512_storeu_si512(to, _mm512_permutexvar_epi16(each, both));
}
#endif

// Rows of a tile of the linear kernels: 8 x 2 or 6 x 4 accumulators of 32 registers.
constexpr int ROWS = 8, ROWS_OF_4 = 6;

}  // namespace SF_ISA
}  // namespace sf
