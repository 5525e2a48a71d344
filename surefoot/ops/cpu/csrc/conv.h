// Causal depthwise convolution with SiLU over packed tokens; a request continues from its state and leaves it behind.
#pragma once
#include "common.h"

namespace sf {
namespace SF_ISA {

constexpr long MAX_TAPS = 8, CONV_CHANNELS = 256;

// Channels lie apart by `taps` values in weights and state: gathers value j of n channels, or scatters it back.
template <class T> static inline F gather(const T* p, long taps, long j, long n) {
  float out[LANES] = {};
  for (long c = 0; c < n; ++c) out[c] = to_float(p[c * taps + j]);
  return f_load(out);
}
template <class T> static inline void scatter(T* p, long taps, long j, long n, F x) {
  float in[LANES];
  f_store(in, x);
  for (long c = 0; c < n; ++c) from_float(p + c * taps + j, in[c]);
}

template <class T, class W> static void conv_channels(const Conv& v, long request, long c, long n) {
  const long taps = v.taps, begin = v.starts ? v.starts[request] : request, end = v.starts ? v.starts[request + 1] : request + 1;
  T* state = static_cast<T*>(v.state) + (v.slots[request] * v.C + c) * (taps - 1);
  F weight[MAX_TAPS], past[MAX_TAPS];
  for (long j = 0; j < taps; ++j) weight[j] = gather(static_cast<const W*>(v.w) + c * taps, taps, j, n);
  for (long j = 0; j + 1 < taps; ++j) past[j] = gather(state, taps - 1, j, n);
  const F bias = v.bias ? load_n(static_cast<const W*>(v.bias) + c, n) : f_zero();
  for (long t = begin; t < end; ++t) {
    const F now = load_n(static_cast<const T*>(v.x) + t * v.ldx + c, n);
    F sum = bias;
    for (long j = 0; j + 1 < taps; ++j) sum = f_fma(past[j], weight[j], sum);
    sum = f_fma(now, weight[taps - 1], sum);
    store_n(static_cast<T*>(v.out) + t * v.C + c, f_silu(sum), n);
    for (long j = 0; j + 2 < taps; ++j) past[j] = past[j + 1];
    if (taps > 1) past[taps - 2] = now;
  }
  for (long j = 0; j + 1 < taps; ++j) scatter(state, taps - 1, j, n, past[j]);
}

static void conv(const Conv& v) {
  const long blocks = ceil_div(v.C, CONV_CHANNELS), tokens = v.starts ? v.starts[v.N] : v.N;
  parallel(v.N * blocks, double(tokens * v.C), [&](long task) {
    const long begin = task % blocks * CONV_CHANNELS, end = min_l(v.C, begin + CONV_CHANNELS);
    with_type(v.dtype, [&](auto zero) {
      with_type(v.wtype, [&](auto weight) {
        for (long c = begin; c < end; c += LANES)
          conv_channels<decltype(zero), decltype(weight)>(v, task / blocks, c, min_l(LANES, end - c));
      });
    });
  });
}

}  // namespace SF_ISA
}  // namespace sf
