// Linear layers with float weights, as they lie in a checkpoint: activations are prepared once, then tiles are spread
// over the threads by output channel.
#pragma once
#include "linear_int.h"
#include "linear_tiles.h"

namespace sf {
namespace SF_ISA {

constexpr long SMALL = 64;  // tokens up to which weights are read from memory once and used for all
// NOTE: rows 4096 bytes or a multiple apart all fall into the same sets of L1; so prepared rows are kept a line further.
constexpr long PAD = 64;
constexpr long ROW_BYTES = 4096;  // of one token's activations, used before going on along K
// Bytes to prefetch ahead: for several tokens at least, for a single one, whose weights are one stream, exactly.
constexpr long ROWS_AHEAD = 8 * 1024, ROWS_AHEAD_ALONE = 8 * 1024;

struct Finish {  // adds the bias and writes in the output's dtype
  const Linear& job;

  template <class T> void write(const Float4 out[], int rows, long m, long n) const {
    const long count = min_l(4, job.N - n);
    Float4 bias = {};
    if (job.bias)
      for (long j = 0; j < count; ++j) bias[j] = read_any(job.bias, job.bias_type, n + j);
    T* y = static_cast<T*>(job.y) + m * job.ldy + n;
    for (int i = 0; i < rows; ++i, y += job.ldy) {
      const Float4 v = out[i] + bias;
      if (count == 4) store4(y, v);
      else
        for (long j = 0; j < count; ++j) from_float(y + j, v[j]);
    }
  }
  void operator()(const Float4 out[], int rows, long m, long n) const {
    if (job.xtype == F32) write<float>(out, rows, m, n);
    else if (job.xtype == BF16) write<bf16>(out, rows, m, n);
    else write<f16>(out, rows, m, n);
  }
};

// A tile of `rows` <= R tokens, whatever its height.
template <class Tile, int R>
static void tile_of(int rows, const Tiles& t, const Finish& done, long n, long m, const Range& range) {
  if (rows == R) {
    Float4 out[R];
    if (Tile::template run<R>(t, n, m, range, out)) done(out, R, m, n);
  } else if constexpr (R > 1) {
    tile_of<Tile, R - 1>(rows, t, done, n, m, range);
  }
}

template <class Tile> struct Multiply {
  static constexpr long SAVED = Tile::ROWS_MAX * 4 * sizeof(F);  // bytes of a tile's accumulators
  const Linear& job;
  const Tiles& t;
  const long quads = ceil_div(t.N, 4), tiles = ceil_div(job.M, Tile::ROWS_MAX);
  const bool small = job.M <= SMALL;
  // Elements of K at a time: of one token all, of more what stays in L1 while many channels pass.
  const long range = job.M == 1 ? t.K : min_l(t.K, ROW_BYTES / Tile::ELEMENT_BYTES);

  long first_row(long i) const { return job.M * i / tiles; }  // tiles of nearly equal height
  void run(long quad, long i, const Range& r) const {
    tile_of<Tile, Tile::ROWS_MAX>(int(first_row(i + 1) - first_row(i)), t, Finish{job}, 4 * quad, first_row(i), r);
  }

  // How far behind the weights of this range those lie that are wanted next; 0 at the end.
  long ahead(long quad) const {
    if (job.M == 1 && Tile::ONE_STREAM) return ROWS_AHEAD_ALONE;
    const long later = ceil_div(ROWS_AHEAD, 4 * t.w_bytes * range / t.K);
    return quad + later < quads - 1 ? later * 4 * t.w_bytes : 0;
  }

  // Few tokens: weights come from memory; a range of four rows serves all tokens while it is in L1.
  void few(long first, long last) const {
    char* saved = static_cast<char*>(scratch(TASK, size_t((last - first) * tiles * SAVED)));
    for (long k = 0; k < t.K; k += range)
      for (long quad = first; quad < last; ++quad)
        for (long i = 0; i < tiles; ++i) {
          unsigned fetch = 0;
          for (long j = 0; j < 4; ++j) fetch |= unsigned(j % tiles == i) << j;
          run(quad, i, {k, min_l(t.K, k + range), saved + ((quad - first) * tiles + i) * SAVED, fetch, ahead(quad)});
        }
  }

  // Many tokens: a tile of them stays in L1 for a range and meets the task's weights in L2.
  void many(long first, long last) const {
    char* saved = static_cast<char*>(scratch(TASK, size_t((last - first) * SAVED)));
    for (long i = 0; i < tiles; ++i)
      for (long k = 0; k < t.K; k += range)
        for (long quad = first; quad < last; ++quad)
          run(quad, i, {k, min_l(t.K, k + range), saved + (quad - first) * SAVED, 0, 0});
  }

  void operator()() const {
    long per_task = max_l(1, (small ? TASK_BYTES : TASK_BYTES_MANY) / (4 * t.w_bytes));
    per_task = min_l(per_task, max_l(1, ceil_div(quads, 4L * num_threads())));
    parallel(ceil_div(quads, per_task), double(t.N) * double(t.K) * double(job.M), [&](long task) {
      const long first = task * per_task, last = min_l(quads, first + per_task);
      if (small) few(first, last);
      else many(first, last);
    });
  }
};

template <class Tile> static void multiply(const Linear& job, const Tiles& t) { Multiply<Tile>{job, t}(); }

// x as rows of X (its own type, or widened to float), padded with zeros to a multiple of STEP; in place where possible.
template <class X, class T> static void prepare_float(const Linear& job, long step, Tiles* t) {
  const T* x = static_cast<const T*>(job.x);
  const bool clash = job.M > 1 && job.ldx * long(sizeof(T)) % 4096 == 0;
  if (sizeof(X) == sizeof(T) && job.K % step == 0 && !clash) {
    t->x = x;
    t->ldx = job.ldx;
    return;
  }
  const long padded = round_up(job.K, step), ldx = padded + PAD / long(sizeof(X));
  X* rows = static_cast<X*>(scratch(ACTIVATIONS, size_t(job.M * ldx) * sizeof(X)));
  parallel(job.M, double(job.M * job.K), [&](long m) {
    X* row = rows + m * ldx;
    if constexpr (sizeof(X) == sizeof(T)) {
      memcpy(row, x + m * job.ldx, size_t(job.K) * sizeof(X));
      memset(row + job.K, 0, size_t(padded - job.K) * sizeof(X));
    } else {
      for (long k = 0; k < padded; k += LANES) f_store(row + k, load_n(x + m * job.ldx + k, max_l(0, min_l(LANES, job.K - k))));
    }
  });
  t->x = rows;
  t->ldx = ldx;
}

static void linear(const Linear& job) {
  if (job.kind != W_FLOAT) return linear_int(job);
  Tiles t{};
  t.w = static_cast<const char*>(job.w);
  t.N = job.N;
  t.K = job.K;
  t.w_bytes = job.K * (job.xtype == F32 ? 4 : 2);
#ifdef SF_DOT_BF16
  if (job.xtype == BF16) {
    prepare_float<bf16, bf16>(job, BF16_STEP, &t);
    return multiply<DenseTile<Bf16Tile, bf16>>(job, t);
  }
#endif
  with_type(job.xtype, [&](auto zero) {
    typedef decltype(zero) T;
    prepare_float<float, T>(job, LANES, &t);
    multiply<DenseTile<FloatTile<T>, T>>(job, t);
  });
}

}  // namespace SF_ISA
}  // namespace sf
