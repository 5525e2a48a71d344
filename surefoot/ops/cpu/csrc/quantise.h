// Activations brought into the form that a linear kernel multiplies: floats widened, or quantised token by token, so
// that a token's result does not depend on the other tokens of the batch.
#pragma once
#include "common.h"

namespace sf {
namespace SF_ISA {

// 16-bit activations have one scale for this many elements: an outlier costs precision only in its block.
constexpr long BLOCK = 512;

static inline long round_up(long n, long step) { return ceil_div(n, step) * step; }

// max |x| over n elements, NaN if any is NaN or infinite.
template <class T> static inline float abs_max(const T* x, long n) {
  F top = f_zero(), poison = f_zero();
  for (long i = 0; i < n; i += LANES) {
    const F v = load_n(x + i, n - i);
    top = f_max(top, f_abs(v));
    poison = f_fma(v, f_zero(), poison);
  }
  return f_hmax(top) + f_hsum(poison);
}

// q = round(x * levels / max|x|), padded with zeros to a multiple of LANES; returns the scale max|x| / levels.
// A NaN or infinity makes the scale NaN, so that it reaches the result and cannot pass for a number.
template <class T, class Q> static inline float quantise(const T* x, long n, float levels, Q* q) {
  const float top = abs_max(x, n);
  const bool usable = top > 0;  // false for NaN
  const F factor = f_set(usable ? levels / top : 0.0f);
  // NOTE: for a tiny maximum levels / top is infinite; such a row is zero for every purpose.
  const bool tiny = usable && levels / top > 3.0e38f;
  for (long i = 0; i < n; i += LANES) {
    const F v = usable && !tiny ? f_mul(load_n(x + i, n - i), factor) : f_zero();
    store_rounded(q + i, v);
  }
  return tiny ? 0.0f : top / levels;
}

template <class Q> static inline int32_t sum_of(const Q* q, long n) {
  int32_t s = 0;
  for (long i = 0; i < n; ++i) s += q[i];
  return s;
}

// One row of int8 activations without the sum that an offset of the weights needs.
template <class T> static inline float quantise_padded(const T* x, long K, long padded, A8* row) {
  for (long i = round_up(K, LANES); i < padded; ++i) row[i] = 0;
  return quantise(x, K, 127.0f, row);
}

// One row of int8 activations; row: padded elements, scale: 1, sum: A8_OFFSET * sum of the row.
template <class T> static inline void quantise_a8(const T* x, long K, long padded, A8* row, float* scale, int32_t* sum) {
  *scale = quantise_padded(x, K, padded, row);
  *sum = A8_OFFSET * sum_of(row, K);
}

// One row of int16 activations with a scale per BLOCK.
template <class T> static inline void quantise_a16(const T* x, long K, long padded, int16_t* row, float* scales) {
  for (long i = round_up(K, LANES); i < padded; ++i) row[i] = 0;
  for (long b = 0; b * BLOCK < K; ++b) scales[b] = quantise(x + b * BLOCK, min_l(BLOCK, K - b * BLOCK), 32767.0f, row + b * BLOCK);
}

// One row as quantise_a8 gives it, widened to 16 bits where int4 weights are multiplied in 16 bits only; one scale for all.
template <class T> static inline void quantise_a8_wide(const T* x, long K, long padded, int16_t* row, float* scales) {
  for (long i = round_up(K, LANES); i < padded; ++i) row[i] = 0;
  scales[0] = quantise(x, K, 127.0f, row);
  for (long b = 1; b * BLOCK < K; ++b) scales[b] = scales[0];
}

// The order of int4 weights: within a step, elements PARTS * i + j go to vector j. sums: -8 x the sum of what each lane
// sees, because the weights are stored + 8.
template <int PARTS, class Q> static inline void reorder_w4(Q* row, long padded, int32_t* sums) {
  constexpr int each = W4_STEP / PARTS;
  for (long s = 0; s < padded; s += W4_STEP, row += W4_STEP, sums += LANES) {
    Q natural[W4_STEP];
    memcpy(natural, row, sizeof natural);
    for (int j = 0; j < PARTS; ++j)
      for (int i = 0; i < each; ++i) row[j * each + i] = natural[PARTS * i + j];
    for (int l = 0; l < LANES; ++l) sums[l] = -8 * sum_of(natural + 8 * l, 8);
  }
}

}  // namespace SF_ISA
}  // namespace sf
