// Attention of one query token: a part of its cache for R query heads that share a KV head, and the sum of the parts.
// Lanes run along a head; a step covers BT cached tokens and asks for the rows of the next, which are too short and too
// far apart for the processor to guess.
#pragma once
#include <math.h>

#include "attention_products.h"

namespace sf {
namespace SF_ISA {

// Turns a row of BT scores into weights, 0 from `valid` on; returns by how much earlier sums shrink.
static inline float softmax_row(float* s, long valid, float scale, float* top, float* total) {
  F block_top = f_set(*top);
  for (long t = valid; t < BT; ++t) s[t] = -INFINITY;
  for (long t = 0; t < BT; t += LANES) block_top = f_max(block_top, f_load(s + t));
  const float m = f_hmax(block_top), shrink = *top == -INFINITY ? 0.0f : expf(scale * (*top - m));
  const F c = f_set(scale * LOG2_E), shift = f_max(f_set(LOWEST), f_set(m));
  F sum = f_zero();
  for (long t = 0; t < BT; t += LANES) {
    const F p = f_exp2(f_mul(c, f_sub(f_load(s + t), shift)));
    f_store(s + t, p);
    sum = f_add(sum, p);
  }
  *total = *total * shrink + f_hsum(sum);
  *top = m;
  return shrink;
}

// One part of one request's cache. q(i): query head i. result: [R][Dp + 2], unnormalised sums, top, total.
template <class P, int R, class T, class Query>
static void decode_heads(const Query& q, float scale, const Pages<T>& pages, long begin, long end, float* result) {
  typedef typename P::X X;
  const long D = pages.D, Dp = ceil_div(D, LANES) * LANES, stride = Dp + 2;
  float* o = static_cast<float*>(scratch(TASK, size_t(R * Dp) * 4));
  X* query = static_cast<X*>(scratch(TASK_2, size_t(R * Dp) * sizeof(X)));
  float s[R * BT], top[R], total[R];
  X weights[R * BT];
  long at[2][BT];
  for (int i = 0; i < R; ++i) {
    P::copy(q(i), D, Dp, query + i * Dp);
    top[i] = -INFINITY;
    total[i] = 0;
  }
  memset(o, 0, size_t(R * Dp) * 4);
  pages.find(begin, min_l(BT, end - begin), at[0]);
  for (long t = begin, now = 0; t < end; t += BT, now ^= 1) {
    const long valid = min_l(BT, end - t);
    if (t + BT < end) pages.find(t + BT, min_l(BT, end - t - BT), at[now ^ 1]);
    else memcpy(at[now ^ 1], at[now], sizeof at[0]);
    P::template scores<R>(query, pages, at[now], at[now ^ 1], valid, Dp, s);
    for (int i = 0; i < R; ++i) {
      const float shrink = softmax_row(s + i * BT, valid, scale, top + i, total + i);
      if (shrink != 1.0f)
        for (long d = 0; d < Dp; d += LANES) f_store(o + i * Dp + d, f_mul(f_load(o + i * Dp + d), f_set(shrink)));
      for (long j = 0; j < BT; j += LANES) store(weights + i * BT + j, f_load(s + i * BT + j));
    }
    P::template values<R>(weights, pages, at[now], at[now ^ 1], valid, Dp, o);
  }
  for (int i = 0; i < R; ++i) {
    memcpy(result + i * stride, o + i * Dp, size_t(Dp) * 4);
    result[i * stride + Dp] = top[i];
    result[i * stride + Dp + 1] = total[i];
  }
}

// Adds up the parts of one query head and writes it.
template <class T>
static void merge_parts(const float* part, long stride, long parts, float scale, long Dp, long D, T* out) {
  float top = -INFINITY, total = 0;
  for (long p = 0; p < parts; ++p) top = part[p * stride + Dp] > top ? part[p * stride + Dp] : top;
  float* sum = static_cast<float*>(scratch(TASK, size_t(Dp) * 4));
  memset(sum, 0, size_t(Dp) * 4);
  for (long p = 0; p < parts; ++p) {
    const float weight = expf(scale * (part[p * stride + Dp] - top));
    total += weight * part[p * stride + Dp + 1];
    for (long d = 0; d < Dp; d += LANES)
      f_store(sum + d, f_fma(f_load(part + p * stride + d), f_set(weight), f_load(sum + d)));
  }
  for (long d = 0; d < D; d += LANES) store_n(out + d, f_mul(f_load(sum + d), f_set(1.0f / total)), D - d);
}

}  // namespace SF_ISA
}  // namespace sf
