// int8 weights times int8 activations for many tokens: the weights of a task are first laid out as panels, lanes being
// channels, which pays from a few dozen tokens on. Then there are no sums across lanes, and both sides are read in order:
//
//   panel      [K / 4][PANEL channels][4]          weights + 128 where the instruction wants one side unsigned
//   tokens     [tiles][K / 4][PANEL_ROWS][4]       quantised token by token
//
// Sums are exact integers and are finished with the same operations as in the tiles, so that a token gets the same bits
// as it gets alone.
#pragma once
#include "linear_tiles.h"

#ifdef SF_DOT_INT8
namespace sf {
namespace SF_ISA {

constexpr long PANEL = PANEL_VECTORS * LANES, PANEL_BYTES_PER_TASK = 256 * 1024;
constexpr long PACK_AHEAD = 512, PANEL_AHEAD = 1024, TOKENS_AHEAD = 512;  // bytes to prefetch ahead

// `count` rows of int8 (a multiple of 4), 4 bytes of each in turn; `flip` is xored into all. What is missing to the last
// 16 bytes of a row counts as zero. Four rows at a time for a cache line: more at once would meet in the same sets.
static inline void interleave(const int8_t* const rows[], long count, long bytes, int flip, char* to, long step) {
  const Int4 mask = {flip, flip, flip, flip};
  for (long line = 0; line < bytes; line += 64)
    for (long i = 0; i < count; i += 4) {
      for (int j = 0; j < 4; ++j) prefetch(rows[i + j] + line + PACK_AHEAD);
      for (long k = line; k < min_l(line + 64, bytes); k += 16) {
        Int4 r[4] = {};
        for (int j = 0; j < 4; ++j) {
          if (k + 16 <= bytes) memcpy(&r[j], rows[i + j] + k, 16);
          else memcpy(&r[j], rows[i + j] + k, size_t(bytes - k));
          r[j] ^= mask;
        }
        transpose4(r, to + k / 4 * step + i * 4, step);
      }
    }
}

struct Panels {
  const Linear& job;
  const int8_t* x;         // interleaved tokens
  const float* scales;     // of the tokens
  const int32_t* sums;
  const long words = ceil_div(job.K, 16) * 4, panels = ceil_div(job.N, PANEL), tiles = ceil_div(job.M, PANEL_ROWS);

  long first_row(long i) const { return job.M * i / tiles; }  // tiles of nearly equal height

  void pack(long panel, char* to) const {
    const int8_t* rows[PANEL];
    for (long j = 0; j < PANEL; ++j) rows[j] = static_cast<const int8_t*>(job.w) + min_l(panel * PANEL + j, job.N - 1) * job.K;
    interleave(rows, PANEL, job.K, A8_OFFSET ? int(0x80808080) : 0, to, PANEL * 4);
  }

  template <class T> void finish(const I acc[PANEL_VECTORS], long m, long n, const float* scale, const float* bias) const {
    T* y = static_cast<T*>(job.y) + m * job.ldy + n;
    for (int v = 0; v < PANEL_VECTORS && n + v * LANES < job.N; ++v) {
      const F by = f_mul(f_set(scales[m]), f_load(scale + v * LANES));
      store_n(y + v * LANES, f_add(f_mul(i_to_f(acc[v]), by), f_load(bias + v * LANES)), job.N - n - v * LANES);
    }
  }

  template <int R> void multiply(const char* panel, const int8_t* a, I acc[R][PANEL_VECTORS]) const {
    I part[R][PANEL_VECTORS];
    SF_UNROLL for (int m = 0; m < R; ++m)
      SF_UNROLL for (int v = 0; v < PANEL_VECTORS; ++v) part[m][v] = acc[m][v];
    for (long k = 0; k < words; ++k, panel += PANEL * 4, a += PANEL_ROWS * 4) {
      W8 w[PANEL_VECTORS];
      prefetch(a + TOKENS_AHEAD);
      SF_UNROLL for (int v = 0; v < PANEL_VECTORS; ++v) {
        prefetch(panel + PANEL_AHEAD + v * LANES * 4);
        w[v] = w8_packed(panel + v * LANES * 4);
      }
      SF_UNROLL for (int m = 0; m < R; ++m) {
        const auto token = a8_repeat(a + m * 4);
        SF_UNROLL for (int v = 0; v < PANEL_VECTORS; ++v) part[m][v] = dot_a8(part[m][v], w[v], token);
      }
    }
    SF_UNROLL for (int m = 0; m < R; ++m)
      SF_UNROLL for (int v = 0; v < PANEL_VECTORS; ++v) acc[m][v] = part[m][v];
  }

