// Causal depthwise convolution with SiLU over packed tokens; a request continues from its state and leaves it behind.
//
// In weights and state a channel's few values lie side by side. A task turns those of its channels into rows, the weights
// once for all requests, and walks over the tokens row by row; the last inputs stay in a ring of rows in fp32.
#pragma once
#include "common.h"

namespace sf {
namespace SF_ISA {

constexpr long MAX_TAPS = 8, CONV_CHANNELS = 128, CONV_AHEAD = 4;

// p [n][width] to fp32 rows[width][CONV_CHANNELS].
template <class T> static SF_INLINE void to_rows(const T* p, long width, long n, float (*rows)[CONV_CHANNELS]) {
  for (long c = 0; c < n; ++c)
    SF_UNROLL for (long j = 0; j < width; ++j) rows[j][c] = to_float(p[c * width + j]);
}

// The inputs that the next token will see: those of `tokens` rows x, before them what the state held.
template <class T> static SF_INLINE void leave_inputs(T* state, const T* x, long ldx, long tokens, long width, long n) {
  const T* last = x + (tokens - 1) * ldx;
  for (long c = 0; c < n; ++c) {
    SF_UNROLL for (long j = 0; j + 1 < width; ++j) {
      const long back = width - 1 - j;  // tokens before the last one
      state[c * width + j] = back < tokens ? last[c - back * ldx] : state[c * width + j + tokens];
    }
    state[c * width + width - 1] = last[c];
  }
}

template <class T> static inline T* conv_state(const Conv& v, long request, long channel) {
  return static_cast<T*>(v.state) + (v.slots[request] * v.C + channel) * (v.taps - 1);
}

// All requests on channels [first, first + n). TAPS: known when compiled, or 0.
template <int TAPS, class T, class W> static void conv_channels(const Conv& v, long first, long n) {
  const long taps = TAPS ? TAPS : v.taps, past = taps - 1;
  alignas(64) float weight[MAX_TAPS][CONV_CHANNELS], ring[MAX_TAPS][CONV_CHANNELS], bias[CONV_CHANNELS] = {};
  to_rows(static_cast<const W*>(v.w) + first * taps, taps, n, weight);
  if (v.bias) to_rows(static_cast<const W*>(v.bias) + first, 1, n, &bias);
  for (long request = 0; request < v.N; ++request) {
    const long begin = v.starts ? v.starts[request] : request, end = v.starts ? v.starts[request + 1] : request + 1;
    if (begin == end) continue;
    const T* x = static_cast<const T*>(v.x) + begin * v.ldx + first;
    T* state = conv_state<T>(v, request, first);
    if (request + 1 < v.N)
      for (long i = 0; i < n * past; i += 64 / long(sizeof(T))) prefetch(conv_state<T>(v, request + 1, first) + i);
    to_rows(state, past, n, ring);
    for (long t = 0; t < end - begin; ++t) {
      const T* now = x + t * v.ldx;
      T* out = static_cast<T*>(v.out) + (begin + t) * v.C + first;
      float* row[MAX_TAPS];
      for (long j = 0; j < taps; ++j) row[j] = ring[(t + j) % taps];
      for (long c = 0; c < n; c += LANES) {
        prefetch(now + CONV_AHEAD * v.ldx + c);
        prefetch(out + CONV_AHEAD * v.C + c);
        const F last = load_n(now + c, n - c);
        f_store(row[past] + c, last);
        F sum = f_load(bias + c);
        for (long j = 0; j < past; ++j) sum = f_fma(f_load(row[j] + c), f_load(weight[j] + c), sum);
        store_n(out + c, f_silu(f_fma(last, f_load(weight[past] + c), sum)), n - c);
      }
    }
    leave_inputs(state, x, v.ldx, end - begin, past, n);
  }
}

static void conv(const Conv& v) {
  const long tokens = v.starts ? v.starts[v.N] : v.N;
  parallel(ceil_div(v.C, CONV_CHANNELS), double((tokens + 2 * v.taps) * v.C), [&](long task) {
    const long first = task * CONV_CHANNELS, n = min_l(CONV_CHANNELS, v.C - first);
    with_type(v.dtype, [&](auto zero) {
      with_type(v.wtype, [&](auto weight) {
        typedef decltype(zero) T;
        typedef decltype(weight) W;
        if (v.taps == 4) conv_channels<4, T, W>(v, first, n);
        else conv_channels<0, T, W>(v, first, n);
      });
    });
  });
}

}  // namespace SF_ISA
}  // namespace sf
