// Attention of a block of a prompt's tokens, with scores and sums transposed: lanes are queries, so that nothing of the softmax
// is added up across lanes, and keys are multiplied as they lie in the cache.
//
//   s [BT, rows] = keys [BT, D] times q [D, rows]     o [D, rows] = o * shrink + values [D, BT] times weights [BT, rows]
//
// Rows are (token, head) for the heads that share a KV head, TILE of them at a time.
#pragma once
#include <math.h>

#include "attention_products.h"

namespace sf {
namespace SF_ISA {

constexpr long TILE = 64, TILES = 4;  // query rows at a time, and how often before keys and values are fetched anew

// What a thread works in: q, o, s, ... of `rows` query rows, in columns.
template <class P> struct PrefillSpace {
  typedef typename P::X X;
  long rows, Dp;
  float *o, *s, *top, *total, *shrink, *stage;  // o, top and total: of this part of the cache
  float *o_all, *top_all, *total_all;           // and of those before
  X *q, *k, *v, *p, *line;

  PrefillSpace(long rows, long Dp) : rows(rows), Dp(Dp) {
    o = static_cast<float*>(scratch(TASK, size_t(2 * rows * (Dp + 2) + TILE * (BT + 1) + 4 * Dp) * 4));
    top = o + rows * Dp;
    total = top + rows;
    o_all = total + rows;
    top_all = o_all + rows * Dp;
    total_all = top_all + rows;
    s = total_all + rows;
    shrink = s + TILE * BT;
    stage = shrink + TILE;
    q = static_cast<X*>(scratch(TASK_2, size_t(rows * Dp + 2 * BT * Dp + BT * TILE + 4 * Dp) * sizeof(X)));
    k = q + rows * Dp;
    v = k + BT * Dp;
    p = v + BT * Dp;
    line = p + BT * TILE;
    begin_part();
  }

  void begin_part() {
    for (long r = 0; r < rows; ++r) {
      top[r] = -INFINITY;
      total[r] = 0;
    }
    memset(o, 0, size_t(rows * Dp) * 4);
  }

  // Adds a part's sums to those before; the first one's are taken as they are.
  void end_part(bool is_first, float scale) {
    if (is_first) {
      memcpy(o_all, o, size_t(rows * (Dp + 2)) * 4);
      return;
    }
    const F c = f_set(scale * LOG2_E);
    for (long r = 0; r < rows; r += LANES) {
      const F before = f_load(top_all + r), more = f_load(top + r), after = f_max(before, more);
      const F old = f_shrink(c, before, after), fresh = f_shrink(c, more, after);
      f_store(top_all + r, after);
      f_store(total_all + r, f_fma(f_load(total + r), fresh, f_mul(f_load(total_all + r), old)));
      for (long d = 0; d < Dp; ++d) {
        float* all = o_all + d * rows + r;
        f_store(all, f_fma(f_load(o + d * rows + r), fresh, f_mul(f_load(all), old)));
      }
    }
  }

  // Queries into columns; query(r) is null for a row that does not exist.
  template <class Query> void set_queries(long D, const Query& query) {
    const long words = Dp / P::WORD;
    for (long r = 0; r < rows; r += 4) {
      for (int i = 0; i < 4; ++i) {
        if (const auto* from = query(r + i)) P::copy(from, D, Dp, line + i * Dp);
        else memset(line + i * Dp, 0, size_t(Dp) * sizeof(X));
      }
      for (long w = 0; w < words; w += 4) {
        Int4 four[4];
        for (int i = 0; i < 4; ++i) memcpy(&four[i], line + i * Dp + w * P::WORD, 16);
        transpose4(four, reinterpret_cast<char*>(q + (w * rows + r) * P::WORD), rows * 4);
      }
    }
  }

  // The sums of rows r ... r + 3, divided by their totals, as rows of `stage`.
  void divide(long r) {
    for (long d = 0; d < Dp; d += 4) {
      Int4 column[4];
      for (int i = 0; i < 4; ++i) memcpy(&column[i], o_all + (d + i) * rows + r, 16);
      transpose4(column, reinterpret_cast<char*>(stage + d), Dp * 4);
    }
    for (int i = 0; i < 4; ++i)
      for (long d = 0; d < Dp; d += LANES)
        f_store(stage + i * Dp + d, f_mul(f_load(stage + i * Dp + d), f_set(1.0f / total_all[r + i])));
  }
};

// Scores s [seen, n] of the rows from r on into weights p; shrink: by how much their earlier sums shrink.
template <class P> static void softmax_columns(PrefillSpace<P>& w, long r, long n, long seen, float scale) {
  const F c = f_set(scale * LOG2_E);  // 2^(c x) is e^(scale x)
  for (long i = 0; i < n; i += LANES) {
    const float* s = w.s + i;
    const F before = f_load(w.top + r + i);
    F m[4] = {before, before, before, before};
    long t = 0;
    for (; t + 4 <= seen; t += 4)
      SF_UNROLL for (int j = 0; j < 4; ++j) m[j] = f_max(m[j], f_load(s + (t + j) * n));
    for (; t < seen; ++t) m[0] = f_max(m[0], f_load(s + t * n));
    const F top = f_max(f_max(m[0], m[1]), f_max(m[2], m[3]));
    // A row that has seen nothing yet keeps its zeros; without a limit -inf - -inf would poison it.
    const F shift = f_max(f_set(LOWEST), top);
    // Token t adds to sum t % LANES, and these are added by halves: as in the lanes of a decode.
    F sum[LANES];
    for (long lane = 0; lane < LANES; lane += 2) {
      F even_sum = f_zero(), odd_sum = f_zero();
      for (t = lane; t < seen; t += LANES) {
        const F even = f_exp2(f_mul(c, f_sub(f_load(s + t * n), shift)));
        const F odd = t + 1 < seen ? f_exp2(f_mul(c, f_sub(f_load(s + (t + 1) * n), shift))) : f_zero();
        even_sum = f_add(even_sum, even);
        odd_sum = f_add(odd_sum, odd);
        P::weights(even, odd, w.p + t * n + i * P::WORD, n);
      }
      sum[lane] = even_sum;
      sum[lane + 1] = odd_sum;
    }
    for (long half = LANES / 2; half > 0; half /= 2)
      for (long lane = 0; lane < half; ++lane) sum[lane] = f_add(sum[lane], sum[lane + half]);
    f_store(w.shrink + i, f_shrink(c, before, top));
    f_store(w.top + r + i, top);
    f_store(w.total + r + i, f_fma(f_load(w.total + r + i), f_load(w.shrink + i), sum[0]));
  }
}

// Block of query tokens of a request, all heads of one KV head. first: position of the first one; query(r) and out(r):
// where row r, of token r / group and head r % group, is read and written.
template <class P, class T, class Query, class Out>
static void prefill_rows(const Pages<T>& pages, long first, long tokens, long group, float scale,
                         long D, const Query& query, const Out& out) {
  const long used = tokens * group, Dp = ceil_div(D, LANES) * LANES, words = Dp / P::WORD;
  PrefillSpace<P> w(ceil_div(used, LANES) * LANES, Dp);
  long at[BT];
  w.set_queries(D, [&](long r) { return r < used ? query(r) : nullptr; });
  for (long t0 = 0; t0 < first + tokens; t0 += BT) {
    const long valid = min_l(BT, first + tokens - t0);
    pages.find(t0, valid, at);
    for (long t = 0; t < valid; ++t) P::copy(pages.keys + at[t], D, Dp, w.k + t * Dp);
    P::pairs(pages.values, at, valid, D, Dp, w.v);
    for (long r = 0; r < w.rows; r += TILE) {
      const long n = min_l(TILE, w.rows - r), last = min_l(tokens - 1, (r + n - 1) / group);
      const long seen = min_l(valid, first + last + 1 - t0);
      if (seen <= 0) continue;
      gemm<typename P::X>({w.k, words, 1, w.q + r * P::WORD, w.rows, w.s, n, nullptr, seen, n, words});
      // Rows of tokens before a key do not see it: they are those up to the key's own.
      for (long t = max_l(0, first + r / group + 1 - t0); t < seen; ++t)
        for (long i = 0; i < min_l(n, (t0 + t - first) * group - r); ++i) w.s[t * n + i] = -INFINITY;
      softmax_columns<P>(w, r, n, seen, scale);
      gemm<typename P::X>({w.v, 1, Dp, w.p, n, w.o + r, w.rows, w.shrink, Dp, n, ceil_div(seen, P::WORD)});
    }
    if ((t0 + BT) % PART == 0 || t0 + BT >= first + tokens) {
      w.end_part(t0 < PART, scale);
      if (t0 + BT < first + tokens) w.begin_part();
    }
  }
  for (long r = 0; r < used; r += 4) {
    w.divide(r);
    for (long i = 0; i < min_l(4, used - r); ++i) {
      T* to = out(r + i);
      for (long d = 0; d < D; d += LANES) store_n(to + d, f_load(w.stage + i * Dp + d), D - d);
    }
  }
}

}  // namespace SF_ISA
}  // namespace sf
