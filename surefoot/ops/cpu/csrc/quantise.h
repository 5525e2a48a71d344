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

}  // namespace SF_ISA
}  // namespace sf
