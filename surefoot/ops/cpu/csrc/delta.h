// The gated delta rule, token by token on a slice of the state that stays in L1. One token and many go through the same
// code, so a prompt gives the same bits in any chunks. (The chunked matrix form needs more multiply-adds than this for
// head sizes of 128 and is no faster while the slice is in L1.)
#pragma once
#include <math.h>

#include "common.h"

namespace sf {
namespace SF_ISA {

constexpr int DELTA_VECTORS = 4;  // columns of the state taken together, in vectors: 4 sums hide the latency of an FMA

// x / sqrt(|x|^2 + 1e-6) * scale
template <class T> static void l2_normalise(const T* x, long n, float scale, float* y) {
  F sum = f_zero();
  for (long i = 0; i < n; i += LANES) {
    const F v = load_n(x + i, n - i);
    sum = f_fma(v, v, sum);
  }
  const F by = f_set(scale / sqrtf(f_hsum(sum) + 1e-6f));
  for (long i = 0; i < n; i += LANES) store_n(y + i, f_mul(load_n(x + i, n - i), by), n - i);
}

// One token on a slice s [Dk][W] of the state, W = DELTA_VECTORS * LANES columns. v, o: [W].
static inline void delta_token(float* s, const float* q, const float* k, const float* v, float g, float beta, long Dk, float* o) {
  constexpr int V = DELTA_VECTORS;
  const F decay = f_set(expf(g));
  F seen[V], delta[V], out[V];
  SF_UNROLL for (int j = 0; j < V; ++j) seen[j] = out[j] = f_zero();
  for (long i = 0; i < Dk; ++i) {
    const F key = f_set(k[i]);
    SF_UNROLL for (int j = 0; j < V; ++j) seen[j] = f_fma(key, f_load(s + (i * V + j) * LANES), seen[j]);
  }
  SF_UNROLL for (int j = 0; j < V; ++j)
    delta[j] = f_mul(f_set(beta), f_sub(f_load(v + j * LANES), f_mul(decay, seen[j])));
  for (long i = 0; i < Dk; ++i) {
    const F key = f_set(k[i]), query = f_set(q[i]);
    SF_UNROLL for (int j = 0; j < V; ++j) {
      float* cell = s + (i * V + j) * LANES;
      const F x = f_fma(key, delta[j], f_mul(f_load(cell), decay));
      f_store(cell, x);
      out[j] = f_fma(query, x, out[j]);
    }
  }
  SF_UNROLL for (int j = 0; j < V; ++j) f_store(o + j * LANES, out[j]);
}

template <class T> static void delta_slice(const Delta& d, const float* q, const float* k, long request, long head, long column) {
  constexpr long W = DELTA_VECTORS * LANES;
  const long width = min_l(W, d.Dv - column), heads_per_key = d.Hv / d.Hk;
  const long begin = d.starts ? d.starts[request] : request, end = d.starts ? d.starts[request + 1] : request + 1;
  float* state = d.state + (d.slots[request] * d.Hv + head) * d.Dk * d.Dv + column;
  float* s = static_cast<float*>(scratch(TASK, size_t(d.Dk * W) * 4));
  float v[W] = {}, o[W];
  for (long i = 0; i < d.Dk; ++i) {
    memcpy(s + i * W, state + i * d.Dv, size_t(width) * 4);
    memset(s + i * W + width, 0, size_t(W - width) * 4);
  }
  for (long t = begin; t < end; ++t) {
    const long key = (t * d.Hk + head / heads_per_key) * d.Dk, gate = t * d.Hv + head;
    const T* value = static_cast<const T*>(d.v) + t * d.ldv + head * d.Dv + column;
    for (long i = 0; i < width; i += LANES) f_store(v + i, load_n(value + i, width - i));
    delta_token(s, q + key, k + key, v, d.g[gate], d.beta[gate], d.Dk, o);
    T* out = static_cast<T*>(d.out) + (t * d.Hv + head) * d.Dv + column;
    for (long i = 0; i < width; i += LANES) store_n(out + i, f_load(o + i), width - i);
  }
  for (long i = 0; i < d.Dk; ++i) memcpy(state + i * d.Dv, s + i * W, size_t(width) * 4);
}

template <class T> static void delta_of(const Delta& d) {
  constexpr long W = DELTA_VECTORS * LANES;
  const long tokens = d.starts ? d.starts[d.N] : d.N, slices = ceil_div(d.Dv, W);
  float* q = static_cast<float*>(scratch(ACTIVATIONS, size_t(2 * tokens * d.Hk * d.Dk) * 4));
  float* k = q + tokens * d.Hk * d.Dk;
  const float scale = 1.0f / sqrtf(float(d.Dk));
  parallel(tokens, double(tokens * d.Hk * d.Dk), [&](long t) {
    for (long h = 0; h < d.Hk; ++h) {
      l2_normalise(static_cast<const T*>(d.q) + t * d.ldq + h * d.Dk, d.Dk, scale, q + (t * d.Hk + h) * d.Dk);
      l2_normalise(static_cast<const T*>(d.k) + t * d.ldk + h * d.Dk, d.Dk, 1.0f, k + (t * d.Hk + h) * d.Dk);
    }
  });
  parallel(d.N * d.Hv * slices, double(tokens * d.Hv * d.Dk * d.Dv), [&](long task) {
    delta_slice<T>(d, q, k, task / (d.Hv * slices), task / slices % d.Hv, task % slices * W);
  });
}

static void delta(const Delta& d) {
  with_type(d.dtype, [&](auto zero) { delta_of<decltype(zero)>(d); });
}

}  // namespace SF_ISA
}  // namespace sf
