// Tiles of the linear kernels: R tokens x 4 output channels, dot products along K with both sides row by row.
//
// A long K is taken in ranges [k0, k1), so that the tokens of a tile stay in L1 while many channels pass; in between the
// accumulators wait in memory as they are. Every output is summed in one order that depends on K alone, so a token gets
// the same bits in any batch. A single token takes the channels one after another, which reads memory as one stream.
// Activations are padded with zeros to a multiple of the step; weights are not, and their last partial step is copied.
#pragma once
#include "quantise.h"

namespace sf {
namespace SF_ISA {

// What the tiles see of a job: prepared activations and weight rows.
struct Tiles {
  const char* w; long w_bytes;            // bytes of one weight row
  const void* x; long ldx;                // prepared activations, elements per row
  long N, K;
};

// What one call of a tile does: elements [k0, k1) of K.
struct Range {
  long k0, k1;
  void* saved;     // R x 4 vectors for the accumulators; not touched if the range is all of K
  // Weights that are needed next lie `ahead` bytes behind those in use; bit j of `fetch` says that this tile is to bring in
  // row j of them, each line while its neighbour is used. The tiles of tokens share this, so memory is busy during all.
  unsigned fetch;
  long ahead;
  long distance(int j) const { return fetch >> j & 1 ? ahead : 0; }
};

// Four weight rows from channel n on (the last one repeated at the end), walked STEP elements at a time.
//
// NOTE: the last partial step is copied before any accumulator is live (vector registers do not survive the call of memcpy)
// and goes through the one loop: otherwise GCC keeps the accumulators in memory, which costs two thirds of the speed.
template <class W, int STEP> class Rows {
 public:
  SF_INLINE Rows(const Tiles& t, long n, const Range& range) : whole_(t.K / STEP * STEP) {
    SF_UNROLL for (int j = 0; j < 4; ++j) p_[j] = reinterpret_cast<const W*>(t.w + min_l(n + j, t.N - 1) * t.w_bytes);
    SF_UNROLL for (int j = 0; j < 4; ++j) ahead_[j] = range.distance(j);
    if (whole_ < t.K) {
      memset(rest_, 0, sizeof rest_);
      for (int j = 0; j < 4; ++j) memcpy(rest_[j], p_[j] + whole_, size_t(t.K - whole_) * sizeof(W));
    }
  }

  // body(weights of C rows from row c on, k) for each step in [k, end); behind the end of a row the weights are zero.
  template <int C, class Body> SF_INLINE void walk(int c, long k, long end, const Body& body) const {
    const W* w[C];
    SF_UNROLL for (int j = 0; j < C; ++j) w[j] = p_[c + j] + k;
    for (; k < end; k += STEP) {
      if (k == whole_) {
        SF_UNROLL for (int j = 0; j < C; ++j) w[j] = rest_[c + j];
      }
      SF_UNROLL for (int j = 0; j < C; ++j) prefetch(reinterpret_cast<const char*>(w[j]) + ahead_[c + j]);
      body(w, k);
      SF_UNROLL for (int j = 0; j < C; ++j) w[j] += STEP;
    }
  }

 private:
  const W* p_[4];
  long whole_, ahead_[4];
  W rest_[4][STEP];
};

template <int R, class V, class Zero> static SF_INLINE void resume(V acc[R][4], const Range& r, const Zero& zero) {
  SF_UNROLL for (int m = 0; m < R; ++m)
    SF_UNROLL for (int j = 0; j < 4; ++j) acc[m][j] = zero();
  if (r.k0 == 0) return;
  const V* from = static_cast<const V*>(r.saved);
  SF_UNROLL for (int m = 0; m < R; ++m)
    SF_UNROLL for (int j = 0; j < 4; ++j) acc[m][j] = from[m * 4 + j];
}
template <int R, class V> static SF_INLINE bool suspend(const V acc[R][4], const Range& r, long K) {
  if (r.k1 >= K) return false;
  V* to = static_cast<V*>(r.saved);
  SF_UNROLL for (int m = 0; m < R; ++m)
    SF_UNROLL for (int j = 0; j < 4; ++j) to[m * 4 + j] = acc[m][j];
  return true;
}

// Channels that R tokens take at once. One stream is best for memory if its one chain of sums keeps up; tall tiles have
// registers for two.
template <class Tile, int R> constexpr int COLUMNS = R == 1 && Tile::ONE_STREAM ? 1 : R > ROWS_OF_4 ? 2 : 4;

// acc[.][c ...] += products of C channels: accumulators are taken out, so that they stay in registers.
template <int R, int C, class V, class Body> static SF_INLINE void columns(V acc[R][4], const Body& body) {
  SF_UNROLL for (int c = 0; c < 4; c += C) {
    V part[R][C];
    SF_UNROLL for (int m = 0; m < R; ++m)
      SF_UNROLL for (int j = 0; j < C; ++j) part[m][j] = acc[m][c + j];
    body(part, c);
    SF_UNROLL for (int m = 0; m < R; ++m)
      SF_UNROLL for (int j = 0; j < C; ++j) acc[m][c + j] = part[m][j];
  }
}

template <class W> struct FloatTile {  // fp32, bf16 or fp16 weights, widened; fp32 activations
  typedef float X;
  static constexpr int STEP = LANES;

  template <int R, int C> static SF_INLINE void step(F acc[R][C], const W* const w[C], const float* x, long ldx) {
    F b[C];
    SF_UNROLL for (int j = 0; j < C; ++j) b[j] = load(w[j]);
    SF_UNROLL for (int m = 0; m < R; ++m) {
      const F a = f_load(x + m * ldx);
      SF_UNROLL for (int j = 0; j < C; ++j) acc[m][j] = f_fma(a, b[j], acc[m][j]);
    }
  }
};

#ifdef SF_DOT_BF16
struct Bf16Tile {  // bf16 weights and activations as they are
  typedef bf16 X;
  static constexpr int STEP = BF16_STEP;

