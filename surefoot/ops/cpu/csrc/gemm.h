// C += A B for small fp32 matrices, row by row, as attention needs them. Each element of C is summed in the order of k,
// whatever the tile it falls into.
#pragma once
#include "common.h"

namespace sf {
namespace SF_ISA {

constexpr int GEMM_ROWS = 6, GEMM_VECTORS = LANES == 16 ? 4 : 2;

struct Gemm {
  const float* a; long lda;
  const float* b; long ldb;
  float* c; long ldc;
  long rows, columns, inner;  // columns: a multiple of LANES
};

template <int R, int V> static void gemm_tile(const Gemm& g, long m, long n) {
  F acc[R][V];
  const float* a = g.a + m * g.lda;
  const float* b = g.b + n;
  float* c = g.c + m * g.ldc + n;
  SF_UNROLL for (int i = 0; i < R; ++i)
    SF_UNROLL for (int v = 0; v < V; ++v) acc[i][v] = f_load(c + i * g.ldc + v * LANES);
  for (long k = 0; k < g.inner; ++k, b += g.ldb) {
    F row[V];
    SF_UNROLL for (int v = 0; v < V; ++v) row[v] = f_load(b + v * LANES);
    SF_UNROLL for (int i = 0; i < R; ++i) {
      const F x = f_set(a[i * g.lda + k]);
      SF_UNROLL for (int v = 0; v < V; ++v) acc[i][v] = f_fma(x, row[v], acc[i][v]);
    }
  }
  SF_UNROLL for (int i = 0; i < R; ++i)
    SF_UNROLL for (int v = 0; v < V; ++v) f_store(c + i * g.ldc + v * LANES, acc[i][v]);
}

template <int R> static void gemm_rows(const Gemm& g, long m) {
  long n = 0;
  for (; n + GEMM_VECTORS * LANES <= g.columns; n += GEMM_VECTORS * LANES) gemm_tile<R, GEMM_VECTORS>(g, m, n);
  for (; n < g.columns; n += LANES) gemm_tile<R, 1>(g, m, n);
}

template <int R> static void gemm_rest(const Gemm& g, long m, long left) {
  if (left == R) gemm_rows<R>(g, m);
  else if constexpr (R > 1) gemm_rest<R - 1>(g, m, left);
}

static void gemm(const Gemm& g) {
  long m = 0;
  for (; m + GEMM_ROWS <= g.rows; m += GEMM_ROWS) gemm_rows<GEMM_ROWS>(g, m);
  if (m < g.rows) gemm_rest<GEMM_ROWS - 1>(g, m, g.rows - m);
}

}  // namespace SF_ISA
}  // namespace sf
