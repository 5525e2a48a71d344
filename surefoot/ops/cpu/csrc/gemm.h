// C += A B for small matrices, row by row, as attention needs them. Each element of C is summed in the order of k, whatever
// the tile it falls into. Of bf16, two k at a time: `inner` counts pairs, and B holds the two of a column side by side.
#pragma once
#include "common.h"

namespace sf {
namespace SF_ISA {

constexpr int GEMM_ROWS = 6, GEMM_VECTORS = LANES == 16 ? 4 : 2;

template <class X> struct GemmOf {
  const X* a; long lda;
  const X* b; long ldb;
  float* c; long ldc;
  long rows, columns, inner;  // columns: a multiple of LANES; ldb: columns
};
typedef GemmOf<float> Gemm;

static SF_INLINE F gemm_b(const float* b, long k, long ldb, long n) { return f_load(b + k * ldb + n); }
static SF_INLINE F gemm_a(const float* a, long k) { return f_set(a[k]); }
static SF_INLINE F gemm_add(F acc, F a, F b) { return f_fma(a, b, acc); }
#ifdef SF_DOT_BF16
typedef GemmOf<bf16> GemmBf16;
static SF_INLINE I gemm_b(const bf16* b, long k, long ldb, long n) { return bf16_load(b + 2 * (k * ldb + n)); }
static SF_INLINE I gemm_a(const bf16* a, long k) {
  int32_t pair;
  memcpy(&pair, a + 2 * k, 4);
  return i_set(pair);
}
static SF_INLINE F gemm_add(F acc, I a, I b) { return dot_bf16(acc, b, a); }
#endif

template <int R, int V, class X> static void gemm_tile(const GemmOf<X>& g, long m, long n) {
  typedef decltype(gemm_b(g.b, 0, 0, 0)) Vector;
  F acc[R][V];
  const X* a = g.a + m * g.lda;
  float* c = g.c + m * g.ldc + n;
  SF_UNROLL for (int i = 0; i < R; ++i)
    SF_UNROLL for (int v = 0; v < V; ++v) acc[i][v] = f_load(c + i * g.ldc + v * LANES);
  for (long k = 0; k < g.inner; ++k) {
    Vector row[V];
    SF_UNROLL for (int v = 0; v < V; ++v) row[v] = gemm_b(g.b, k, g.ldb, n + v * LANES);
    SF_UNROLL for (int i = 0; i < R; ++i) {
      const Vector x = gemm_a(a + i * g.lda, k);
      SF_UNROLL for (int v = 0; v < V; ++v) acc[i][v] = gemm_add(acc[i][v], x, row[v]);
    }
  }
  SF_UNROLL for (int i = 0; i < R; ++i)
    SF_UNROLL for (int v = 0; v < V; ++v) f_store(c + i * g.ldc + v * LANES, acc[i][v]);
}

template <int R, class X> static void gemm_rows(const GemmOf<X>& g, long m) {
  long n = 0;
  for (; n + GEMM_VECTORS * LANES <= g.columns; n += GEMM_VECTORS * LANES) gemm_tile<R, GEMM_VECTORS>(g, m, n);
  for (; n < g.columns; n += LANES) gemm_tile<R, 1>(g, m, n);
}

template <int R, class X> static void gemm_rest(const GemmOf<X>& g, long m, long left) {
  if (left == R) gemm_rows<R>(g, m);
  else if constexpr (R > 1) gemm_rest<R - 1>(g, m, left);
}

template <class X> static void gemm_of(const GemmOf<X>& g) {
  long m = 0;
  for (; m + GEMM_ROWS <= g.rows; m += GEMM_ROWS) gemm_rows<GEMM_ROWS>(g, m);
  if (m < g.rows) gemm_rest<GEMM_ROWS - 1>(g, m, g.rows - m);
}
static void gemm(const Gemm& g) { gemm_of(g); }
#ifdef SF_DOT_BF16
static void gemm_bf16(const GemmBf16& g) { gemm_of(g); }
#endif

}  // namespace SF_ISA
}  // namespace sf
