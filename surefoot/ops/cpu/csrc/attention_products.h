// What attention multiplies, and how: in fp32, or in bf16 with fp32 sums where the machine has that. Keys, values and
// queries are bf16 then anyhow; only the softmax weights are rounded.
//
// All sums are in the order of gemm.h, whose word is one float or a pair of bf16. `copy`, `pairs` and `weights` lay its
// operands out for prefill, `row` and `weights_row` for decode.
#pragma once
#include "gemm.h"

namespace sf {
namespace SF_ISA {

constexpr long BT = 64;     // cached tokens at a time
constexpr long PART = 512;  // cached tokens whose softmax begins anew; then it is added to what was before
constexpr float LOG2_E = 1.44269504088896341f;
constexpr float LOWEST = -1e30f;  // above -inf, so that -inf minus it is no NaN

template <class T> struct Pages {  // keys and values of one request, from one KV head on
  const T *keys, *values;
  const int32_t* table;
  long block_size, row;  // row: elements from one token to the next

  // Where the rows of tokens t0 ... t0 + n - 1 begin; the last one's for those behind.
  void find(long t0, long n, long* at) const {
    long page = t0 / block_size, slot = t0 % block_size;
    for (long t = 0; t < n; ++t) {
      at[t] = (table[page] * block_size + slot) * row;
      if (++slot == block_size) {
        slot = 0;
        ++page;
      }
    }
    for (long t = n; t < BT; ++t) at[t] = at[n - 1];
  }
};

// Rows of the cache that will be wanted soon, asked for at the pace of the work, two lines at a time: they are too far
// apart for the processor to guess, and it drops what is asked for too fast.
struct Lookahead {
  const char *line = nullptr, *end = nullptr;
  const char *from[2 * BT], *to[2 * BT];
  long spans = 0, next = 0;

  template <class T> void set(const Pages<T>& pages, const long* at, long tokens, long elements) {
    spans = next = 0;
    line = end = nullptr;
    const T* bases[2] = {pages.keys, pages.values};
    for (const T* base : bases)
      for (long t = 0; t < tokens; ++t) {
        const char* row = reinterpret_cast<const char*>(base + at[t]);
        if (spans == 0 || to[spans - 1] != row) from[spans++] = row;
        to[spans - 1] = row + elements * long(sizeof(T));
      }
    advance();
  }
  // Reads all of it: one stream after another, which the processor does guess.
  void read() const {
    for (long i = 0; i < spans; ++i)
      for (const char* p = from[i]; p < to[i]; p += 64) (void)*static_cast<const volatile char*>(p);
  }
  void advance() {
    if (next == spans) return;
    line = from[next];
    end = to[next++];
  }
  SF_INLINE void fetch() {
    if (line >= end) return;
    prefetch(line);
    prefetch(line + 64);
    if ((line += 128) >= end) advance();
  }
};

// How much the weights of earlier tokens shrink, given the largest score before and after; c: scale * LOG2_E.
// NOTE: not as one multiply-add: where nothing changes, the factor has to be 1 exactly.
static inline F f_shrink(F c, F before, F after) { return f_exp2(f_mul(c, f_sub(before, f_max(f_set(LOWEST), after)))); }

template <class T> struct Fp32Products {
  typedef float X;
  static constexpr long WORD = 1;  // elements in 32 bits

  static void copy(const T* from, long D, long Dp, float* to) {
    for (long d = 0; d < Dp; d += LANES) f_store(to + d, load_n(from + d, D - d));
  }
  // Row t of keys, D elements, as Dp that may be read: `to` where they have to be converted or continued.
  static const float* row(const T* from, long D, long Dp, float* to) {
    copy(from, D, Dp, to);
    return to;
  }
  static void pairs(const T* values, const long* at, long valid, long D, long Dp, float* v) {  // [BT][Dp]
    for (long t = 0; t < valid; ++t) copy(values + at[t], D, Dp, v + t * Dp);
  }
  static SF_INLINE void weights(F even, F odd, float* to, long ld) {
    f_store(to, even);
    f_store(to + ld, odd);
  }
  static SF_INLINE void weights_row(F first, F second, float* to) {
    f_store(to, first);
    f_store(to + LANES, second);
  }
  // o [rows][Dp] += p [rows][BT] times values [valid][D]; v: memory to convert them in.
  static void add_values(const float* p, long rows, const T* values, const long* at, long valid, long D, long Dp, float* v,
                         float* o, Lookahead* ahead) {
    for (long t = 0; t < valid; ++t) {
      copy(values + at[t], D, Dp, v + t * Dp);
      ahead->fetch();
    }
    gemm<float, Lookahead>({p, BT, 1, v, Dp, o, Dp, nullptr, rows, Dp, valid, true, ahead});
  }
};

#ifdef SF_DOT_BF16
class Bf16Products {  // D: a multiple of BF16_STEP
 public:
  typedef bf16 X;
  static constexpr long WORD = 2;