  template <int R> void tile(int rows, const char* panel, long n, long i, const float* scale, const float* bias) const {
    if (rows != R) {
      if constexpr (R > 1) tile<R - 1>(rows, panel, n, i, scale, bias);
      return;
    }
    const long m0 = first_row(i);
    I acc[R][PANEL_VECTORS];
    for (int m = 0; m < R; ++m)
      for (int v = 0; v < PANEL_VECTORS; ++v) acc[m][v] = i_set(-sums[m0 + m]);
    multiply<R>(panel, x + i * words * PANEL_ROWS * 4, acc);
    with_type(job.xtype, [&](auto zero) {
      for (int m = 0; m < R; ++m) finish<decltype(zero)>(acc[m], m0 + m, n, scale, bias);
    });
  }

  void task(long first, long last) const {
    const long panel_bytes = words * PANEL * 4, count = last - first;
    char* packed = static_cast<char*>(scratch(TASK, size_t(count * panel_bytes)));
    float* scale = static_cast<float*>(scratch(TASK_2, size_t(2 * count * PANEL) * 4));
    float* bias = scale + count * PANEL;
    for (long p = 0; p < count; ++p) pack(first + p, packed + p * panel_bytes);
    for (long j = 0; j < count * PANEL; ++j) {
      const long channel = min_l(first * PANEL + j, job.N - 1);
      scale[j] = static_cast<const float*>(job.wscale)[channel];
      bias[j] = job.bias ? read_any(job.bias, job.bias_type, channel) : 0.0f;
    }
    for (long i = 0; i < tiles; ++i)
      for (long p = 0; p < count; ++p)
        tile<PANEL_ROWS>(int(first_row(i + 1) - first_row(i)), packed + p * panel_bytes, (first + p) * PANEL, i,
                         scale + p * PANEL, bias + p * PANEL);
  }

  void operator()() const {
    long per_task = max_l(1, PANEL_BYTES_PER_TASK / (words * PANEL * 4));
    per_task = min_l(per_task, max_l(1, ceil_div(panels, 4L * num_threads())));
    parallel(ceil_div(panels, per_task), double(job.N) * double(job.K) * double(job.M),
             [&](long i) { task(i * per_task, min_l(panels, (i + 1) * per_task)); });
  }
};

static void linear_panels(const Linear& job) {
  const long tiles = ceil_div(job.M, PANEL_ROWS), words = ceil_div(job.K, 16) * 4, padded = round_up(job.K, 64);
  int8_t* x = static_cast<int8_t*>(scratch(ACTIVATIONS, size_t(tiles * words * PANEL_ROWS * 4)));
  float* scales = static_cast<float*>(scratch(SCALES, size_t(job.M) * 4));
  int32_t* sums = static_cast<int32_t*>(scratch(SUMS, size_t(job.M) * 4));
  with_type(job.xtype, [&](auto zero) {
    typedef decltype(zero) T;
    parallel(tiles, double(job.M * job.K), [&](long i) {
      int8_t* tile = static_cast<int8_t*>(scratch(TASK, size_t(PANEL_ROWS * padded)));
      const long m0 = job.M * i / tiles, rows = job.M * (i + 1) / tiles - m0;
      const int8_t* each[PANEL_ROWS];
      for (long m = 0; m < PANEL_ROWS; ++m) each[m] = tile + min_l(m, rows - 1) * padded;
      for (long m = 0; m < rows; ++m)
        quantise_a8(static_cast<const T*>(job.x) + (m0 + m) * job.ldx, job.K, padded, tile + m * padded, scales + m0 + m,
                    sums + m0 + m);
      interleave(each, PANEL_ROWS, words * 4, 0, reinterpret_cast<char*>(x) + i * words * PANEL_ROWS * 4, PANEL_ROWS * 4);
    });
  });
  Panels{job, x, scales, sums}();
}

}  // namespace SF_ISA
}  // namespace sf
#endif
