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
  const float* scales; long blocks;       // their scales [M, blocks]
  const int32_t* sums; long sums_per_row;
  const void* wscale; long groups;        // per-channel or [N, groups]
  long N, K, group;
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

static SF_INLINE Float4 channel_scales(const Tiles& t, long n) {
  const float* scale = static_cast<const float*>(t.wscale);
  Float4 four;
  SF_UNROLL for (int j = 0; j < 4; ++j) four[j] = scale[min_l(n + j, t.N - 1)];
  return four;
}

struct Int8Tile {  // int8 weights, int8 activations: exact integers, scaled once at the end
  typedef A8 X;
  static constexpr int ROWS_MAX = ROWS;
  static constexpr long ELEMENT_BYTES = sizeof(X);
  static constexpr bool ONE_STREAM = true;

  template <int R, int C> static SF_INLINE void step(I acc[R][C], const int8_t* const w[C], const A8* x, long ldx) {
    W8 b[C];
    SF_UNROLL for (int j = 0; j < C; ++j) b[j] = w8_load(w[j]);
    SF_UNROLL for (int m = 0; m < R; ++m) {
      const auto a = a8_load(x + m * ldx);
      SF_UNROLL for (int j = 0; j < C; ++j) acc[m][j] = dot_a8(acc[m][j], b[j], a);
    }
  }

  template <int R> static bool run(const Tiles& t, long n, long m0, const Range& range, Float4 out[]) {
    const Rows<int8_t, A8_STEP> rows(t, n, range);
    const A8* x = static_cast<const A8*>(t.x) + m0 * t.ldx;
    I acc[R][4];
    resume<R>(acc, range, i_zero);
    constexpr int C = COLUMNS<Int8Tile, R>;
    columns<R, C>(acc, [&](I part[R][C], int c) SF_INLINE_LAMBDA {
      rows.walk<C>(c, range.k0, range.k1, [&](const int8_t* const w[C], long k) SF_INLINE_LAMBDA {
        step<R, C>(part, w, x + k, t.ldx);
      });
    });
    if (suspend<R>(acc, range, t.K)) return false;
    const Float4 scale = channel_scales(t, n);
    SF_UNROLL for (int m = 0; m < R; ++m) {
      const Int4 sums = i_hsum4(acc[m][0], acc[m][1], acc[m][2], acc[m][3]) - t.sums[m0 + m];
      out[m] = __builtin_convertvector(sums, Float4) * (t.scales[m0 + m] * scale);
    }
    return true;
  }
};

struct Int8WideTile {  // int8 weights, int16 activations: exact integers within a block, then fp32
  typedef int16_t X;
  static constexpr int ROWS_MAX = ROWS;
  static constexpr long ELEMENT_BYTES = sizeof(X);
  static constexpr bool ONE_STREAM = true;

  template <int R, int C> static SF_INLINE void step(I acc[R][C], const int8_t* const w[C], const int16_t* x, long ldx) {
    W16 b[C];
    SF_UNROLL for (int j = 0; j < C; ++j) b[j] = w16_load(w[j]);
    SF_UNROLL for (int m = 0; m < R; ++m) {
      const auto a = a16_load(x + m * ldx);
      SF_UNROLL for (int j = 0; j < C; ++j) acc[m][j] = dot_a16(acc[m][j], b[j], a);
    }
  }

  template <int R> static bool run(const Tiles& t, long n, long m0, const Range& range, Float4 out[]) {
    const Rows<int8_t, A16_STEP> rows(t, n, range);
    const int16_t* x = static_cast<const int16_t*>(t.x) + m0 * t.ldx;
    F total[R][4];
    resume<R>(total, range, f_zero);
    constexpr int C = COLUMNS<Int8WideTile, R>;
    columns<R, C>(total, [&](F part[R][C], int c) SF_INLINE_LAMBDA {
      for (long b = range.k0 / BLOCK; b * BLOCK < range.k1; ++b) {
        I acc[R][C];
        SF_UNROLL for (int m = 0; m < R; ++m)
          SF_UNROLL for (int j = 0; j < C; ++j) acc[m][j] = i_zero();
        rows.walk<C>(c, b * BLOCK, min_l(range.k1, (b + 1) * BLOCK), [&](const int8_t* const w[C], long k) SF_INLINE_LAMBDA {
          step<R, C>(acc, w, x + k, t.ldx);
        });
        SF_UNROLL for (int m = 0; m < R; ++m) {
          const F scale = f_set(t.scales[(m0 + m) * t.blocks + b]);
          SF_UNROLL for (int j = 0; j < C; ++j) part[m][j] = f_fma(i_to_f(acc[m][j]), scale, part[m][j]);
        }
      }
    });
    if (suspend<R>(total, range, t.K)) return false;
    const Float4 scale = channel_scales(t, n);
    SF_UNROLL for (int m = 0; m < R; ++m)
      out[m] = f_hsum4(total[m][0], total[m][1], total[m][2], total[m][3]) * scale;
    return true;
  }
};

// One step of int4 weights with int16 activations, each scaled per BLOCK: products of 16 bits.
struct Int4By16 {
  typedef int16_t X;
  static constexpr int ROWS_MAX = W4_ROWS, COLUMNS = W4_COLUMNS;
  static constexpr bool ONE_STREAM = false;  // channels one by one are slower here: their sums wait for each other
  static constexpr bool SCALED_PER_BLOCK = true;