  static void copy(const bf16* from, long D, long, bf16* to) { memcpy(to, from, size_t(D) * 2); }
  static const bf16* row(const bf16* from, long, long, bf16*) { return from; }

  static void pairs(const bf16* values, const long* at, long valid, long D, long Dp, bf16* v) {  // [BT / 2][Dp][2]
    for (long t = 0; t < valid; t += 2) {
      const bf16 *even = values + at[t], *odd = values + at[t + 1];
      int32_t* to = reinterpret_cast<int32_t*>(v + t * Dp);
      for (long d = 0; d < D; d += BF16_STEP) {
        // NOTE: zeros for a token that does not exist: a free page may hold NaN, and 0 x NaN is NaN.
        I low, high;
        bf16_zip(bf16_load(even + d), t + 1 < valid ? bf16_load(odd + d) : i_zero(), low, high);
        i_store(to + d, low);
        i_store(to + d + LANES, high);
      }
    }
  }
  static SF_INLINE void weights(F even, F odd, bf16* to, long) { bf16_pairs(even, odd, to); }
  static SF_INLINE void weights_row(F first, F second, bf16* to) { bf16_row(first, second, to); }
  // As that of Fp32Products; pairs of tokens are made where they are multiplied.
  static void add_values(const bf16* p, long rows, const bf16* values, const long* at, long valid, long D, long, bf16*, float* o,
                         Lookahead* ahead) {
    long r = 0;
    for (; r + 4 <= rows; r += 4) add_rows<4>(p + r * BT, values, at, valid, D, o + r * D, ahead);
    for (; r + 2 <= rows; r += 2) add_rows<2>(p + r * BT, values, at, valid, D, o + r * D, ahead);
    for (; r < rows; ++r) add_rows<1>(p + r * BT, values, at, valid, D, o + r * D, ahead);
  }

 private:
  template <int R>
  static void add_rows(const bf16* p, const bf16* values, const long* at, long valid, long D, float* o, Lookahead* ahead) {
    long d = 0;
    for (; d + 2 * BF16_STEP <= D; d += 2 * BF16_STEP) add_tile<R, 2>(p, values + d, at, valid, D, o + d, ahead);
    if (d < D) add_tile<R, 1>(p, values + d, at, valid, D, o + d, ahead);
  }
  template <int R, int V>
  static void add_tile(const bf16* p, const bf16* values, const long* at, long valid, long D, float* o, Lookahead* ahead) {
    F acc[R][2 * V];
    SF_UNROLL for (int i = 0; i < R; ++i)
      SF_UNROLL for (int j = 0; j < 2 * V; ++j) acc[i][j] = f_load(o + i * D + j * LANES);
    for (long t = 0; t < valid; t += 2) {
      const bf16 *even = values + at[t], *odd = values + at[t + 1];
      const bool both = t + 1 < valid;
      I v[2 * V];
      ahead->fetch();
      // NOTE: zeros for a token that does not exist: a free page may hold NaN, and 0 x NaN is NaN.
      SF_UNROLL for (int j = 0; j < V; ++j)
        bf16_zip(bf16_load(even + j * BF16_STEP), both ? bf16_load(odd + j * BF16_STEP) : i_zero(), v[2 * j], v[2 * j + 1]);
      SF_UNROLL for (int i = 0; i < R; ++i) {
        const I weight = gemm_a(p + i * BT, t / 2);
        SF_UNROLL for (int j = 0; j < 2 * V; ++j) acc[i][j] = dot_bf16(acc[i][j], v[j], weight);
      }
    }
    SF_UNROLL for (int i = 0; i < R; ++i)
      SF_UNROLL for (int j = 0; j < 2 * V; ++j) f_store(o + i * D + j * LANES, acc[i][j]);
  }
};
#endif

}  // namespace SF_ISA
}  // namespace sf
