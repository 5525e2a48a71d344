// Causal attention over paged keys and values, with an online softmax; sums are in fp32.
//
// A request with one new token (decode) is split into parts of PART cached tokens; one with more (prefill) into blocks of
// query tokens. Both walk the cache in blocks of BT tokens counted from its start, so a token's result does not depend on
// the other requests, on the number of threads, or on how a prompt was cut into chunks of more than one token; one alone
// is a decode, whose sums are in another order.
#pragma once
#include "attention_decode.h"
#include "attention_prefill.h"

namespace sf {
namespace SF_ISA {

constexpr long PART = 512;

template <class T> struct Job {
  const Attention& a;
  long group, Dp;
  Pages<T> pages(long request, long head) const {
    return {static_cast<const T*>(a.k), static_cast<const T*>(a.v), a.block_table + request * a.max_blocks, a.block_size, a.Hk,
            a.D, head};
  }
  const T* query(long row, long head) const { return static_cast<const T*>(a.q) + row * a.ldq + head * a.D; }
  T* out(long row, long head) const { return static_cast<T*>(a.out) + (row * a.H + head) * a.D; }
};

template <class P, class T> static void decode_part(const Job<T>& j, long request, long kv_head, long part, float* result) {
  const Pages<T> pages = j.pages(request, kv_head);
  const long begin = part * PART, end = min_l(j.a.lens[request], begin + PART);
  long g = 0;
  const auto heads = [&](auto count) {
    constexpr int R = decltype(count)::value;
    for (; g + R <= j.group; g += R)
      decode_heads<P, R>([&](int i) { return j.query(j.a.starts[request], kv_head * j.group + g + i); }, j.a.scale, pages, begin,
                         end, result + g * (j.Dp + 2));
  };
  heads(Int<4>());
  heads(Int<2>());
  heads(Int<1>());
}

// Query tokens [begin, begin + n) of a request's new ones, all heads of one KV head.
template <class P, class T> static void prefill_block(const Job<T>& j, long request, long kv_head, long begin, long n) {
  const Attention& a = j.a;
  const long row0 = a.starts[request] + begin, first = a.lens[request] - (a.starts[request + 1] - row0);
  const auto head = [&](long r) { return kv_head * j.group + r % j.group; };
  prefill_rows<P>(j.pages(request, kv_head), first, n, j.group, a.scale,
                  [&](long r) { return j.query(row0 + r / j.group, head(r)); },
                  [&](long r) { return j.out(row0 + r / j.group, head(r)); });
}

template <class P, class T> static void attention_of(const Attention& a) {
  const Job<T> j{a, a.H / a.Hk, ceil_div(a.D, LANES) * LANES};
  const long block = max_l(1, TILES * TILE / j.group), stride = j.Dp + 2;
  // Tasks of request i start at first[i]; parts of decode requests are kept in `partial` from cell[i] on.
  long* first = static_cast<long*>(scratch(SCALES, size_t(2 * (a.N + 1)) * sizeof(long)));
  long* cell = first + a.N + 1;
  first[0] = cell[0] = 0;
  double work = 0;
  for (long i = 0; i < a.N; ++i) {
    const long n = a.starts[i + 1] - a.starts[i];
    const long pieces = n == 1 ? ceil_div(a.lens[i], PART) : ceil_div(n, block);
    first[i + 1] = first[i] + pieces * a.Hk;
    cell[i + 1] = cell[i] + (n == 1 ? pieces * a.H : 0);
    work += double(n) * double(a.lens[i]) * double(a.H * a.D);
  }
  float* partial = static_cast<float*>(scratch(PARTIAL, size_t(cell[a.N] * stride) * 4));
  parallel(first[a.N], work, [&](long index) {
    const long task = first[a.N] - 1 - index;  // a prompt's last tokens see most: they begin
    long i = 0;
    while (first[i + 1] <= task) ++i;
    const long n = a.starts[i + 1] - a.starts[i], kv_head = (task - first[i]) % a.Hk, piece = (task - first[i]) / a.Hk;
    if (n == 1) decode_part<P>(j, i, kv_head, piece, partial + (cell[i] + piece * a.H + kv_head * j.group) * stride);
    else prefill_block<P>(j, i, kv_head, piece * block, min_l(block, n - piece * block));
  });
  const long parts = cell[a.N] / a.H;
  parallel(a.N * a.H, double(parts * a.H * j.Dp), [&](long task) {
    const long i = task / a.H, h = task % a.H, n = (cell[i + 1] - cell[i]) / a.H;
    if (n > 0) merge_parts(partial + (cell[i] + h) * stride, a.H * stride, n, a.scale, j.Dp, a.D, j.out(a.starts[i], h));
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
