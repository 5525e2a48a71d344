// What attention multiplies, and how: in fp32, or in bf16 with fp32 sums where the machine has that. Keys, values and
// queries are bf16 then anyhow; only the softmax weights are rounded.
//
// For one query token (decode), R query heads at a time, cached tokens t with rows at[t]:
//   scores   s [R, BT] = q [R, D] times keys          values   o [R, D] += weights [R, BT] times values
// For many (prefill), `copy`, `pairs` and `weights` lay out what gemm.h multiplies.
#pragma once
#include "gemm.h"

namespace sf {
namespace SF_ISA {

constexpr long BT = 64;  // cached tokens at a time
constexpr float LOG2_E = 1.44269504088896341f;
constexpr float LOWEST = -1e30f;  // above -inf, so that -inf minus it is no NaN

template <class T> struct Pages {  // keys and values of one request and KV head
  const T *keys, *values;
  const int32_t* table;
  long block_size, Hk, D, head;

  // Where the rows of tokens t0 ... t0 + n - 1 begin; the last one's for those behind.
  void find(long t0, long n, long* at) const {
    long page = t0 / block_size, slot = t0 % block_size;
    for (long t = 0; t < n; ++t) {
      at[t] = ((table[page] * block_size + slot) * Hk + head) * D;
      if (++slot == block_size) {
        slot = 0;
        ++page;
      }
    }
    for (long t = n; t < BT; ++t) at[t] = at[n - 1];
  }
};

template <class T> static SF_INLINE void fetch_row(const T* row, long D) {
  for (long b = 0; b < D * long(sizeof(T)); b += 64) prefetch(reinterpret_cast<const char*>(row) + b);
}

template <class T> struct Fp32Products {
  typedef float X;
  static constexpr long WORD = 1;  // elements in 32 bits

  static void copy(const T* from, long D, long Dp, float* to) {
    for (long d = 0; d < Dp; d += LANES) f_store(to + d, load_n(from + d, D - d));
  }
  static void pairs(const Pages<T>& pages, const long* at, long valid, long Dp, float* v) {  // [BT][Dp]
    for (long t = 0; t < valid; ++t) copy(pages.values + at[t], pages.D, Dp, v + t * Dp);
  }
  static SF_INLINE void weights(F even, F odd, float* to, long ld) {
    f_store(to, even);
    f_store(to + ld, odd);
  }

  template <int R>
  static void scores(const float* q, const Pages<T>& pages, const long* at, const long* next, long valid, long Dp, float* s) {
    for (long t = 0; t < valid; t += 4) {
      const T* k[4];
      SF_UNROLL for (int j = 0; j < 4; ++j) {
        k[j] = pages.keys + at[t + j];
        fetch_row(pages.keys + next[t + j], pages.D);
      }
      F acc[R][4];
      SF_UNROLL for (int i = 0; i < R; ++i)
        SF_UNROLL for (int j = 0; j < 4; ++j) acc[i][j] = f_zero();
      for (long d = 0; d < pages.D; d += LANES) {
        F b[4];
        SF_UNROLL for (int j = 0; j < 4; ++j) b[j] = load_n(k[j] + d, pages.D - d);
        SF_UNROLL for (int i = 0; i < R; ++i) {
          const F a = f_load(q + i * Dp + d);
          SF_UNROLL for (int j = 0; j < 4; ++j) acc[i][j] = f_fma(a, b[j], acc[i][j]);
        }
      }
      SF_UNROLL for (int i = 0; i < R; ++i) store4(s + i * BT + t, f_hsum4(acc[i][0], acc[i][1], acc[i][2], acc[i][3]));
    }
  }

  template <int R>
  static void values(const float* p, const Pages<T>& pages, const long* at, const long* next, long valid, long Dp, float* o) {
    for (long t = 0; t < valid; ++t) fetch_row(pages.values + next[t], pages.D);
    long d = 0;
    for (; d + 2 * LANES <= Dp; d += 2 * LANES) values_at<R, 2>(p, pages, at, valid, Dp, o, d);
    if (d < Dp) values_at<R, 1>(p, pages, at, valid, Dp, o, d);
  }

 private:
  template <int R, int V>
  static void values_at(const float* p, const Pages<T>& pages, const long* at, long valid, long Dp, float* o, long d) {
    F acc[R][V];
    SF_UNROLL for (int i = 0; i < R; ++i)
      SF_UNROLL for (int j = 0; j < V; ++j) acc[i][j] = f_load(o + i * Dp + d + j * LANES);
    for (long t = 0; t < valid; ++t) {
      F v[V];
      SF_UNROLL for (int j = 0; j < V; ++j) v[j] = load_n(pages.values + at[t] + d + j * LANES, pages.D - d - j * LANES);
      SF_UNROLL for (int i = 0; i < R; ++i) {
        const F weight = f_set(p[i * BT + t]);
        SF_UNROLL for (int j = 0; j < V; ++j) acc[i][j] = f_fma(weight, v[j], acc[i][j]);
      }
    }
    SF_UNROLL for (int i = 0; i < R; ++i)
      SF_UNROLL for (int j = 0; j < V; ++j) f_store(o + i * Dp + d + j * LANES, acc[i][j]);
  }
};

#ifdef SF_DOT_BF16
struct Bf16Products {  // D: a multiple of BF16_STEP
  typedef bf16 X;
  static constexpr long WORD = 2;

