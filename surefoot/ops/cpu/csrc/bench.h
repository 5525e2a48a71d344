// The machine's limits, measured by the same compiler and threads as the kernels: memory read and multiply-add peaks.
#pragma once
#include "common.h"

// To the compiler, x is used here and may be another one afterwards.
#if defined(SF_AVX512) || defined(SF_AVX2)
#define SF_OPAQUE(x) __asm__ volatile("" : "+x"(x))
#elif defined(SF_NEON)
#define SF_OPAQUE(x) __asm__ volatile("" : "+w"(x))
#else
#define SF_OPAQUE(x) __asm__ volatile("" : "+m"(x))
#endif

namespace sf {
namespace SF_ISA {

// Reads the memory once, on all threads. The sum is returned so that the reads happen.
static double read(const void* p, long bytes) {
  constexpr long PART = 1 << 20;
  const char* base = static_cast<const char*>(p);
  double total = 0;
  parallel(ceil_div(bytes, PART), 1e9, [&](long part) {
    const char* from = base + part * PART;
    const long n = min_l(PART, bytes - part * PART) / long(8 * sizeof(F));
    F sum[8];
    for (int i = 0; i < 8; ++i) sum[i] = f_zero();
    for (long k = 0; k < n; ++k, from += 8 * sizeof(F))
      for (int i = 0; i < 8; ++i) {
        prefetch(from + 4096 + i * sizeof(F));
        sum[i] = f_add(sum[i], f_load(reinterpret_cast<const float*>(from) + i * LANES));
      }
    for (int i = 1; i < 8; ++i) sum[0] = f_add(sum[0], sum[i]);
    // One of millions of parts may win the race: the value means nothing, it only has to be used.
    total = double(f_hsum(sum[0]));
  });
  return total;
}

constexpr int CHAINS = LANES == 16 ? 12 : 8;  // independent sums: enough to hide the latency, few enough for the registers

// Multiply-adds done by `steps` rounds of CHAINS register-only accumulators on each thread.
template <class Acc, class Step> static double spin(long steps, Acc zero, const Step& step) {
  parallel(num_threads(), 1e9, [&](long) {
    Acc acc[CHAINS];
    for (int i = 0; i < CHAINS; ++i) acc[i] = zero;
    for (long s = 0; s < steps; ++s)
      SF_UNROLL for (int i = 0; i < CHAINS; ++i) acc[i] = step(acc[i]);
    SF_UNROLL for (int i = 0; i < CHAINS; ++i) SF_OPAQUE(acc[i]);
  });
  return double(CHAINS) * double(steps) * num_threads();
}

static double peak(int what, long steps) {
  alignas(64) char ones[256];
  memset(ones, 1, sizeof ones);
#ifdef SF_DOT_BF16
  if (what == PEAK_BF16) {
    const bf16* p = reinterpret_cast<const bf16*>(ones);
    return BF16_STEP * spin(steps, f_zero(), [&](F a) { return dot_bf16(a, bf16_load(p), bf16_load(p + BF16_STEP)); });
  }
#endif
  const I words = i_load(reinterpret_cast<const int32_t*>(ones)), more = i_load(reinterpret_cast<const int32_t*>(ones) + LANES);
#ifdef SF_DOT8
  if (what == PEAK_INT8) return INT_LANES * spin(steps, i_zero(), [&](I x) { return dot8(x, words, more); });
#endif
  if (what == PEAK_INT8 || what == PEAK_INT16)
    return INT_LANES / 2 * spin(steps, i_zero(), [&](I x) {
      I w = words;  // anew each time, or the compiler would multiply once and only add
      SF_OPAQUE(w);
      return dot16(x, w, more);
    });
  const F w = f_load(reinterpret_cast<const float*>(ones));
  return LANES * spin(steps, f_zero(), [&](F x) { return f_fma(w, w, x); });
}

}  // namespace SF_ISA
}  // namespace sf
