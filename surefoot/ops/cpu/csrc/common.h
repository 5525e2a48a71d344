// What every kernel file needs: the vectors of this instruction set, parallel loops, partial vectors, exp.
#pragma once
#include "kernels.h"
#include "threads.h"

#if defined(SF_AVX512)
#include "simd_avx512.h"
#elif defined(SF_AVX2)
#include "simd_avx2.h"
#elif defined(SF_NEON)
#include "simd_neon.h"
#else
#include "simd_portable.h"
#endif

namespace sf {
namespace SF_ISA {

// for (i in 0 ... n - 1) body(i), on several threads if `work` (elements touched, roughly) is worth waking them for.
template <class Body> static void parallel(long n, double work, const Body& body) {
  if (work < 32768) {
    for (long i = 0; i < n; ++i) body(i);
  } else {
    run_tasks(n, [](long i, void* b) { (*static_cast<const Body*>(b))(i); }, const_cast<Body*>(&body));
  }
}

// Vectors of fewer than LANES elements: absent ones read as zero and are not written.
template <class T> static inline F load_n(const T* p, long n) {
  if (n >= LANES) return load(p);
  T buffer[LANES] = {};
  memcpy(buffer, p, size_t(n) * sizeof(T));
  return load(buffer);
}
template <class T> static inline void store_n(T* p, F x, long n) {
  if (n >= LANES) return store(p, x);
  T buffer[LANES];
  store(buffer, x);
  memcpy(p, buffer, size_t(n) * sizeof(T));
}

// 2^r for |r| <= 1/2.
static inline F f_exp2_near_zero(F r) {
  F p = f_set(1.5353362e-4f);
  p = f_fma(p, r, f_set(1.3398874e-3f));
  p = f_fma(p, r, f_set(9.6184373e-3f));
  p = f_fma(p, r, f_set(5.5503324e-2f));
  p = f_fma(p, r, f_set(2.4022648e-1f));
  p = f_fma(p, r, f_set(6.9314720e-1f));
  return f_fma(p, r, f_set(1.0f));
}
// 2^x for x <= 0 to about 2 ulp; 0 below -126, NaN stays NaN.
static inline F f_exp2(F x) {
  const F lowest = f_set(-126.0f), c = f_max(lowest, x), n = f_round(c);
  return f_zero_below(lowest, x, f_scale(f_exp2_near_zero(f_sub(c, n)), n));
}
// e^x to about 2 ulp; 0 below -87.3, NaN stays NaN.
static inline F f_exp(F x) {
  const F lowest = f_set(-87.3f), log2_e = f_set(1.44269502f), log2_e_rest = f_set(1.92596300e-8f);
  const F c = f_max(lowest, f_min(f_set(88.3f), x)), n = f_round(f_mul(c, log2_e));
  const F r = f_fma(c, log2_e_rest, f_fma(c, log2_e, f_sub(f_zero(), n)));
  return f_zero_below(lowest, x, f_scale(f_exp2_near_zero(r), n));
}
static inline F f_sigmoid(F x) { return f_div(f_set(1.0f), f_add(f_set(1.0f), f_exp(f_sub(f_zero(), x)))); }
static inline F f_silu(F x) { return f_div(x, f_add(f_set(1.0f), f_exp(f_sub(f_zero(), x)))); }

// Calls body with a value of the C++ type that a dtype code stands for.
template <class Body> static inline void with_type(int dtype, const Body& body) {
  if (dtype == F32) body(float());
  else if (dtype == BF16) body(bf16());
  else body(f16());
}

}  // namespace SF_ISA
}  // namespace sf