  static void copy(const bf16* from, long D, long, bf16* to) { memcpy(to, from, size_t(D) * 2); }

  static void pairs(const Pages<bf16>& pages, const long* at, long valid, long Dp, bf16* v) {  // [BT / 2][Dp][2]
    static const bf16 zeros[LANES] = {};
    for (long t = 0; t < valid; t += 2) {
      // NOTE: zeros for a token that does not exist: a free page may hold NaN, and 0 x NaN is NaN.
      const bf16 *even = pages.values + at[t], *odd = pages.values + at[t + 1];
      for (long d = 0; d < Dp; d += LANES) bf16_pairs(even + d, t + 1 < valid ? odd + d : zeros, v + (t * Dp + 2 * d));
    }
  }
  static SF_INLINE void weights(F even, F odd, bf16* to, long) { bf16_pairs(even, odd, to); }

  template <int R>
  static void scores(const bf16* q, const Pages<bf16>& pages, const long* at, const long* next, long valid, long D, float* s) {
    for (long t = 0; t < valid; t += 4) {
      F acc[R][4];
      SF_UNROLL for (int i = 0; i < R; ++i)
        SF_UNROLL for (int j = 0; j < 4; ++j) acc[i][j] = f_zero();
      SF_UNROLL for (int j = 0; j < 4; ++j) fetch_row(pages.keys + next[t + j], D);
      for (long d = 0; d < D; d += BF16_STEP) {
        I k[4];
        SF_UNROLL for (int j = 0; j < 4; ++j) k[j] = bf16_load(pages.keys + at[t + j] + d);
        SF_UNROLL for (int i = 0; i < R; ++i) {
          const I a = bf16_load(q + i * D + d);
          SF_UNROLL for (int j = 0; j < 4; ++j) acc[i][j] = dot_bf16(acc[i][j], k[j], a);
        }
      }
      SF_UNROLL for (int i = 0; i < R; ++i) store4(s + i * BT + t, f_hsum4(acc[i][0], acc[i][1], acc[i][2], acc[i][3]));
    }
  }

  template <int R>
  static void values(const bf16* p, const Pages<bf16>& pages, const long* at, const long* next, long valid, long D, float* o) {
    long d = 0;
    for (; d + 2 * BF16_STEP <= D; d += 2 * BF16_STEP) values_at<R, 2>(p, pages, at, next, valid, D, o, d);
    if (d < D) values_at<R, 1>(p, pages, at, next, valid, D, o, d);
  }

 private:
  template <int R, int V>
  static void values_at(const bf16* p, const Pages<bf16>& pages, const long* at, const long* next, long valid, long D, float* o,
                        long d) {
    F acc[R][2 * V];
    SF_UNROLL for (int i = 0; i < R; ++i)
      SF_UNROLL for (int j = 0; j < 2 * V; ++j) acc[i][j] = f_load(o + i * D + d + j * LANES);
    for (long t = 0; t < valid; t += 2) {
      const bf16 *even = pages.values + at[t] + d, *odd = pages.values + at[t + 1] + d;
      fetch_row(pages.values + next[t] + d, V * BF16_STEP);
      fetch_row(pages.values + next[t + 1] + d, V * BF16_STEP);
      I v[2 * V];
      SF_UNROLL for (int j = 0; j < V; ++j)
        bf16_zip(bf16_load(even + j * BF16_STEP), bf16_load(odd + j * BF16_STEP), v[2 * j], v[2 * j + 1]);
      SF_UNROLL for (int i = 0; i < R; ++i) {
        int32_t pair;
        memcpy(&pair, p + i * BT + t, 4);
        const I weight = i_set(pair);
        SF_UNROLL for (int j = 0; j < 2 * V; ++j) acc[i][j] = dot_bf16(acc[i][j], v[j], weight);
      }
    }
    SF_UNROLL for (int i = 0; i < R; ++i)
      SF_UNROLL for (int j = 0; j < 2 * V; ++j) f_store(o + i * D + d + j * LANES, acc[i][j]);
  }
};
#endif

}  // namespace SF_ISA
}  // namespace sf
