// C = A B, C = C + A B or C = C * by + A B, for the small matrices of attention: lanes run along a row of B, A is repeated
// over them.
// Each element of C is summed in the order of k, whatever the tile it falls into.
//
// The unit of A and B is a word of 32 bits: one float, or two consecutive k of bf16, summed in fp32.
#pragma once
#include "common.h"

namespace sf {
namespace SF_ISA {

constexpr int GEMM_ROWS = 6, GEMM_VECTORS = LANES == 16 ? 4 : 2;

struct NoLookahead {
  static SF_INLINE void fetch() {}
};

template <class X, class L = NoLookahead> struct Gemm {
  const X* a; long row, step;  // A[m][k] is word m * row + k * step
  const X* b; long ldb;        // in words
  float* c; long ldc;
  const float* by;             // [columns], or null
  long rows, columns, inner;   // columns: a multiple of LANES; inner: in words
  bool add = false;            // without `by`: C holds sums already
  L* ahead = nullptr;          // memory to ask for meanwhile
};

static SF_INLINE F gemm_b(const float* b, long word) { return f_load(b + word); }
static SF_INLINE F gemm_a(const float* a, long word) { return f_set(a[word]); }
static SF_INLINE F gemm_add(F acc, F a, F b) { return f_fma(a, b, acc); }
#ifdef SF_DOT_BF16
static SF_INLINE I gemm_b(const bf16* b, long word) { return bf16_load(b + 2 * word); }
static SF_INLINE I gemm_a(const bf16* a, long word) {
  int32_t pair;
  memcpy(&pair, a + 2 * word, 4);
  return i_set(pair);
}
static SF_INLINE F gemm_add(F acc, I a, I b) { return dot_bf16(acc, b, a); }
#endif

template <int R, int V, class X, class L> static void gemm_tile(const Gemm<X, L>& g, long m, long n) {
  typedef decltype(gemm_b(g.b, 0)) Vector;
  F acc[R][V];
  float* c = g.c + m * g.ldc + n;
  if (g.by) {
    F by[V];
    SF_UNROLL for (int v = 0; v < V; ++v) by[v] = f_load(g.by + n + v * LANES);
    SF_UNROLL for (int i = 0; i < R; ++i)
      SF_UNROLL for (int v = 0; v < V; ++v) acc[i][v] = f_mul(f_load(c + i * g.ldc + v * LANES), by[v]);
  } else if (g.add) {
    SF_UNROLL for (int i = 0; i < R; ++i)
      SF_UNROLL for (int v = 0; v < V; ++v) acc[i][v] = f_load(c + i * g.ldc + v * LANES);
  } else {
    SF_UNROLL for (int i = 0; i < R; ++i)
      SF_UNROLL for (int v = 0; v < V; ++v) acc[i][v] = f_zero();
  }
  for (long k = 0; k < g.inner; ++k) {
    Vector row[V];
    g.ahead->fetch();
    SF_UNROLL for (int v = 0; v < V; ++v) row[v] = gemm_b(g.b, k * g.ldb + n + v * LANES);
    SF_UNROLL for (int i = 0; i < R; ++i) {
      const Vector x = gemm_a(g.a, (m + i) * g.row + k * g.step);
      SF_UNROLL for (int v = 0; v < V; ++v) acc[i][v] = gemm_add(acc[i][v], x, row[v]);
    }
  }
  SF_UNROLL for (int i = 0; i < R; ++i)
    SF_UNROLL for (int v = 0; v < V; ++v) f_store(c + i * g.ldc + v * LANES, acc[i][v]);
}

template <int R, class X, class L> static void gemm_rows(const Gemm<X, L>& g, long m) {
  long n = 0;
  for (; n + GEMM_VECTORS * LANES <= g.columns; n += GEMM_VECTORS * LANES) gemm_tile<R, GEMM_VECTORS>(g, m, n);
  for (; n < g.columns; n += LANES) gemm_tile<R, 1>(g, m, n);
}

template <int R, class X, class L> static void gemm_rest(const Gemm<X, L>& g, long m, long left) {
  if (left == R) gemm_rows<R>(g, m);
  else if constexpr (R > 1) gemm_rest<R - 1>(g, m, left);
}

template <class X, class L = NoLookahead> static void gemm(const Gemm<X, L>& g) {
  long m = 0;
  for (; m + GEMM_ROWS <= g.rows; m += GEMM_ROWS) gemm_rows<GEMM_ROWS>(g, m);
  if (m < g.rows) gemm_rest<GEMM_ROWS - 1>(g, m, g.rows - m);
}

}  // namespace SF_ISA
}  // namespace sf
