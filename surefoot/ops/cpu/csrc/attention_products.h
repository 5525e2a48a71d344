// What a block of prefill attention multiplies, and how: in fp32, or in bf16 with fp32 sums where the machine has that.
//
//   s [rows, BT] = q [rows, D] times keys        o [rows, Dp] += weights [rows, BT] times values
//
// NOTE: keys and values behind `valid` are zeroed, not skipped: a free page may hold NaN, and 0 x NaN is NaN.
#pragma once
#include "gemm.h"

namespace sf {
namespace SF_ISA {

constexpr long BT = 64;  // cached tokens at a time

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

  static void query(const T* from, long D, float scale, float* q) {
    for (long d = 0; d < D; d += LANES) f_store(q + d, f_mul(load_n(from + d, D - d), f_set(scale)));
  }
  static void keys(const Pages<T>& pages, long t0, long valid, float* kt) {  // [D][BT]
    memset(kt, 0, size_t(BT * pages.D) * 4);
    for (long t = 0; t < valid; ++t) {
      const T* key = pages.token(t0 + t);
      for (long d = 0; d < pages.D; ++d) kt[d * BT + t] = to_float(key[d]);
    }
  }
  static void values(const Pages<T>& pages, long t0, long valid, long Dp, float* v) {  // [BT][Dp]
    for (long t = 0; t < valid; ++t)
      for (long d = 0; d < Dp; d += LANES) f_store(v + t * Dp + d, load_n(pages.token(t0 + t) + d, pages.D - d));
    memset(v + valid * Dp, 0, size_t((BT - valid) * Dp) * 4);
  }
  static void scores(const float* q, const float* kt, float* s, long rows, long D, long Dp, float) {
    memset(s, 0, size_t(rows * BT) * 4);
    gemm({q, Dp, kt, BT, s, BT, rows, BT, D});
  }
  static void sum(const float* s, float*, const float* v, float* o, long rows, long Dp, long valid) {
    gemm({s, BT, v, Dp, o, Dp, rows, Dp, valid});
  }
};

#ifdef SF_DOT_BF16
// Keys, values and queries are bf16 already, so only the weights of the values are rounded. D: a multiple of LANES.
struct Bf16Products {
  typedef bf16 X;

  static void query(const bf16* from, long D, float, bf16* q) { memcpy(q, from, size_t(D) * 2); }

  static void keys(const Pages<bf16>& pages, long t0, long valid, bf16* kt) {  // [D / 2][BT][2]
    static const bf16 zeros[8] = {};
    for (long t = 0; t < BT; t += 4) {
      const bf16* key[4];
      for (int i = 0; i < 4; ++i) key[i] = t + i < valid ? pages.token(t0 + t + i) : nullptr;
      for (long d = 0; d < pages.D; d += 8) {
        Int4 r[4];
        for (int i = 0; i < 4; ++i) memcpy(&r[i], key[i] ? key[i] + d : zeros, 16);
        transpose4(r, reinterpret_cast<char*>(kt + d * BT + t * 2), BT * 4);
      }
    }
  }
  static void values(const Pages<bf16>& pages, long t0, long valid, long Dp, bf16* v) {  // [BT / 2][Dp][2]
    static const bf16 zeros[LANES] = {};
    for (long t = 0; t < valid; t += 2) {
      const bf16 *even = pages.token(t0 + t), *odd = t + 1 < valid ? pages.token(t0 + t + 1) : nullptr;
      for (long d = 0; d < Dp; d += LANES) bf16_pairs(even + d, odd ? odd + d : zeros, v + (t * Dp + 2 * d));
    }
  }
  static void scores(const bf16* q, const bf16* kt, float* s, long rows, long D, long Dp, float scale) {
    memset(s, 0, size_t(rows * BT) * 4);
    gemm_bf16({q, Dp, kt, BT, s, BT, rows, BT, D / 2});
    for (long i = 0; i < rows * BT; i += LANES) f_store(s + i, f_mul(f_load(s + i), f_set(scale)));
  }
  static void sum(const float* s, bf16* weights, const bf16* v, float* o, long rows, long Dp, long valid) {
    for (long i = 0; i < rows * BT; i += LANES) bf16_store(weights + i, f_load(s + i));
    gemm_bf16({weights, BT, v, Dp, o, Dp, rows, Dp, ceil_div(valid, 2)});
  }
};
#endif

}  // namespace SF_ISA
}  // namespace sf
