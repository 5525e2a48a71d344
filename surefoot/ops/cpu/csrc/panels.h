// The layout of packed integer weights, the same for every instruction set: panels of 16 output channels, lanes being
// channels, so that one cache line holds one 32-bit word of each and nothing has to be summed across lanes:
//
//   weights  [N / 16][words of a row][16] words     a word: 4 int8 or 8 int4 elements as a row holds them
//   scales   [N / 16][groups][16]                   of int4; per-channel scales stay as they are
//
// A panel takes the very bytes that its 16 rows took, so weights are packed where they lie.
#pragma once
#include "types.h"

namespace sf {

constexpr long PANEL = 16;

// `count` rows (a multiple of 4) as words in turn: word w of row i goes to to[w * stride + i]. What is missing to the
// last word of a row counts as zero. Four rows at a time for a cache line: more at once would meet in the same sets.
static inline void interleave(const char* const rows[], long count, long bytes, char* to, long stride) {
  const long whole = bytes / 16 * 16, step = stride * 4;
  for (long line = 0; line < whole; line += 64)
    for (long i = 0; i < count; i += 4)
      for (long k = line; k < min_l(line + 64, whole); k += 16) {
        Int4 r[4];
        for (int j = 0; j < 4; ++j) memcpy(&r[j], rows[i + j] + k, 16);
        transpose4(r, to + k / 4 * step + i * 4, step);
      }
  for (long k = whole; k < bytes; k += 4)
    for (long i = 0; i < count; ++i) {
      uint32_t word = 0;
      memcpy(&word, rows[i] + k, size_t(min_l(4, bytes - k)));
      memcpy(to + k / 4 * step + i * 4, &word, 4);
    }
}

}  // namespace sf
