// Scalar types and small helpers that every translation unit shares. No std:: containers or algorithms here or in any
// header compiled per instruction set: the linker keeps one copy of an inline function, and it may be the AVX-512 one.
#pragma once
#include <stddef.h>
#include <stdint.h>
#include <string.h>

// NOTE: GCC keeps an array in registers only if the loops over it are unrolled early; it decides so with this alone.
#define SF_UNROLL _Pragma("GCC unroll 16")
#define SF_INLINE inline __attribute__((always_inline))
#define SF_INLINE_LAMBDA __attribute__((always_inline))

namespace sf {

struct bf16 { uint16_t bits; };
struct f16 { uint16_t bits; };

// The codes that Python passes for tensor dtypes.
enum Dtype : int { F32 = 0, BF16 = 1, F16 = 2 };

// Four values at a time, for what is left of a tile after its sums; compilers have this on every processor.
typedef float Float4 __attribute__((vector_size(16)));
typedef int32_t Int4 __attribute__((vector_size(16)));
#ifdef __clang__
#define SF_SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define SF_SHUFFLE(a, b, ...) __builtin_shuffle(a, b, (Int4){__VA_ARGS__})
#endif

static inline float bits_to_float(uint32_t u) { float f; memcpy(&f, &u, 4); return f; }
static inline uint32_t float_to_bits(float f) { uint32_t u; memcpy(&u, &f, 4); return u; }

static inline float to_float(float x) { return x; }
static inline float to_float(bf16 x) { return bits_to_float(uint32_t(x.bits) << 16); }
static inline float to_float(f16 x) {
  const uint32_t sign = uint32_t(x.bits & 0x8000) << 16, rest = uint32_t(x.bits & 0x7fff);
  if (rest >= 0x7c00) return bits_to_float(sign | 0x7f800000 | (rest & 0x3ff) << 13);
  // Shifted into place, every finite half (subnormals too) is 2^112 times too small.
  return bits_to_float(sign | float_to_bits(bits_to_float(rest << 13) * 5.192296858534828e33f));
}

static inline void from_float(float* p, float x) { *p = x; }
static inline void from_float(bf16* p, float x) {
  const uint32_t u = float_to_bits(x);
  p->bits = x != x ? uint16_t(u >> 16 | 0x40) : uint16_t((u + 0x7fff + (u >> 16 & 1)) >> 16);
}
static inline void from_float(f16* p, float x) {
  const uint32_t u = float_to_bits(x), sign = u >> 16 & 0x8000, a = u & 0x7fffffff;
  if (a > 0x7f800000) { p->bits = uint16_t(sign | 0x7e00); return; }
  if (a >= 0x477ff000) { p->bits = uint16_t(sign | 0x7c00); return; }
  if (a < 0x38800000) {  // subnormal half: the addition rounds to a multiple of 2^-24
    p->bits = uint16_t(sign | (float_to_bits(bits_to_float(a) + 0.5f) - 0x3f000000));
    return;
  }
  p->bits = uint16_t(sign | ((a - 0x38000000 + 0xfff + (a >> 13 & 1)) >> 13));
}

static inline float read_any(const void* p, int dtype, long i) {
  if (dtype == F32) return static_cast<const float*>(p)[i];
  if (dtype == BF16) return to_float(static_cast<const bf16*>(p)[i]);
  return to_float(static_cast<const f16*>(p)[i]);
}

static inline long min_l(long a, long b) { return a < b ? a : b; }
static inline long max_l(long a, long b) { return a > b ? a : b; }
static inline long ceil_div(long a, long b) { return (a + b - 1) / b; }

// Four rows of four 32-bit words in, the four columns out, each at `step` bytes from the one before.
static SF_INLINE void transpose4(const Int4 r[4], char* to, long step) {
  const Int4 ab_lo = SF_SHUFFLE(r[0], r[1], 0, 4, 1, 5), ab_hi = SF_SHUFFLE(r[0], r[1], 2, 6, 3, 7);
  const Int4 cd_lo = SF_SHUFFLE(r[2], r[3], 0, 4, 1, 5), cd_hi = SF_SHUFFLE(r[2], r[3], 2, 6, 3, 7);
  const Int4 columns[4] = {SF_SHUFFLE(ab_lo, cd_lo, 0, 1, 4, 5), SF_SHUFFLE(ab_lo, cd_lo, 2, 3, 6, 7),
                           SF_SHUFFLE(ab_hi, cd_hi, 0, 1, 4, 5), SF_SHUFFLE(ab_hi, cd_hi, 2, 3, 6, 7)};
  for (int i = 0; i < 4; ++i) memcpy(to + i * step, &columns[i], 16);
}

template <int N> struct Int { static constexpr int value = N; };  // a number as a type

}  // namespace sf
