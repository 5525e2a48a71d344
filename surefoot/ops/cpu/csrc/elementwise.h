// RMSNorm and its fused relatives, gates, addition, rotary embedding: one pass over memory each, arithmetic in fp32.
#pragma once
#include <math.h>

#include "common.h"

namespace sf {
namespace SF_ISA {

// body(row) for rows of `width` elements; short ones several to a task, handing out which costs as much as they do.
template <class Body> static void parallel_rows(long rows, long width, const Body& body) {
  const long each = max_l(1, 8192 / width);
  parallel(ceil_div(rows, each), double(rows * width), [&](long task) {
    for (long r = task * each; r < min_l(rows, (task + 1) * each); ++r) body(r);
  });
}

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
  with_type(n.dtype, [&](auto zero) {
    with_type(n.wtype, [&](auto weight) {
      parallel_rows(n.rows, n.width, [&](long row) { norm_row<decltype(zero), decltype(weight)>(n, row); });
    });
  });
}

template <int OP> static SF_INLINE F gated(F u, F v) {
  return OP == SWIGLU ? f_mul(f_silu(u), v) : OP == SIGMOID_MUL ? f_mul(u, f_sigmoid(v)) : f_add(u, v);
}

template <int OP, class T>
static void gate_rows(const T* a, long lda, const T* b, long ldb, T* y, long rows, long width) {
  parallel_rows(rows, width, [&](long r) {
    for (long i = 0; i < width; i += LANES) {
      const long left = width - i;
      store_n(y + r * width + i, gated<OP>(load_n(a + r * lda + i, left), load_n(b + r * ldb + i, left)), left);
    }
  });
}

static void gate(int op, int dtype, const void* a, long lda, const void* b, long ldb, void* y, long rows, long width) {
  with_type(dtype, [&](auto zero) {
    typedef decltype(zero) T;
    const T *p = static_cast<const T*>(a), *q = static_cast<const T*>(b);
    T* out = static_cast<T*>(y);
    if (op == SWIGLU) gate_rows<SWIGLU>(p, lda, q, ldb, out, rows, width);
    else if (op == SIGMOID_MUL) gate_rows<SIGMOID_MUL>(p, lda, q, ldb, out, rows, width);
    else gate_rows<ADD>(p, lda, q, ldb, out, rows, width);
  });
}

// Heads of x [tokens, heads, dim]: pairs (x[i], x[i + half]) turned by the token's angle i, the rest copied.
static void rotary(int dtype, const void* x, long ldx, const float* cos, const float* sin, void* y, long tokens, long heads,
                   long dim, long half) {
  with_type(dtype, [&](auto zero) {
    typedef decltype(zero) T;
    parallel_rows(tokens, heads * dim, [&](long t) {
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

// Per row of x: the largest value and where it first stands. NaN counts as the largest, as in torch.max; the index of a row
// that holds one, or nothing above -inf, is -1. Blocks are searched by their largest values; rows with a NaN or an infinity,
// which fast maxima would lose, are walked.
template <class T> static void argmax_row(const T* x, long width, T* best, int64_t* index) {
  constexpr long BLOCK_LENGTH = 512;
  F poison = f_zero();
  float top = -3.4028235e38f;
  long from = 0;
  for (long b = 0; b < width; b += BLOCK_LENGTH) {
    const long end = min_l(width, b + BLOCK_LENGTH);
    F most = f_set(-3.4028235e38f);
    long i = b;
    for (; i + LANES <= end; i += LANES) {
      const F v = load(x + i);
      most = f_max(v, most);
      poison = f_fma(v, f_zero(), poison);
    }
    float block = f_hmax(most);
    for (; i < end; ++i) {
      const float v = to_float(x[i]);
      block = v > block ? v : block;
      poison = f_fma(f_set(v), f_zero(), poison);
    }
    if (block > top || b == 0) top = block, from = b;
  }
  long at = -1;
  if (f_hsum(poison) == 0) {
    for (at = from; to_float(x[at]) != top; ++at) {}
  } else {
    float found = -INFINITY;
    for (long i = 0; i < width && found == found; ++i) {
      const float v = to_float(x[i]);
      if (v > found || v != v || i == 0) found = v, from = i;
      if (v > -INFINITY) at = from;
    }
    if (found != found) at = -1;
  }
  *best = x[at < 0 ? from : at];
  *index = at;
}

static void argmax(int dtype, const void* x, long ldx, void* best, int64_t* index, long rows, long width) {
  with_type(dtype, [&](auto zero) {
    typedef decltype(zero) T;
    parallel(rows, double(rows * width), [&](long r) {
      argmax_row(static_cast<const T*>(x) + r * ldx, width, static_cast<T*>(best) + r, index + r);
    });
  });
}

}  // namespace SF_ISA
}  // namespace sf
