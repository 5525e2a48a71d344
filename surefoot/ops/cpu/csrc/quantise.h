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
  constexpr int CHAINS = 4;  // or the loop would wait for its sums
  F top[CHAINS], poison[CHAINS];
  SF_UNROLL for (int c = 0; c < CHAINS; ++c) top[c] = poison[c] = f_zero();
  const auto take = [&](F v, int c) SF_INLINE_LAMBDA {
    top[c] = f_max(top[c], f_abs(v));
    poison[c] = f_fma(v, f_zero(), poison[c]);
  };
  long i = 0;
  for (; i + CHAINS * LANES <= n; i += CHAINS * LANES)
    SF_UNROLL for (int c = 0; c < CHAINS; ++c) take(load(x + i + c * LANES), c);
  for (; i < n; i += LANES) take(load_n(x + i, n - i), 0);
  for (int c = 1; c < CHAINS; ++c) {
    top[0] = f_max(top[0], top[c]);
    poison[0] = f_add(poison[0], poison[c]);
  }
  return f_hmax(top[0]) + f_hsum(poison[0]);
}

// q = round(x * levels / max|x|), padded with zeros to a multiple of LANES; returns the scale max|x| / levels.
// A NaN or infinity makes the scale NaN, so that it reaches the result and cannot pass for a number.
template <class T, class Q> static inline float quantise(const T* x, long n, float levels, Q* q) {
  const float top = abs_max(x, n);
  // NOTE: for a tiny maximum levels / top is infinite; such a row is zero for every purpose.
  const bool some = top > 0, tiny = some && levels / top > 3.0e38f;
  if (!some || tiny) {
    memset(q, 0, size_t(round_up(n, LANES)) * sizeof(Q));
    return tiny ? 0.0f : top / levels;
  }
  const F factor = f_set(levels / top);
  long i = 0;
  for (; i + LANES <= n; i += LANES) store_rounded(q + i, f_mul(load(x + i), factor));
  if (i < n) store_rounded(q + i, f_mul(load_n(x + i, n - i), factor));
  return top / levels;
}

}  // namespace SF_ISA
}  // namespace sf
