// The machine's limits, measured by the same compiler and threads as the kernels: memory read and multiply-add peaks.
#pragma once
#include "common.h"

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

// Multiply-adds done by `steps` rounds of 12 independent register-only accumulators on each thread.
template <class Acc, class Step> static double spin(long steps, Acc zero, const Step& step) {
  parallel(num_threads(), 1e9, [&](long) {
    Acc acc[12];
    for (int i = 0; i < 12; ++i) acc[i] = zero;
    for (long s = 0; s < steps; ++s)
      for (int i = 0; i < 12; ++i) acc[i] = step(acc[i]);
    volatile char sink[sizeof(Acc)];
    for (int i = 0; i < 12; ++i) memcpy(const_cast<char*>(sink), &acc[i], sizeof(Acc));
    (void)sink;
  });
  return 12.0 * double(steps) * num_threads();
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
  if (what == PEAK_INT8) {
    const W8 w = w8_load(reinterpret_cast<const int8_t*>(ones));
    const auto a = a8_load(reinterpret_cast<const A8*>(ones));
    return A8_STEP * spin(steps, i_zero(), [&](I x) { return dot_a8(x, w, a); });
  }
  if (what == PEAK_INT16) {
    const W16 w = w16_load(reinterpret_cast<const int8_t*>(ones));
    const auto a = a16_load(reinterpret_cast<const int16_t*>(ones));
    return A16_STEP * spin(steps, i_zero(), [&](I x) { return dot_a16(x, w, a); });
  }
  const F w = f_load(reinterpret_cast<const float*>(ones));
  return LANES * spin(steps, f_zero(), [&](F x) { return f_fma(w, w, x); });
}

}  // namespace SF_ISA
}  // namespace sf
