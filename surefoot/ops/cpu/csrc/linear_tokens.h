// The tokens of a linear layer with int8 or int4 weights: quantised one by one, in tiles, word by word:
//
//   tokens     [tiles][words of a row][parts of a word][tokens of the tile]
//
// A word of weights is split into `WORDS` vectors that the multiply instruction takes, and the activations are ordered to
// match.
#pragma once
#include "panels.h"
#include "quantise.h"

namespace sf {
namespace SF_ISA {

// 16 bytes of quantised activations in another order.
typedef int8_t Byte16 __attribute__((vector_size(16)));
#ifdef __clang__
#define SF_BYTES(x, ...) __builtin_shufflevector(x, x, __VA_ARGS__)
#else
#define SF_BYTES(x, ...) __builtin_shuffle(x, (Byte16){__VA_ARGS__})
#endif
template <class Order> static inline void reorder(void* row, long bytes, const Order& order) {
  char* p = static_cast<char*>(row);
  for (long i = 0; i < bytes; i += 16) {
    Byte16 x;
    memcpy(&x, p + i, 16);
    x = order(x);
    memcpy(p + i, &x, 16);
  }
}

// The kinds of products: X holds a quantised activation, PER_WORD weights are in a word and make WORDS vectors of dot
// products; OFFSET: what the weights are larger by than what they stand for.

struct By16 {  // 16-bit products, pairs of elements
  typedef int16_t X;
  static SF_INLINE I sums(I words) { return dot16(i_zero(), i_set(0x00010001), words); }  // of the elements of each word
  static SF_INLINE I dot(I acc, I w, I a) { return dot16(acc, w, a); }
};
struct Int8By16 : By16 {
  static constexpr int PER_WORD = 4, WORDS = 2, OFFSET = 0;
  static SF_INLINE void split(I word, I w[WORDS]) {
    w[0] = w8_even(word);
    w[1] = w8_odd(word);
  }
  static void order(X* row, long n) {
    reorder(row, 2 * n, [](Byte16 x) { return SF_BYTES(x, 0, 1, 4, 5, 2, 3, 6, 7, 8, 9, 12, 13, 10, 11, 14, 15); });
  }
};
struct Int4By16 : By16 {
  static constexpr int PER_WORD = 8, WORDS = 4, OFFSET = 8;
  static SF_INLINE void split(I word, I w[WORDS]) {
    w[0] = w4_pair<0>(word);
    w[1] = w4_pair<1>(word);
    w[2] = w4_pair<2>(word);
    w[3] = w4_pair<3>(word);
  }
  static void order(X* row, long n) {
    reorder(row, 2 * n, [](Byte16 x) { return SF_BYTES(x, 0, 1, 8, 9, 2, 3, 10, 11, 4, 5, 12, 13, 6, 7, 14, 15); });
  }
};
#ifdef SF_DOT8
struct By8 {  // 8-bit products, four elements
  typedef int8_t X;
  static SF_INLINE I sums(I words) { return dot8(i_zero(), i_set(0x01010101), words); }
  static SF_INLINE I dot(I acc, I w, I a) { return dot8(acc, w, a); }
};
struct Int8By8 : By8 {
  static constexpr int PER_WORD = 4, WORDS = 1, OFFSET = W8_OFFSET;
  static SF_INLINE void split(I word, I w[WORDS]) { w[0] = w8_side(word); }
  static void order(X*, long) {}
};
#else
typedef Int8By16 Int8By8;  // int8 activations widened: the same integers, hence the same sums
#endif
#if defined(SF_DOT8) || defined(SF_SHORT_SUMS)
struct Int4By8 {
  typedef int8_t X;
  static constexpr int PER_WORD = 8, WORDS = 2, OFFSET = 8;
  static SF_INLINE I sums(I words) {
#ifdef SF_DOT8
    return dot8(i_zero(), i_set(0x01010101), words);
#else
    return short_fold(i_zero(), short_dot(i_zero(), i_set(0x01010101), words));
#endif
  }
  static SF_INLINE void split(I word, I w[WORDS]) {
    w[0] = w4_low(word);
    w[1] = w4_high(word);
  }
  static SF_INLINE I dot(I acc, I w, I a) {
#ifdef SF_DOT8
    return dot8(acc, w, a);
#else
    return short_dot(acc, w, a);  // into sums of 16 bits, see `segment`
#endif
  }
  static void order(X* row, long n) {
    reorder(row, n, [](Byte16 x) { return SF_BYTES(x, 0, 2, 4, 6, 1, 3, 5, 7, 8, 10, 12, 14, 9, 11, 13, 15); });
  }
};
#else
typedef Int4By16 Int4By8;
#endif

// The tokens of a call, quantised and cut into tiles; what their sums begin with and are scaled by.
//
// SCALED: sums are integers within a segment of K only; BLOCKS: a token has a scale for each BLOCK of K, not one for all.
template <class Kind, bool SCALED, bool BLOCKS> class Tokens {
 public:
  static constexpr int ROWS_MAX = int_rows(SCALED);

  // segment_k: elements of K
  Tokens(const Linear& job, long segment_k)
      : segment_k(segment_k), words(ceil_div(job.K, Kind::PER_WORD)), tiles(ceil_div(job.M, ROWS_MAX)), job_(job),
        blocks_(BLOCKS ? ceil_div(job.K, BLOCK) : 1), segments_(ceil_div(job.K, segment_k)), padded_(round_up(job.K, 64)) {
    words_ = static_cast<int32_t*>(scratch(ACTIVATIONS, size_t(job.M * words * Kind::WORDS) * 4));
    scales_ = static_cast<float*>(scratch(SCALES, size_t(job.M * blocks_) * 4));
    starts_ = static_cast<int32_t*>(scratch(SUMS, size_t(job.M * segments_) * 4));
    with_type(job.xtype, [&](auto zero) {
      // A tile is one thread's: the words of its tokens share cache lines.
      parallel(tiles, double(job.M * job.K), [&](long i) {
        const long first = first_row(i), end = first_row(i + 1);
        for (long m = first; m < end; m += 4) prepare<decltype(zero)>(first, end - first, m, min_l(4, end - m));
      });
    });
  }

  const long segment_k, words, tiles;  // words of a row of weights

  long first_row(long tile) const { return job_.M * tile / tiles; }  // tiles of nearly equal height
  // Of the tile that begins with token m.
  const int32_t* tile_words(long m) const { return words_ + m * words * Kind::WORDS; }
  const int32_t* tile_starts(long m) const { return starts_ + m * segments_; }
  float scale(long m, long block) const { return scales_[m * blocks_ + block]; }

 private:
  typedef typename Kind::X X;

  const Linear& job_;
  long blocks_, segments_, padded_;
  int32_t* words_;   // [tiles][words of a row][parts of a word][tokens of the tile]
  float* scales_;    // [M, blocks]
  int32_t* starts_;  // [tiles][segments][tokens of the tile]: -OFFSET x the sum of the activations

  // `count` <= 4 tokens from m on, of a tile of `height` that begins with token `first`.
  template <class T> void prepare(long first, long height, long m, long count) const {
    int32_t* to = words_ + first * words * Kind::WORDS + m - first;
    const bool direct = height == 1 && padded_ == job_.K;
    X* rows = direct ? reinterpret_cast<X*>(to) : static_cast<X*>(scratch(TASK, size_t(4 * padded_) * sizeof(X)));
    const char* from[4];
    for (long j = 0; j < count; ++j) {
      X* row = rows + j * padded_;
      from[j] = reinterpret_cast<const char*>(row);
      quantise_token(static_cast<const T*>(job_.x) + (m + j) * job_.ldx, row, scales_ + (m + j) * blocks_);
      if (Kind::OFFSET) sum_segments(row, starts_ + first * segments_ + m - first + j, height);
      Kind::order(row, padded_);
    }
    if (direct) return;
    if (count == 4) return interleave(from, 4, words * Kind::WORDS * 4, reinterpret_cast<char*>(to), height);
    for (long w = 0; w < words * Kind::WORDS; ++w)
      for (long j = 0; j < count; ++j) memcpy(to + w * height + j, from[j] + w * 4, 4);
  }

  template <class T> void quantise_token(const T* x, X* row, float* scales) const {
    for (long i = job_.K; i < padded_; ++i) row[i] = 0;
    if constexpr (!BLOCKS) scales[0] = quantise(x, job_.K, 127.0f, row);
    else
      for (long b = 0; b < blocks_; ++b)
        scales[b] = quantise(x + b * BLOCK, min_l(BLOCK, job_.K - b * BLOCK), 32767.0f, row + b * BLOCK);
  }

  void sum_segments(const X* row, int32_t* starts, long stride) const {
    constexpr long EACH = 4 / long(sizeof(X));  // elements of a word
    int32_t* sums = static_cast<int32_t*>(scratch(TASK_2, size_t(padded_ / EACH) * 4));
    for (long i = 0; i < padded_ / EACH; i += LANES) {
      const I each = Kind::sums(i_load(reinterpret_cast<const int32_t*>(row) + i));
      memcpy(sums + i, &each, sizeof each);
    }
    const long each = segment_k / EACH;
    for (long s = 0; s < segments_; ++s, sums += each) {
      int32_t sum = 0;
      for (long i = 0; i < min_l(each, padded_ / EACH - s * each); ++i) sum += sums[i];
      starts[s * stride] = -Kind::OFFSET * sum;
    }
  }
};

}  // namespace SF_ISA
}  // namespace sf
