// The gated delta rule, token by token. One token and many do the same arithmetic in the same order, so a prompt gives the
// same bits in any chunks and a decode step those of a prefill. (The chunked matrix form saves at most a quarter of the
// multiply-adds for head sizes of 128, and its blocks would have to survive the end of a chunk.)
//
// A task takes a slice of the state: all rows, as many columns as stay in registers and L1. A sweep over it applies one
// token and multiplies by the next token's key on the way, so every token reads and writes the slice once.
#pragma once
#include <math.h>

#include "common.h"

namespace sf {
namespace SF_ISA {

constexpr int DELTA_VECTORS = 4;  // columns of the state taken together, in vectors: 4 sums hide the latency of an FMA
constexpr long DELTA_COLUMNS = DELTA_VECTORS * LANES;

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

// Columns of a head's state: rows `ld` apart.
struct Slice {
  float* p;
  long ld;
  float* row(long i) const { return p + i * ld; }
};

// Memory to ask for in advance: half a row of a slice at a time, so that the two passes of a decode step over its slices
// ask for as much as they read.
struct Ahead {
  const char* p;
  SF_INLINE void row() {
    SF_UNROLL for (int b = 0; b < DELTA_COLUMNS * 2; b += 64) prefetch(p + b);
    p += DELTA_COLUMNS * 2;
  }
};

// seen = S^T k
static inline void delta_seen(Slice s, const float* k, long Dk, F* seen, Ahead& ahead) {
  constexpr int V = DELTA_VECTORS;
  F sum[V];
  SF_UNROLL for (int j = 0; j < V; ++j) sum[j] = f_zero();
  for (long i = 0; i < Dk; ++i) {
    ahead.row();
    const F key = f_set(k[i]);
    SF_UNROLL for (int j = 0; j < V; ++j) sum[j] = f_fma(key, f_load(s.row(i) + j * LANES), sum[j]);
  }
  SF_UNROLL for (int j = 0; j < V; ++j) seen[j] = sum[j];
}

// One token: `to` = decay S + k (beta (v - decay seen))^T, o = to^T q; unless it is the last one, seen = to^T (its k).
template <bool LAST>
static inline void delta_token(Slice s, Slice to, const float* q, const float* k, const float* next, const float* v, float g,
                               float beta, long Dk, F* seen, float* o, Ahead& ahead) {
  constexpr int V = DELTA_VECTORS;
  const F decay = f_set(expf(g));
  F delta[V], out[V], then[V];
  SF_UNROLL for (int j = 0; j < V; ++j) {
    delta[j] = f_mul(f_set(beta), f_sub(f_load(v + j * LANES), f_mul(decay, seen[j])));
    out[j] = then[j] = f_zero();
  }
  for (long i = 0; i < Dk; ++i) {
    if (LAST) ahead.row();
    const F key = f_set(k[i]), query = f_set(q[i]), next_key = LAST ? f_zero() : f_set(next[i]);
    SF_UNROLL for (int j = 0; j < V; ++j) {
      const F x = f_fma(key, delta[j], f_mul(f_load(s.row(i) + j * LANES), decay));
      f_store(to.row(i) + j * LANES, x);
      out[j] = f_fma(query, x, out[j]);
      if (!LAST) then[j] = f_fma(next_key, x, then[j]);
    }
  }
  SF_UNROLL for (int j = 0; j < V; ++j) {
    f_store(o + j * LANES, out[j]);
    if (!LAST) seen[j] = then[j];
  }
}

// Normalised q and k of consecutive tokens: [tokens][Dk] each.
struct QK {
  const float *q, *k;
};

// Tokens [begin, end) of one head on the slice of its state that starts at `column`.
template <class T>
static void delta_slice(const Delta& d, QK qk, float* state, long head, long column, long begin, long end, Ahead& ahead) {
  constexpr long W = DELTA_COLUMNS;
  const long width = min_l(W, d.Dv - column);
  const Slice work{static_cast<float*>(scratch(TASK, size_t(d.Dk * W) * 4)), W};
  const Slice home = width == W ? Slice{state + column, d.Dv} : work;
  F seen[DELTA_VECTORS];
  float v[W] = {}, o[W];
  if (width < W) {
    memset(work.p, 0, size_t(d.Dk * W) * 4);
    for (long i = 0; i < d.Dk; ++i) memcpy(work.row(i), state + i * d.Dv + column, size_t(width) * 4);
  }
  delta_seen(home, qk.k, d.Dk, seen, ahead);
  Slice from = home;
  for (long t = begin; t < end; ++t) {
    const float *q = qk.q + (t - begin) * d.Dk, *k = qk.k + (t - begin) * d.Dk;
    const float g = d.g[t * d.Hv + head], beta = d.beta[t * d.Hv + head];
    const T* value = static_cast<const T*>(d.v) + t * d.ldv + head * d.Dv + column;
    for (long i = 0; i < width; i += LANES) f_store(v + i, load_n(value + i, width - i));
    if (t + 1 < end) delta_token<false>(from, work, q, k, k + d.Dk, v, g, beta, d.Dk, seen, o, ahead);
    else delta_token<true>(from, home, q, k, nullptr, v, g, beta, d.Dk, seen, o, ahead);
    T* out = static_cast<T*>(d.out) + (t * d.Hv + head) * d.Dv + column;
    for (long i = 0; i < width; i += LANES) store_n(out + i, f_load(o + i), width - i);
    from = work;
  }
  if (width < W)
    for (long i = 0; i < d.Dk; ++i) memcpy(state + i * d.Dv + column, work.row(i), size_t(width) * 4);
}

static inline float* delta_state(const Delta& d, long request, long head) {
  return d.state + (d.slots[request] * d.Hv + head) * d.Dk * d.Dv;
}

template <class T> static void delta_normalise(const Delta& d, long t, long key_head, float* q, float* k) {
  l2_normalise(static_cast<const T*>(d.q) + t * d.ldq + key_head * d.Dk, d.Dk, 1.0f / sqrtf(float(d.Dk)), q);
  l2_normalise(static_cast<const T*>(d.k) + t * d.ldk + key_head * d.Dk, d.Dk, 1.0f, k);
}

// One token per request. The state comes from memory and goes back to it, and is all that this takes time for: a task
// walks over several heads, whose states lie one behind the other, and asks for the next one during each.
template <class T> static void delta_steps(const Delta& d) {
  const long heads = d.N * d.Hv, each = max_l(1, heads / (4 * num_threads()));
  parallel(ceil_div(heads, each), double(heads * d.Dk * d.Dv), [&](long task) {
    float* q = static_cast<float*>(scratch(TASK_2, size_t(2 * d.Dk) * 4));
    const long end = min_l(heads, (task + 1) * each);
    for (long i = task * each; i < end; ++i) {
      const long next = min_l(i + 1, end - 1), head = i % d.Hv;
      Ahead ahead{reinterpret_cast<const char*>(delta_state(d, next / d.Hv, next % d.Hv))};
      delta_normalise<T>(d, i / d.Hv, head / (d.Hv / d.Hk), q, q + d.Dk);
      for (long column = 0; column < d.Dv; column += DELTA_COLUMNS)
        delta_slice<T>(d, {q, q + d.Dk}, delta_state(d, i / d.Hv, head), head, column, i / d.Hv, i / d.Hv + 1, ahead);
    }
  });
}

// Several tokens per request: a task keeps one slice. q and k are normalised beforehand, [Hk][tokens][Dk].
template <class T> static void delta_chunks(const Delta& d) {
  const long tokens = d.starts[d.N], slices = ceil_div(d.Dv, DELTA_COLUMNS), size = tokens * d.Dk;
  float* q = static_cast<float*>(scratch(ACTIVATIONS, size_t(2 * d.Hk * size) * 4));
  float* k = q + d.Hk * size;
  parallel(tokens, double(d.Hk * size), [&](long t) {
    for (long h = 0; h < d.Hk; ++h) delta_normalise<T>(d, t, h, q + h * size + t * d.Dk, k + h * size + t * d.Dk);
  });
  parallel(d.N * d.Hv * slices, double(size * d.Hv * d.Dv), [&](long task) {
    const long request = task / (d.Hv * slices), head = task / slices % d.Hv, begin = d.starts[request];
    const long first = head / (d.Hv / d.Hk) * size + begin * d.Dk;
    if (begin == d.starts[request + 1]) return;
    float* state = delta_state(d, request, head);
    Ahead ahead{reinterpret_cast<const char*>(state)};
    delta_slice<T>(d, {q + first, k + first}, state, head, task % slices * DELTA_COLUMNS, begin, d.starts[request + 1], ahead);
  });
}

static void delta(const Delta& d) {
  with_type(d.dtype, [&](auto zero) {
    if (d.starts) delta_chunks<decltype(zero)>(d);
    else delta_steps<decltype(zero)>(d);
  });
}

}  // namespace SF_ISA
}  // namespace sf
