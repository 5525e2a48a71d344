// Attention of a few query tokens of a request: part by part of its cache, so that threads can share a long one.
//
//   s [rows, BT] = q [rows, D] times keys [D, BT]     o [rows, Dp] = o * shrink + weights [rows, BT] times values [BT, Dp]
//
// Lanes run along cached tokens, then along a head; rows are (token, head) for the heads that share a KV head. Every
// sum is in the order of attention_prefill.h, so one token has the bits that it would have within a prompt.
#pragma once
#include <math.h>

#include "attention_products.h"

namespace sf {
namespace SF_ISA {

// Sums of a part of the cache, for all rows of a request: o [Hk][rows][Dp] unnormalised, top and total [Hk][rows_p].
struct Partial {
  float* at;
  long Hk, rows, rows_p, Dp;  // rows of one KV head; rows_p: rounded up to LANES

  static long floats(long Hk, long rows, long Dp) { return Hk * (rows * Dp + 2 * ceil_div(rows, LANES) * LANES); }
  Partial(float* at, long Hk, long rows, long Dp)
      : at(at), Hk(Hk), rows(rows), rows_p(ceil_div(rows, LANES) * LANES), Dp(Dp) {}
  float* o(long head) const { return at + head * rows * Dp; }
  float* top(long head) const { return at + Hk * rows * Dp + head * rows_p; }
  float* total(long head) const { return top(head) + Hk * rows_p; }
  long size() const { return floats(Hk, rows, Dp); }
};

// What a thread works in.
template <class P> struct DecodeSpace {
  typedef typename P::X X;
  X *q, *row, *v, *p;  // q [heads][rows][Dp], row [LANES][Dp], v [BT][Dp], p [rows][BT]
  int32_t* k;          // [words][BT]
  float *s, *shift, *shrink, *sum;

  DecodeSpace(long heads, long rows, long Dp) {
    const long rows_p = ceil_div(rows, LANES) * LANES;
    q = static_cast<X*>(scratch(TASK, size_t((heads * rows + LANES + BT) * Dp + rows * BT) * sizeof(X)));
    row = q + heads * rows * Dp;
    v = row + LANES * Dp;
    p = v + BT * Dp;
    k = static_cast<int32_t*>(scratch(TASK_2, size_t(Dp / P::WORD * BT + rows * BT + 3 * rows_p) * 4));
    s = reinterpret_cast<float*>(k + Dp / P::WORD * BT);
    shift = s + rows * BT;
    shrink = shift + rows_p;
    sum = shrink + rows_p;
  }
};

// Keys of n tokens (rounded up to LANES) into columns: k [words][BT].
template <class P, class T>
static void key_columns(const DecodeSpace<P>& w, const T* keys, const long* at, long n, long D, long Dp, Lookahead* ahead) {
  for (long t = 0; t < n; t += LANES) {
    const char* rows[LANES];
    for (long i = 0; i < LANES; ++i)
      rows[i] = reinterpret_cast<const char*>(P::row(keys + at[t + i], D, Dp, w.row + i * Dp));
    for (long word = 0; word < Dp / P::WORD; word += LANES) {
      transpose_words(rows, word * 4, w.k + word * BT + t, BT);
      for (long i = 0; i < LANES; i += 4) ahead->fetch();
    }
  }
}

// Scores w.s [rows][BT] of one KV head and n tokens into weights w.p; row r sees the first seen + r / group of them. The
// sums o, top and total take their new scale.
template <class P>
static void softmax_rows(const DecodeSpace<P>& w, const Partial& part, long head, long n, long seen, long group, float scale) {
  const F c = f_set(scale * LOG2_E);  // 2^(c x) is e^(scale x)
  float *top = part.top(head), *total = part.total(head), *o = part.o(head);
  for (long r = 0; r < part.rows; ++r) {
    float* s = w.s + r * BT;
    for (long t = max_l(0, seen + r / group); t < n; ++t) s[t] = -INFINITY;
    F m = f_load(s);
    for (long t = LANES; t < n; t += LANES) m = f_max(m, f_load(s + t));
    w.shift[r] = f_hmax(m);
  }
  for (long r = 0; r < part.rows; r += LANES) {
    const F before = f_load(top + r), after = f_max(before, f_load(w.shift + r));
    f_store(w.shrink + r, f_shrink(c, before, after));
    f_store(top + r, after);
    f_store(w.shift + r, f_max(f_set(LOWEST), after));
  }
  for (long r = 0; r < part.rows; ++r) {
    const F shift = f_set(w.shift[r]);
    F sum = f_zero();
    for (long t = 0; t < n; t += 2 * LANES) {
      const F first = f_exp2(f_mul(c, f_sub(f_load(w.s + r * BT + t), shift)));
      const F second = t + LANES < n ? f_exp2(f_mul(c, f_sub(f_load(w.s + r * BT + t + LANES), shift))) : f_zero();
      sum = f_add(f_add(sum, first), second);
      P::weights_row(first, second, w.p + r * BT + t);
    }
    w.sum[r] = f_hsum(sum);
    if (w.shrink[r] != 1.0f)
      for (long d = 0; d < part.Dp; d += LANES)
        f_store(o + r * part.Dp + d, f_mul(f_load(o + r * part.Dp + d), f_set(w.shrink[r])));
  }
  for (long r = 0; r < part.rows; r += LANES)
    f_store(total + r, f_fma(f_load(total + r), f_load(w.shrink + r), f_load(w.sum + r)));
}

// A request's queries of `heads` KV heads, and sums that hold nothing yet. query(h, r): where row r is read.
template <class P, class Query>
static void begin_part(const DecodeSpace<P>& w, const Partial& part, long head, long heads, long D, const Query& query) {
  for (long h = 0; h < heads; ++h) {
    for (long r = 0; r < part.rows; ++r) P::copy(query(head + h, r), D, part.Dp, w.q + (h * part.rows + r) * part.Dp);
    memset(part.o(head + h), 0, size_t(part.rows * part.Dp) * 4);
    for (long r = 0; r < part.rows_p; ++r) {
      part.top(head + h)[r] = -INFINITY;
      part.total(head + h)[r] = 0;
    }
  }
}

// Adds `valid` tokens from t0 on, whose keys and values begin at `at`, to the sums of KV heads [head, head + heads); first:
// position of the first query token.
template <class P, class T>
static void decode_block(const DecodeSpace<P>& w, const Pages<T>& pages, const Partial& part, long head, long heads, long t0,
                         long valid, const long* at, long first, long group, long D, float scale, Lookahead* ahead) {
  const long Dp = part.Dp, rows = part.rows, words = Dp / P::WORD, n = ceil_div(valid, LANES) * LANES;
  for (long h = 0; h < heads; ++h) {
    key_columns<P>(w, pages.keys + h * D, at, n, D, Dp, ahead);
    const auto* k = reinterpret_cast<const typename P::X*>(w.k);
    gemm<typename P::X, Lookahead>({w.q + h * rows * Dp, words, 1, k, BT, w.s, BT, nullptr, rows, n, words, false, ahead});
    softmax_rows<P>(w, part, head + h, n, first + 1 - t0, group, scale);
    P::add_values(w.p, rows, pages.values + h * D, at, valid, D, Dp, w.v, part.o(head + h), ahead);
  }
}

// Adds up `parts` of a request, which follow each other, into the first, for one row of one KV head, and writes it.
template <class T>
static void merge_parts(const Partial& part, long parts, long head, long r, float scale, long D, T* out) {
  const F c = f_set(scale * LOG2_E);
  float* o = part.o(head) + r * part.Dp;
  F top = f_set(part.top(head)[r]), total = f_set(part.total(head)[r]);
  for (long i = 1; i < parts; ++i) {
    const long next = i * part.size();
    const F before = top, more = f_set(part.top(head)[r + next]);
    top = f_max(before, more);
    const F old = f_shrink(c, before, top), fresh = f_shrink(c, more, top);
    total = f_fma(f_set(part.total(head)[r + next]), fresh, f_mul(total, old));
    for (long d = 0; d < part.Dp; d += LANES) f_store(o + d, f_fma(f_load(o + next + d), fresh, f_mul(f_load(o + d), old)));
  }
  float sum[LANES];
  f_store(sum, total);
  for (long d = 0; d < D; d += LANES) store_n(out + d, f_mul(f_load(o + d), f_set(1.0f / sum[0])), D - d);
}

}  // namespace SF_ISA
}  // namespace sf
