// Causal attention over paged keys and values, with an online softmax; sums are in fp32.
//
// A request with at most FEW new tokens (decode) is split into parts of PART cached tokens; one with more (prefill) into
// blocks of query tokens. Both walk the cache in blocks of BT tokens counted from its start, begin the softmax anew at
// every part and add up in the same order, so a token's result does not depend on the other requests, on the number of
// threads, or on how a prompt was cut into chunks.
#pragma once
#include "attention_decode.h"
#include "attention_prefill.h"

namespace sf {
namespace SF_ISA {

constexpr long FEW = 4, RUN = 8;  // RUN: blocks that a task has, if there are enough

template <class T> struct Job {
  const Attention& a;
  long group, Dp;
  Pages<T> pages(long request, long head) const {
    const long h = head * a.D;
    return {static_cast<const T*>(a.k) + h, static_cast<const T*>(a.v) + h, a.block_table + request * a.max_blocks, a.block_size,
            a.Hk * a.D};
  }
  long tokens(long request) const { return a.starts[request + 1] - a.starts[request]; }
  bool few(long request) const { return tokens(request) > 0 && tokens(request) <= FEW; }
  long parts(long request) const { return ceil_div(a.lens[request], PART); }
  Partial partial(float* at, long request, long part) const {
    const long rows = tokens(request) * group;
    return Partial(at + part * Partial::floats(a.Hk, rows, Dp), a.Hk, rows, Dp);
  }
  // Row r of a KV head is token r / group and head r % group of it.
  long offset(long row0, long kv_head, long r, long ld) const {
    return (row0 + r / group) * ld + (kv_head * group + r % group) * a.D;
  }
  const T* query(long row0, long kv_head, long r) const { return static_cast<const T*>(a.q) + offset(row0, kv_head, r, a.ldq); }
  T* out(long row0, long kv_head, long r) const { return static_cast<T*>(a.out) + offset(row0, kv_head, r, a.H * a.D); }
};

// Query tokens [begin, begin + n) of a request's new ones, all heads of one KV head.
template <class P, class T> static void prefill_block(const Job<T>& j, long request, long kv_head, long begin, long n) {
  const long row0 = j.a.starts[request] + begin, first = j.a.lens[request] - (j.a.starts[request + 1] - row0);
  prefill_rows<P>(j.pages(request, kv_head), first, n, j.group, j.a.scale, j.a.D,
                  [&](long r) { return j.query(row0, kv_head, r); }, [&](long r) { return j.out(row0, kv_head, r); });
}

// The parts of all decodes, one after another: those of request i are [cell[i], cell[i + 1]), their sums begin at
// partial + sums[i].
struct Parts {
  const long *cell, *sums;
  float* partial;
};

struct Block {  // tokens [t0, t0 + valid) of a request; at: where their rows are
  long request, t0, valid, at[BT];
};

template <class T> static void find_block(const Job<T>& j, Block& b) {
  b.valid = min_l(BT, j.a.lens[b.request] - b.t0);
  j.pages(b.request, 0).find(b.t0, b.valid, b.at);
}

// The block after `b`, if it belongs to a part before `end`.
template <class T> static bool following(const Job<T>& j, const Parts& p, long end, const Block& b, Block& next) {
  next.request = b.request;
  next.t0 = b.t0 + BT;
  if (next.t0 >= j.a.lens[b.request]) {
    next.t0 = 0;
    do ++next.request;
    while (next.request < j.a.N && !j.few(next.request));
  }
  if (next.request == j.a.N || p.cell[next.request] + next.t0 / PART >= end) return false;
  find_block(j, next);
  return true;
}

// Parts [begin, end), KV heads [head, head + heads).
template <class P, class T>
static void decode_parts(const Job<T>& j, const Parts& p, long begin, long end, long head, long heads) {
  const Attention& a = j.a;
  const DecodeSpace<P> w(heads, FEW * j.group, j.Dp);
  Block blocks[2];
  blocks[0].request = 0;
  while (p.cell[blocks[0].request + 1] <= begin) ++blocks[0].request;
  blocks[0].t0 = (begin - p.cell[blocks[0].request]) * PART;
  find_block(j, blocks[0]);
  Lookahead ahead;
  ahead.set(j.pages(blocks[0].request, head), blocks[0].at, blocks[0].valid, heads * a.D);
  ahead.read();
  bool more = true;
  for (int now = 0; more; now ^= 1) {
    const Block &b = blocks[now], &next = blocks[now ^ 1];
    more = following(j, p, end, b, blocks[now ^ 1]);
    if (more) ahead.set(j.pages(next.request, head), next.at, next.valid, heads * a.D);
    else ahead = Lookahead();
    const long i = b.request, row0 = a.starts[i], parts = j.parts(i);
    const Partial sums = j.partial(p.partial + p.sums[i], i, b.t0 / PART);
    if (b.t0 % PART == 0) begin_part<P>(w, sums, head, heads, a.D, [&](long h, long r) { return j.query(row0, h, r); });
    decode_block<P>(w, j.pages(i, head), sums, head, heads, b.t0, b.valid, b.at, a.lens[i] - j.tokens(i), j.group, a.D, a.scale,
                    &ahead);
    if (parts > 1 || b.t0 + BT < a.lens[i]) continue;
    for (long h = head; h < head + heads; ++h)
      for (long r = 0; r < sums.rows; ++r) merge_parts(sums, 1, h, r, a.scale, a.D, j.out(row0, h, r));
  }
}

template <class P, class T> static void attention_of(const Attention& a) {
  const Job<T> j{a, a.H / a.Hk, ceil_div(a.D, LANES) * LANES};
  const long block = max_l(1, TILES * TILE / j.group);
  // Prefill tasks of request i start at first[i].
  long* first = static_cast<long*>(scratch(SCALES, size_t(3 * (a.N + 1)) * sizeof(long)));
  long *cell = first + a.N + 1, *sums = cell + a.N + 1, blocks = 0, long_ones = 0;
  first[0] = cell[0] = sums[0] = 0;
  double work = 0;
  for (long i = 0; i < a.N; ++i) {
    const long n = j.tokens(i), parts = j.few(i) ? j.parts(i) : 0;
    first[i + 1] = first[i] + (j.few(i) ? 0 : ceil_div(n, block) * a.Hk);
    cell[i + 1] = cell[i] + parts;
    sums[i + 1] = sums[i] + parts * Partial::floats(a.Hk, n * j.group, j.Dp);
    blocks += j.few(i) ? ceil_div(a.lens[i], BT) : 0;
    long_ones += parts > 1 ? parts : 0;
    work += double(n) * double(a.lens[i]) * double(a.H * a.D);
  }
  // A decode task: some parts, as many as make RUN blocks, of all KV heads, unless that leaves threads without work.
  const long cells = cell[a.N], threads = num_threads();
  const long wanted = max_l(threads, min_l(4 * threads, blocks / RUN)), run = max_l(1, cells / wanted);
  const long runs = ceil_div(cells, run), heads = max_l(1, min_l(a.Hk, runs * a.Hk / wanted)), spans = ceil_div(a.Hk, heads);
  const Parts p{cell, sums, static_cast<float*>(scratch(PARTIAL, size_t(sums[a.N]) * 4))};
  parallel(first[a.N] + runs * spans, work, [&](long index) {
    const long task = first[a.N] - 1 - index;  // a prompt's last tokens see most: they begin
    if (task < 0) {
      const long k = index - first[a.N], begin = k / spans * run, head = k % spans * heads;
      return decode_parts<P>(j, p, begin, min_l(cells, begin + run), head, min_l(heads, a.Hk - head));
    }
    long i = 0;
    while (first[i + 1] <= task) ++i;
    const long k = task - first[i];
    prefill_block<P>(j, i, k % a.Hk, k / a.Hk * block, min_l(block, j.tokens(i) - k / a.Hk * block));
  });
  if (long_ones == 0) return;
  parallel(a.N * a.Hk, double(long_ones * a.H * j.Dp), [&](long task) {
    const long i = task / a.Hk, h = task % a.Hk;
    if (!j.few(i) || j.parts(i) == 1) return;
    const Partial all = j.partial(p.partial + sums[i], i, 0);
    for (long r = 0; r < all.rows; ++r) merge_parts(all, j.parts(i), h, r, a.scale, a.D, j.out(a.starts[i], h, r));
  });
}

static void attention(const Attention& a) {
#ifdef SF_DOT_BF16
  if (a.dtype == BF16 && a.D % BF16_STEP == 0) return attention_of<Bf16Products, bf16>(a);
#endif
  with_type(a.dtype, [&](auto zero) {
    typedef decltype(zero) T;
    attention_of<Fp32Products<T>, T>(a);
  });
}

}  // namespace SF_ISA
}  // namespace sf
