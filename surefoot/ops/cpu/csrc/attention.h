// Causal attention over paged keys and values, with an online softmax; sums are in fp32, and so are products, but for those
// of a prefill in bf16 where the machine multiplies bf16 (attention_prefill.h).
//
// A request with one new token (decode) is split into parts of PART cached tokens; one with more (prefill) into blocks of
// query tokens. Both walk the cache in blocks of BT tokens counted from its start, so a token's result does not depend on
// the other requests, on the number of threads, or on how a prompt was cut into chunks.
#pragma once
#include <math.h>

#include "attention_prefill.h"

namespace sf {
namespace SF_ISA {

constexpr long PART = 512;

// Turns a row of BT scores into weights; returns by how much earlier sums shrink. Scores from `valid` on count as absent.
static inline float softmax_block(float* s, long valid, float* top, float* total) {
  const F nothing = f_set(-INFINITY);
  F block_top = nothing;
  for (long t = valid; t < BT; ++t) s[t] = -INFINITY;
  for (long t = 0; t < BT; t += LANES) block_top = f_max(block_top, f_load(s + t));
  const float m = f_hmax(block_top) > *top ? f_hmax(block_top) : *top;
  // A row that has seen nothing yet keeps its zeros; without this exp(-inf + inf) would poison it.
  const float shrink = m == -INFINITY ? 1.0f : expf(*top - m);
  const F shift = f_set(m == -INFINITY ? 0.0f : m);
  F sum = f_zero();
  for (long t = 0; t < BT; t += LANES) {
    const F p = f_exp(f_sub(f_load(s + t), shift));
    f_store(s + t, p);
    sum = f_add(sum, p);
  }
  *total = *total * shrink + f_hsum(sum);
  *top = m;
  return shrink;
}

static inline void scale_row(float* x, long n, float by) {
  if (by == 1.0f) return;
  for (long i = 0; i < n; i += LANES) f_store(x + i, f_mul(f_load(x + i), f_set(by)));
}

// Scores of R query heads (fp32, padded to Dp) and the BT tokens at t0, of which `valid` exist.
template <int R, class T> static void decode_scores(const float* q, long Dp, const Pages<T>& keys, long t0, long valid, float* s) {
  for (long t = 0; t < valid; t += 4) {
    const T* k[4];
    SF_UNROLL for (int j = 0; j < 4; ++j) k[j] = keys.token(t0 + min_l(t + j, valid - 1));
    F acc[R][4];
    SF_UNROLL for (int i = 0; i < R; ++i)
      SF_UNROLL for (int j = 0; j < 4; ++j) acc[i][j] = f_zero();
    for (long d = 0; d < keys.D; d += LANES) {
      F b[4];
      SF_UNROLL for (int j = 0; j < 4; ++j) b[j] = load_n(k[j] + d, keys.D - d);
      SF_UNROLL for (int i = 0; i < R; ++i) {
        const F a = f_load(q + i * Dp + d);
        SF_UNROLL for (int j = 0; j < 4; ++j) acc[i][j] = f_fma(a, b[j], acc[i][j]);
      }
    }
    SF_UNROLL for (int i = 0; i < R; ++i) store4(s + i * BT + t, f_hsum4(acc[i][0], acc[i][1], acc[i][2], acc[i][3]));
  }
}

// o[R][Dp] += weights[R][valid] times values.
template <int R, class T> static void decode_values(const float* s, const Pages<T>& values, long t0, long valid, float* o, long Dp) {
  constexpr int V = 2;
  for (long d = 0; d < Dp; d += V * LANES) {
    const bool second = d + LANES < Dp;
    F acc[R][V];
    SF_UNROLL for (int i = 0; i < R; ++i) {
      acc[i][0] = f_load(o + i * Dp + d);
      acc[i][1] = second ? f_load(o + i * Dp + d + LANES) : f_zero();
    }
    for (long t = 0; t < valid; ++t) {
      const T* v = values.token(t0 + t) + d;
      const F v0 = load_n(v, values.D - d);
      const F v1 = second ? load_n(v + LANES, values.D - d - LANES) : f_zero();
      SF_UNROLL for (int i = 0; i < R; ++i) {
        const F p = f_set(s[i * BT + t]);
        acc[i][0] = f_fma(p, v0, acc[i][0]);
        acc[i][1] = f_fma(p, v1, acc[i][1]);
      }
    }
    SF_UNROLL for (int i = 0; i < R; ++i) {
      f_store(o + i * Dp + d, acc[i][0]);
      if (second) f_store(o + i * Dp + d + LANES, acc[i][1]);
    }
  }
}

// Asks for the BT tokens from t0 on: a head's rows are too short and too far apart for the processor to guess the next.
template <class T> static inline void fetch_block(const Pages<T>& pages, long t0, long end) {
  for (long t = t0; t < min_l(end, t0 + BT); ++t) {
    const char* row = reinterpret_cast<const char*>(pages.token(t));
    for (long b = 0; b < pages.D * long(sizeof(T)); b += 64) prefetch(row + b);
  }
}

// One part of one request's cache for R query heads of a KV head. result: [R][Dp + 2], unnormalised sums, top, total.
template <int R, class T>
static void decode_heads(const T* q, float scale, const Pages<T>& keys, const Pages<T>& values, long begin, long end, long Dp,
                         float* result) {
  float* query = static_cast<float*>(scratch(TASK, size_t(R * Dp) * 4));
  float s[R * BT], top[R], total[R];
  float* o = static_cast<float*>(scratch(TASK_2, size_t(R * Dp) * 4));
  for (int i = 0; i < R; ++i) {
    for (long d = 0; d < Dp; d += LANES)
      f_store(query + i * Dp + d, f_mul(load_n(q + i * keys.D + d, keys.D - d), f_set(scale)));
    top[i] = -INFINITY;
    total[i] = 0;
  }
  memset(o, 0, size_t(R * Dp) * 4);
  fetch_block(keys, begin, end);
  for (long t = begin; t < end; t += BT) {
    const long valid = min_l(BT, end - t);
    fetch_block(values, t, end);
    fetch_block(keys, t + BT, end);
    decode_scores<R>(query, Dp, keys, t, valid, s);
    for (int i = 0; i < R; ++i) scale_row(o + i * Dp, Dp, softmax_block(s + i * BT, valid, top + i, total + i));
    decode_values<R>(s, values, t, valid, o, Dp);
  }
  for (int i = 0; i < R; ++i) {
    memcpy(result + i * (Dp + 2), o + i * Dp, size_t(Dp) * 4);
    result[i * (Dp + 2) + Dp] = top[i];
    result[i * (Dp + 2) + Dp + 1] = total[i];
  }
}

// Adds up the parts of one query head and writes it.
template <class T> static void merge_parts(const float* part, long stride, long parts, long Dp, long D, T* out) {
  float top = -INFINITY, total = 0;
  for (long p = 0; p < parts; ++p) top = part[p * stride + Dp] > top ? part[p * stride + Dp] : top;
  float* sum = static_cast<float*>(scratch(TASK, size_t(Dp) * 4));
  memset(sum, 0, size_t(Dp) * 4);
  for (long p = 0; p < parts; ++p) {
    const float weight = expf(part[p * stride + Dp] - top);
    total += weight * part[p * stride + Dp + 1];
    for (long d = 0; d < Dp; d += LANES)
      f_store(sum + d, f_fma(f_load(part + p * stride + d), f_set(weight), f_load(sum + d)));
  }
  for (long d = 0; d < D; d += LANES) store_n(out + d, f_mul(f_load(sum + d), f_set(1.0f / total)), D - d);
}

template <class T> struct Job {
  const Attention& a;
  long group, Dp;
  Pages<T> pages(const void* cache, long request, long head) const {
    return {static_cast<const T*>(cache), a.block_table + request * a.max_blocks, a.block_size, a.Hk, a.D, head};
  }
  const T* query(long row, long head) const { return static_cast<const T*>(a.q) + row * a.ldq + head * a.D; }
  T* out(long row, long head) const { return static_cast<T*>(a.out) + (row * a.H + head) * a.D; }
};

template <class T> static void decode_part(const Job<T>& j, long request, long kv_head, long part, float* result) {
  const Pages<T> keys = j.pages(j.a.k, request, kv_head), values = j.pages(j.a.v, request, kv_head);
  const long begin = part * PART, end = min_l(j.a.lens[request], begin + PART), stride = j.Dp + 2;
  long g = 0;
  const auto heads = [&](auto count) {
    constexpr int R = decltype(count)::value;
    for (; g + R <= j.group; g += R)
      decode_heads<R>(j.query(j.a.starts[request], kv_head * j.group + g), j.a.scale, keys, values, begin, end, j.Dp,
                      result + g * stride);
  };
  heads(Int<4>());
  heads(Int<2>());
  heads(Int<1>());
}

// Query tokens [begin, begin + n) of a request's new ones, all heads of one KV head.
template <class P, class T> static void prefill_block(const Job<T>& j, long request, long kv_head, long begin, long n) {
  const Attention& a = j.a;
  const long row0 = a.starts[request] + begin, first = a.lens[request] - (a.starts[request + 1] - row0);
  const auto head = [&](long r) { return kv_head * j.group + r % j.group; };
  prefill_rows<P>(j.pages(a.k, request, kv_head), j.pages(a.v, request, kv_head), first, n, j.group, a.scale,
                  [&](long r) { return j.query(row0 + r / j.group, head(r)); },
                  [&](long r) { return j.out(row0 + r / j.group, head(r)); });
}

template <class P, class T> static void attention_of(const Attention& a) {
  const Job<T> j{a, a.H / a.Hk, ceil_div(a.D, LANES) * LANES};
  const long block = max_l(1, TILES * TILE / j.group), stride = j.Dp + 2;
  // Tasks of request i start at first[i]; parts of decode requests are kept in `partial` from cell[i] on.
  long* first = static_cast<long*>(scratch(SCALES, size_t(2 * (a.N + 1)) * sizeof(long)));
  long* cell = first + a.N + 1;
  first[0] = cell[0] = 0;
  double work = 0;
  for (long i = 0; i < a.N; ++i) {
    const long n = a.starts[i + 1] - a.starts[i];
    const long pieces = n == 1 ? ceil_div(a.lens[i], PART) : ceil_div(n, block);
    first[i + 1] = first[i] + pieces * a.Hk;
    cell[i + 1] = cell[i] + (n == 1 ? pieces * a.H : 0);
    work += double(n) * double(a.lens[i]) * double(a.H * a.D);
  }
  float* partial = static_cast<float*>(scratch(PARTIAL, size_t(cell[a.N] * stride) * 4));
  parallel(first[a.N], work, [&](long index) {
    const long task = first[a.N] - 1 - index;  // a prompt's last tokens see most: they begin
    long i = 0;
    while (first[i + 1] <= task) ++i;
    const long n = a.starts[i + 1] - a.starts[i], kv_head = (task - first[i]) % a.Hk, piece = (task - first[i]) / a.Hk;
    if (n == 1) decode_part(j, i, kv_head, piece, partial + (cell[i] + piece * a.H + kv_head * j.group) * stride);
    else prefill_block<P>(j, i, kv_head, piece * block, min_l(block, n - piece * block));
  });
  for (long i = 0; i < a.N; ++i) {
    if (a.starts[i + 1] - a.starts[i] != 1) continue;
    for (long h = 0; h < a.H; ++h)
      merge_parts(partial + (cell[i] + h) * stride, a.H * stride, (cell[i + 1] - cell[i]) / a.H, j.Dp, a.D,
                  j.out(a.starts[i], h));
  }
}

static void attention(const Attention& a) {
#ifdef SF_DOT_BF16
  if (a.dtype == BF16 && a.D % LANES == 0) return attention_of<Bf16Products, bf16>(a);
#endif
  with_type(a.dtype, [&](auto zero) {
    typedef decltype(zero) T;
    attention_of<Fp32Products<T>, T>(a);
  });
}

}  // namespace SF_ISA
}  // namespace sf
