// Attention of a block of query tokens, with scores and sums transposed: lanes are queries, so that nothing of the softmax
// is added up across lanes, and keys are multiplied as they lie in the cache.
//
//   s [BT, rows] = keys [BT, D] times q [D, rows]     o [D, rows] = o * shrink + values [D, BT] times weights [BT, rows]
//
// Rows are (token, head) for the heads that share a KV head, TILE of them at a time. `Products` says in what to multiply:
// fp32, or bf16 with fp32 sums where the machine has that.
#pragma once
#include "gemm.h"

namespace sf {
namespace SF_ISA {

constexpr long BT = 64;               // cached tokens at a time
constexpr long TILE = 64, TILES = 4;  // query rows at a time, and how often before keys and values are fetched anew

template <class T> struct Pages {  // keys or values of one request and KV head
  const T* base;
  const int32_t* table;
  long block_size, Hk, D, head;
  const T* token(long t) const {
    return base + ((table[t / block_size] * block_size + t % block_size) * Hk + head) * D;
  }
};

template <class T> struct Fp32Products {
  typedef float X;
  static constexpr long WORD = 1;  // elements in 32 bits

  static void copy(const T* from, long D, long Dp, float* to) {
    for (long d = 0; d < Dp; d += LANES) f_store(to + d, load_n(from + d, D - d));
  }
  static void values(const Pages<T>& pages, long t0, long valid, long Dp, float* v) {  // [BT][Dp]
    for (long t = 0; t < valid; ++t) copy(pages.token(t0 + t), pages.D, Dp, v + t * Dp);
  }
  static SF_INLINE void weights(F even, F odd, float* to, long ld) {
    f_store(to, even);
    f_store(to + ld, odd);
  }
};

#ifdef SF_DOT_BF16
// Keys, values and queries are bf16 already, so only the weights of the values are rounded. D: a multiple of LANES.
struct Bf16Products {
  typedef bf16 X;
  static constexpr long WORD = 2;

  static void copy(const bf16* from, long D, long, bf16* to) { memcpy(to, from, size_t(D) * 2); }

  static void values(const Pages<bf16>& pages, long t0, long valid, long Dp, bf16* v) {  // [BT / 2][Dp][2]
    static const bf16 zeros[LANES] = {};
    for (long t = 0; t < valid; t += 2) {
      // NOTE: zeros for a token that does not exist: a free page may hold NaN, and 0 x NaN is NaN.
      const bf16 *even = pages.token(t0 + t), *odd = t + 1 < valid ? pages.token(t0 + t + 1) : nullptr;
      for (long d = 0; d < Dp; d += LANES) bf16_pairs(even + d, odd ? odd + d : zeros, v + (t * Dp + 2 * d));
    }
  }
  static SF_INLINE void weights(F even, F odd, bf16* to, long) { bf16_pairs(even, odd, to); }
};
#endif

// What a thread works in: q, o, s, ... of `rows` query rows, in columns.
template <class P> struct PrefillSpace {
  typedef typename P::X X;
  long rows, Dp;
  float *o, *s, *top, *total, *shrink, *stage;
  X *q, *k, *v, *p, *line;

  PrefillSpace(long rows, long Dp) : rows(rows), Dp(Dp) {
    o = static_cast<float*>(scratch(TASK, size_t(rows * (Dp + 2) + TILE * (BT + 1) + 4 * Dp) * 4));
    top = o + rows * Dp;
    total = top + rows;
    s = total + rows;
    shrink = s + TILE * BT;
    stage = shrink + TILE;
    q = static_cast<X*>(scratch(TASK_2, size_t(rows * Dp + 2 * BT * Dp + BT * TILE + 4 * Dp) * sizeof(X)));
    k = q + rows * Dp;
    v = k + BT * Dp;
    p = v + BT * Dp;
    line = p + BT * TILE;
    for (long r = 0; r < rows; ++r) {
      top[r] = -INFINITY;
      total[r] = 0;
    }
    memset(o, 0, size_t(rows * Dp) * 4);
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
      for (int i = 0; i < 4; ++i) memcpy(&column[i], o + (d + i) * rows + r, 16);
      transpose4(column, reinterpret_cast<char*>(stage + d), Dp * 4);
    }
    for (int i = 0; i < 4; ++i)
      for (long d = 0; d < Dp; d += LANES)
        f_store(stage + i * Dp + d, f_mul(f_load(stage + i * Dp + d), f_set(1.0f / total[r + i])));
  }
};

// Scores s [seen, n] of the rows from r on into weights p; shrink: by how much their earlier sums shrink.
template <class P> static void softmax_columns(PrefillSpace<P>& w, long r, long n, long seen, float scale) {
  const F c = f_set(scale * 1.44269504088896341f);  // 2^(c x) is e^(scale x)
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
    const F shift = f_max(f_set(-1e30f), top);
    // NOTE: not as one multiply-add: where a block changes nothing, the factor has to be 1 exactly.
    const F shrink = f_exp2(f_mul(c, f_sub(before, shift)));
    F sum[2] = {f_zero(), f_zero()};
    for (t = 0; t < seen; t += 2) {
      const F even = f_exp2(f_mul(c, f_sub(f_load(s + t * n), shift)));
      const F odd = t + 1 < seen ? f_exp2(f_mul(c, f_sub(f_load(s + (t + 1) * n), shift))) : f_zero();
      sum[0] = f_add(sum[0], even);
      sum[1] = f_add(sum[1], odd);
      P::weights(even, odd, w.p + t * n + i * P::WORD, n);
    }
    f_store(w.shrink + i, shrink);
    f_store(w.top + r + i, top);
    f_store(w.total + r + i, f_fma(f_load(w.total + r + i), shrink, f_add(sum[0], sum[1])));
  }
}

// Block of query tokens of a request, all heads of one KV head. first: position of the first one; query(r) and out(r):
// where row r, of token r / group and head r % group, is read and written.
template <class P, class T, class Query, class Out>
static void prefill_rows(const Pages<T>& keys, const Pages<T>& values, long first, long tokens, long group, float scale,
                         const Query& query, const Out& out) {
  const long used = tokens * group, Dp = ceil_div(keys.D, LANES) * LANES, words = Dp / P::WORD;
  PrefillSpace<P> w(ceil_div(used, LANES) * LANES, Dp);
  w.set_queries(keys.D, [&](long r) { return r < used ? query(r) : nullptr; });
  for (long t0 = 0; t0 < first + tokens; t0 += BT) {
    const long valid = min_l(BT, first + tokens - t0);
    for (long t = 0; t < valid; ++t) P::copy(keys.token(t0 + t), keys.D, Dp, w.k + t * Dp);
    P::values(values, t0, valid, Dp, w.v);
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
  }
  for (long r = 0; r < used; r += 4) {
    w.divide(r);
    for (long i = 0; i < min_l(4, used - r); ++i) {
      T* to = out(r + i);
      for (long d = 0; d < keys.D; d += LANES) store_n(to + d, f_load(w.stage + i * Dp + d), keys.D - d);
    }
  }
}

}  // namespace SF_ISA
}  // namespace sf