  template <int R, int C>
  static SF_INLINE void step(F acc[R][C], const uint8_t* const w[C], const F scale[C], const Tiles& t, long m0, long s) {
    W16 b[C][4];
    SF_UNROLL for (int j = 0; j < C; ++j) w4_load(w[j], b[j]);
    SF_UNROLL for (int m = 0; m < R; ++m) {
      const int16_t* x = static_cast<const int16_t*>(t.x) + (m0 + m) * t.ldx + s * W4_STEP;
      decltype(a16_load(nullptr)) a[4];
      SF_UNROLL for (int i = 0; i < 4; ++i) a[i] = a16_load(x + i * (W4_STEP / 4));
      const I start = i_load(t.sums + (m0 + m) * t.sums_per_row + s * LANES);
      const F x_scale = f_set(t.scales[(m0 + m) * t.blocks + s * W4_STEP / BLOCK]);
      SF_UNROLL for (int j = 0; j < C; ++j) {
        I sum = start;
        SF_UNROLL for (int i = 0; i < 4; ++i) sum = dot_a16(sum, b[j][i], a[i]);
        acc[m][j] = f_fma(i_to_f(sum), f_mul(scale[j], x_scale), acc[m][j]);
      }
    }
  }
};

#ifdef SF_DOT_INT8
// The same with int8 activations, scaled per token at the end.
struct Int4By8 {
  typedef A8 X;
  static constexpr int ROWS_MAX = W4A8_ROWS, COLUMNS = W4A8_COLUMNS;
  static constexpr bool ONE_STREAM = LANES == 16;
  static constexpr bool SCALED_PER_BLOCK = false;

  template <int R, int C>
  static SF_INLINE void step(F acc[R][C], const uint8_t* const w[C], const F scale[C], const Tiles& t, long m0, long s) {
    W8 b[C][2];
    SF_UNROLL for (int j = 0; j < C; ++j) w4_bytes(w[j], b[j]);
    SF_UNROLL for (int m = 0; m < R; ++m) {
      const A8* x = static_cast<const A8*>(t.x) + (m0 + m) * t.ldx + s * W4_STEP;
      const auto a0 = a8_load(x), a1 = a8_load(x + W4_STEP / 2);
      const I start = i_load(t.sums + (m0 + m) * t.sums_per_row + s * LANES);
      SF_UNROLL for (int j = 0; j < C; ++j)
        acc[m][j] = f_fma(i_to_f(dot_a8(dot_a8(start, b[j][0], a0), b[j][1], a1)), scale[j], acc[m][j]);
    }
  }
};
#endif

template <class S, class Kind> struct Int4Tile {  // int4 weights in groups of 32 or a multiple of 128
  typedef typename Kind::X X;
  static constexpr int ROWS_MAX = Kind::ROWS_MAX;
  static constexpr long ELEMENT_BYTES = 2;  // with the sums, half a byte per element, 1.5 or 2.5
  static constexpr bool ONE_STREAM = Kind::ONE_STREAM;

  static inline F group_scales(const S* scale, long group, long step) {
    if (group == 32) return w4_scales_32(scale + step * (W4_STEP / 32));
    return f_set(to_float(scale[step * W4_STEP / group]));
  }

  template <int R> static bool run(const Tiles& t, long n, long m0, const Range& range, Float4 out[]) {
    const long steps = t.K / W4_STEP, rest = t.K % W4_STEP;
    uint8_t last[4][W4_STEP / 2] = {};
    S last_scales[4][W4_STEP / 32] = {};
    const uint8_t* rows[4];
    const S* scales[4];
    for (int j = 0; j < 4; ++j) {
      const long channel = min_l(n + j, t.N - 1);
      rows[j] = reinterpret_cast<const uint8_t*>(t.w + channel * t.w_bytes);
      scales[j] = static_cast<const S*>(t.wscale) + channel * t.groups;
      memcpy(last[j], rows[j] + steps * (W4_STEP / 2), size_t(rest / 2));
      memcpy(last_scales[j], scales[j] + steps * W4_STEP / t.group, size_t(ceil_div(rest, t.group)) * sizeof(S));
    }
    F total[R][4];
    resume<R>(total, range, f_zero);
    constexpr int C = R == 1 && ONE_STREAM ? 1 : Kind::COLUMNS;
    columns<R, C>(total, [&](F part[R][C], int c) SF_INLINE_LAMBDA {
      const uint8_t* w[C];
      F scale[C];
      for (long s = range.k0 / W4_STEP; s < min_l(steps, range.k1 / W4_STEP); ++s) {
        SF_UNROLL for (int j = 0; j < C; ++j) {
          w[j] = rows[c + j] + s * (W4_STEP / 2);
          prefetch(w[j] + range.distance(c + j));
          scale[j] = group_scales(scales[c + j], t.group, s);
        }
        Kind::template step<R, C>(part, w, scale, t, m0, s);
      }
      if (rest && range.k1 >= t.K) {
        SF_UNROLL for (int j = 0; j < C; ++j) {
          w[j] = last[c + j];
          scale[j] = group_scales(last_scales[c + j], t.group, 0);
        }
        Kind::template step<R, C>(part, w, scale, t, m0, steps);
      }
    });
    if (suspend<R>(total, range, t.K)) return false;
    SF_UNROLL for (int m = 0; m < R; ++m) {
      out[m] = f_hsum4(total[m][0], total[m][1], total[m][2], total[m][3]);
      if (!Kind::SCALED_PER_BLOCK) out[m] *= t.scales[m0 + m];
    }
    return true;
  }
};

}  // namespace SF_ISA
}  // namespace sf