  template <int R, int C> static SF_INLINE void step(F acc[R][C], const bf16* const w[C], const bf16* x, long ldx) {
    I b[C];
    SF_UNROLL for (int j = 0; j < C; ++j) b[j] = bf16_load(w[j]);
    SF_UNROLL for (int m = 0; m < R; ++m) {
      const I a = bf16_load(x + m * ldx);
      SF_UNROLL for (int j = 0; j < C; ++j) acc[m][j] = dot_bf16(acc[m][j], b[j], a);
    }
  }
};
#endif

template <class Kind, class W> struct DenseTile {
  static constexpr int ROWS_MAX = ROWS;
  static constexpr long ELEMENT_BYTES = sizeof(typename Kind::X);
  static constexpr bool ONE_STREAM = Kind::STEP * sizeof(W) >= 32;  // bytes per step of the chain
  typedef typename Kind::X X;

  template <int R> static bool run(const Tiles& t, long n, long m0, const Range& range, Float4 out[]) {
    constexpr int STEP = Kind::STEP;
    const Rows<W, STEP> rows(t, n, range);
    const X* x = static_cast<const X*>(t.x) + m0 * t.ldx;
    F acc[R][4];
    resume<R>(acc, range, f_zero);
    constexpr int C = COLUMNS<DenseTile, R>;
    columns<R, C>(acc, [&](F part[R][C], int c) SF_INLINE_LAMBDA {
      rows.template walk<C>(c, range.k0, range.k1, [&](const W* const w[C], long k) SF_INLINE_LAMBDA {
        Kind::template step<R, C>(part, w, x + k, t.ldx);
      });
    });
    if (suspend<R>(acc, range, t.K)) return false;
    SF_UNROLL for (int m = 0; m < R; ++m) out[m] = f_hsum4(acc[m][0], acc[m][1], acc[m][2], acc[m][3]);
    return true;
  }
};

}  // namespace SF_ISA
}  // namespace sf
