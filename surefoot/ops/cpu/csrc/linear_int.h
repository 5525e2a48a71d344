// Linear layers with int8 and int4 weights, from one token to many: panels of 16 channels (panels.h) against tiles of
// tokens (linear_tokens.h).
//
// Integers are exact within a segment of K; segments are scaled and added in fp32 in the order of K. So a token's result
// depends on nothing but its own activations: it has the same bits in any batch, tile and instruction set width.
#pragma once
#include "linear_tokens.h"

namespace sf {
namespace SF_ISA {

constexpr long VECTORS = PANEL / LANES;  // vectors of a panel
// Weights per task, at most: for one tile a fair share of a thread's work; for several what stays in a core's L2.
constexpr long TASK_BYTES = 512 * 1024, TASK_BYTES_MANY = 256 * 1024;
constexpr long AHEAD = 4096, AHEAD_MANY = 1024;  // bytes to prefetch ahead in a panel
constexpr long SCALES_AHEAD = 512;

// acc[R][P panels] += products of `words` words.
template <class Kind, int R, int P>
static SF_INLINE void dots(const char* panel, long panel_bytes, const int32_t* a, long words, long ahead,
                           I acc[R][P * VECTORS]) {
  constexpr int V = P * VECTORS;
  I part[R][V];
  SF_UNROLL for (int m = 0; m < R; ++m)
    SF_UNROLL for (int v = 0; v < V; ++v) part[m][v] = acc[m][v];
  for (long k = 0; k < words; ++k, panel += PANEL * 4, a += Kind::WORDS * R) {
    I w[V][Kind::WORDS];
    SF_UNROLL for (int p = 0; p < P; ++p) {
      prefetch(panel + p * panel_bytes + ahead);
      SF_UNROLL for (int v = 0; v < VECTORS; ++v)
        Kind::split(i_load(reinterpret_cast<const int32_t*>(panel + p * panel_bytes) + v * LANES), w[p * VECTORS + v]);
    }
    SF_UNROLL for (int j = 0; j < Kind::WORDS; ++j)
      SF_UNROLL for (int m = 0; m < R; ++m) {
        const I token = i_repeat(a + j * R + m);
        SF_UNROLL for (int v = 0; v < V; ++v) part[m][v] = Kind::dot(part[m][v], w[v][j], token);
      }
  }
  SF_UNROLL for (int m = 0; m < R; ++m)
    SF_UNROLL for (int v = 0; v < V; ++v) acc[m][v] = part[m][v];
}

template <class Kind, int R, int P>
static SF_INLINE void segment(const char* panel, long panel_bytes, const int32_t* a, long words, long ahead,
                              I acc[R][P * VECTORS]) {
#ifdef SF_SHORT_SUMS
  if constexpr (sizeof(typename Kind::X) == 1) {  // int4 by int8: 4 words stay within 16 bits, 8 x 2 x 15 x 127
    for (long k = 0; k < words; k += 4) {
      I part[R][P * VECTORS];
      SF_UNROLL for (int m = 0; m < R; ++m)
        SF_UNROLL for (int v = 0; v < P * VECTORS; ++v) part[m][v] = i_zero();
      dots<Kind, R, P>(panel + k * PANEL * 4, panel_bytes, a + k * Kind::WORDS * R, min_l(4, words - k), ahead, part);
      SF_UNROLL for (int m = 0; m < R; ++m)
        SF_UNROLL for (int v = 0; v < P * VECTORS; ++v) acc[m][v] = short_fold(acc[m][v], part[m][v]);
    }
    return;
  }
#endif
  dots<Kind, R, P>(panel, panel_bytes, a, words, ahead, acc);
}

template <class Kind, bool SCALED, bool BLOCKS> struct IntLinear {
  static constexpr int ROWS_MAX = int_rows(SCALED);
  const Linear& job;
  const Tokens<Kind, SCALED, BLOCKS> t;
  const long panels = ceil_div(job.N, PANEL), panel_bytes = t.words * PANEL * 4;
  const long groups = job.kind == W_INT4 ? job.K / job.group : 1;

  // The weights of a task as panels, in place if they are packed.
  struct Weights {
    const char* w;
    const char* scale; int scale_type;  // int4: [panels][groups][PANEL]; int8: [panels][PANEL]
    long scale_bytes;                   // of a panel
  };

  // LANES scales, at element i of a panel.
  SF_INLINE F scales_at(const Weights& w, long panel, long i) const {
    const char* p = w.scale + panel * w.scale_bytes;
    if (w.scale_type == BF16) return load(reinterpret_cast<const bf16*>(p) + i);
    if (w.scale_type == F16) return load(reinterpret_cast<const f16*>(p) + i);
    return load(reinterpret_cast<const float*>(p) + i);
  }

  template <int R, int P> void tile(const Weights& w, long panel, long n, long m0, long ahead) const {
    constexpr int V = P * VECTORS;
    const char* rows = w.w + panel * panel_bytes;
    const int32_t* a = t.tile_words(m0);
    const int32_t* start = t.tile_starts(m0);
    F total[R][V];
    SF_UNROLL for (int m = 0; m < R; ++m)
      SF_UNROLL for (int v = 0; v < V; ++v) total[m][v] = f_zero();
    const long segment_words = t.segment_k / Kind::PER_WORD, per_group = job.group / t.segment_k;
    const long per_block = BLOCK / t.segment_k;
    long group = 0, in_group = 0, block = 0, in_block = 0;
    for (long left = t.words; left > 0; start += R) {
      const long count = min_l(left, segment_words);
      I acc[R][V];
      SF_UNROLL for (int m = 0; m < R; ++m) {
        const I zero = Kind::OFFSET ? i_repeat(start + m) : i_zero();
        SF_UNROLL for (int v = 0; v < V; ++v) acc[m][v] = zero;
      }
      const auto run = [&](long n, long far) SF_INLINE_LAMBDA {
        segment<Kind, R, P>(rows, panel_bytes, a, n, far, acc);
        rows += n * PANEL * 4;
        a += n * Kind::WORDS * R;
        left -= n;
      };
      // What lies ahead of the end of the last panel is the next one; of the others it is in use already.
      const long near = left - ahead / (PANEL * 4), beyond = ahead + (P - 1) * panel_bytes;
      if constexpr (SCALED) {
        run(count, near > 0 ? ahead : beyond);
      } else {
        run(max_l(0, min_l(count, near)), ahead);
        run(left, beyond);
      }
      F scale[V];
      if (SCALED && Kind::PER_WORD == 8) {
        SF_UNROLL for (int p = 0; p < P; ++p) prefetch(w.scale + (panel + p) * w.scale_bytes + group * PANEL * 2 + SCALES_AHEAD);
        SF_UNROLL for (int v = 0; v < V; ++v)
          scale[v] = scales_at(w, panel + v / VECTORS, group * PANEL + v % VECTORS * LANES);
        if (++in_group == per_group) ++group, in_group = 0;
      }
      SF_UNROLL for (int m = 0; m < R; ++m) {
        const F x = BLOCKS ? f_set(t.scale(m0 + m, block)) : f_zero();
        SF_UNROLL for (int v = 0; v < V; ++v) {
          const F sum = i_to_f(acc[m][v]);
          if constexpr (!SCALED) total[m][v] = sum;
          else total[m][v] = f_fma(sum, Kind::PER_WORD == 4 ? x : BLOCKS ? f_mul(scale[v], x) : scale[v], total[m][v]);
        }
      }
      if (BLOCKS && ++in_block == per_block) ++block, in_block = 0;
    }
    with_type(job.xtype, [&](auto zero) {
      for (int v = 0; v < V; ++v) finish<decltype(zero), R, V>(total, w, panel + v / VECTORS, m0, n + v * LANES, v);
    });
  }

  template <class T, int R, int V> void finish(const F total[R][V], const Weights& w, long panel, long m0, long n, int v) const {
    const long count = job.N - n;
    if (count <= 0) return;
    F bias = f_zero();
    if (job.bias) with_type(job.bias_type, [&](auto b) { bias = load_n(static_cast<const decltype(b)*>(job.bias) + n, count); });
    const F channel = Kind::PER_WORD == 4 ? scales_at(w, panel, v % VECTORS * LANES) : f_set(1.0f);
    for (int m = 0; m < R; ++m) {
      const F x = f_set(BLOCKS ? 1.0f : t.scale(m0 + m, 0));
      store_n(static_cast<T*>(job.y) + (m0 + m) * job.ldy + n, f_add(f_mul(total[m][v], f_mul(x, channel)), bias), count);
    }
  }

  // A tile of `rows` <= R tokens, whatever its height, against `count` panels.
  template <int R> void rows_of(long rows, const Weights& w, long count, long n, long m0, long ahead) const {
    if (rows != R) {
      if constexpr (R > 1) rows_of<R - 1>(rows, w, count, n, m0, ahead);
      return;
    }
    constexpr int P = int_panels(R);
    long p = 0;
    for (; p + P <= count; p += P) tile<R, P>(w, p, n + p * PANEL, m0, ahead);
    if constexpr (P > 1)
      for (; p < count; ++p) tile<R, 1>(w, p, n + p * PANEL, m0, ahead);
  }

  // Panels [first, last) of weights that lie in rows.
  Weights pack(long first, long last) const {
    const long row_bytes = ceil_div(job.K * (Kind::PER_WORD == 8 ? 4 : 8), 8), count = last - first;
    char* packed = static_cast<char*>(scratch(TASK, size_t(count * panel_bytes)));
    float* scale = static_cast<float*>(scratch(TASK_2, size_t(count * groups * PANEL) * 4));
    for (long p = 0; p < count; ++p) {
      const char* rows[PANEL];
      for (long j = 0; j < PANEL; ++j) {
        const long channel = min_l((first + p) * PANEL + j, job.N - 1);
        rows[j] = static_cast<const char*>(job.w) + channel * row_bytes;
        for (long g = 0; g < groups; ++g)
          scale[(p * groups + g) * PANEL + j] = read_any(job.wscale, job.scale_type, channel * groups + g);
      }
      interleave(rows, PANEL, row_bytes, packed + p * panel_bytes, PANEL);
    }
    return {packed, reinterpret_cast<char*>(scale), F32, groups * PANEL * 4};
  }

  void task(long first, long last) const {
    const long scale_bytes = groups * PANEL * (job.scale_type == F32 ? 4 : 2);
    const Weights w = job.packed ? Weights{static_cast<const char*>(job.w) + first * panel_bytes,
                                           static_cast<const char*>(job.wscale) + first * scale_bytes, job.scale_type,
                                           scale_bytes}
                                 : pack(first, last);
    for (long i = 0; i < t.tiles; ++i)
      rows_of<ROWS_MAX>(t.first_row(i + 1) - t.first_row(i), w, last - first, first * PANEL, t.first_row(i),
                          i ? AHEAD_MANY : AHEAD);
  }

  void operator()() const {
    long per_task = max_l(2, (t.tiles == 1 ? TASK_BYTES : TASK_BYTES_MANY) / panel_bytes / 2 * 2);
    per_task = min_l(per_task, max_l(2, ceil_div(panels, 4L * num_threads())));
    parallel(ceil_div(panels, per_task), double(job.N) * double(job.K) * double(job.M),
             [&](long i) { task(i * per_task, min_l(panels, (i + 1) * per_task)); });
  }
};

template <class Kind, bool SCALED, bool BLOCKS> static void int_linear(const Linear& job, long segment_k) {
  IntLinear<Kind, SCALED, BLOCKS>{job, {job, segment_k}}();
}

static void linear_int(const Linear& job) {
  const long whole = round_up(job.K, 64);
  if (job.kind == W_INT8)
    return job.act_bits == 16 ? int_linear<Int8By16, true, true>(job, BLOCK) : int_linear<Int8By8, false, false>(job, whole);
  if (job.act_bits == 8) return int_linear<Int4By8, true, false>(job, job.group);
  long segment = job.group, rest = BLOCK;  // to their greatest common divisor
  while (rest) {
    const long next = segment % rest;
    segment = rest;
    rest = next;
  }
  int_linear<Int4By16, true, true>(job, segment);
}

}  // namespace SF_ISA
}  // namespace sf
