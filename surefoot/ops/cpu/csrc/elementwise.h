// RMSNorm and its fused relatives, gates, rotary embedding: one pass over memory each, arithmetic in fp32.
#pragma once
#include <math.h>

#include "common.h"

namespace sf {
namespace SF_ISA {

template <class T, class W> static void norm_row(const Norm& n, long row) {
  const T* x = static_cast<const T*>(n.x) + row * n.ldx;
  const T* other = n.other ? static_cast<const T*>(n.other) + row * n.ldo : nullptr;
  const W* w = static_cast<const W*>(n.w);
  T* y = static_cast<T*>(n.y) + row * n.width;
  if (n.sum) {
    T* sum = static_cast<T*>(n.sum) + row * n.width;
    for (long i = 0; i < n.width; i += LANES) {
      const long left = n.width - i;
      store_n(sum + i, f_add(load_n(x + i, left), load_n(other + i, left)), left);
    }
    x = sum;  // as rounded
  }
  F squares = f_zero();
  for (long i = 0; i < n.width; i += LANES) {
    const F v = load_n(x + i, n.width - i);
    squares = f_fma(v, v, squares);
  }
  const F by = f_set(1.0f / sqrtf(f_hsum(squares) / float(n.width) + n.eps));
  for (long i = 0; i < n.width; i += LANES) {
    const long left = n.width - i;
    F v = f_mul(f_mul(load_n(x + i, left), by), load_n(w + i, left));
    if (other && !n.sum) v = f_mul(v, f_silu(load_n(other + i, left)));
    store_n(y + i, v, left);
  }
}

static void norm(const Norm& n) {
  // Rows of a head norm are short: several to a task.
  const long per_task = max_l(1, 4096 / n.width);
  with_type(n.dtype, [&](auto zero) {
    with_type(n.wtype, [&](auto weight) {
      parallel(ceil_div(n.rows, per_task), double(n.rows * n.width), [&](long task) {
        for (long r = task * per_task; r < min_l(n.rows, (task + 1) * per_task); ++r)
          norm_row<decltype(zero), decltype(weight)>(n, r);
      });
    });
  });
}

static void gate(int op, int dtype, const void* a, long lda, const void* b, long ldb, void* y, long rows, long width) {
  with_type(dtype, [&](auto zero) {
    typedef decltype(zero) T;
    parallel(rows, double(rows * width), [&](long r) {
      const T *p = static_cast<const T*>(a) + r * lda, *q = static_cast<const T*>(b) + r * ldb;
      T* out = static_cast<T*>(y) + r * width;
      for (long i = 0; i < width; i += LANES) {
        const F u = load_n(p + i, width - i), v = load_n(q + i, width - i);
        store_n(out + i, op == SWIGLU ? f_mul(f_silu(u), v) : f_mul(u, f_sigmoid(v)), width - i);
      }
    });
  });
}

// Heads of x [tokens, heads, dim]: pairs (x[i], x[i + half]) turned by the token's angle i, the rest copied.
static void rotary(int dtype, const void* x, long ldx, const float* cos, const float* sin, void* y, long tokens, long heads,
                   long dim, long half) {
  with_type(dtype, [&](auto zero) {
    typedef decltype(zero) T;
    parallel(tokens, double(tokens * heads * dim), [&](long t) {
      for (long h = 0; h < heads; ++h) {
        const T* in = static_cast<const T*>(x) + t * ldx + h * dim;
        T* out = static_cast<T*>(y) + (t * heads + h) * dim;
        for (long i = 0; i < half; i += LANES) {
          const long left = half - i;
          const F a = load_n(in + i, left), b = load_n(in + half + i, left);
          const F c = load_n(cos + t * half + i, left), s = load_n(sin + t * half + i, left);
          store_n(out + i, f_sub(f_mul(a, c), f_mul(b, s)), left);
          store_n(out + half + i, f_fma(b, c, f_mul(a, s)), left);
        }
        memcpy(out + 2 * half, in + 2 * half, size_t(dim - 2 * half) * sizeof(T));
      }
    });
  });
}

}  // namespace SF_ISA
}  // namespace sf
