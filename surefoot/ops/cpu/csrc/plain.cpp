#include "plain.h"

#include <cmath>

#if defined(__linux__)
#include <sys/mman.h>
#include <unistd.h>
#endif

#include "panels.h"
#include "threads.h"
#include "types.h"

namespace sf {
namespace {

template <class Body> void for_blocks(long n, long block, const Body& body) {
  struct Context { const Body& body; long n, block; } context{body, n, block};
  run_tasks(ceil_div(n, block), [](long i, void* p) {
    const Context& c = *static_cast<Context*>(p);
    for (long t = i * c.block; t < min_l(c.n, (i + 1) * c.block); ++t) c.body(t);
  }, &context);
}

// Says that [p, p + bytes) will be read. A table may lie in a mapped file whose pages the system has dropped: they then come
// from the disk all at once instead of each when its first byte is missed.
void ask_for(const char* p, long bytes) {
#if defined(__linux__)
  static const uintptr_t page = uintptr_t(sysconf(_SC_PAGESIZE));
  const uintptr_t begin = reinterpret_cast<uintptr_t>(p) / page * page;
  madvise(reinterpret_cast<void*>(begin), reinterpret_cast<uintptr_t>(p) + size_t(bytes) - begin, MADV_WILLNEED);
#else
  (void)p, (void)bytes;
#endif
}

}  // namespace

void pack_panels(void* p, long rows, long columns, long bytes) {
  const long size = PANEL * columns * bytes;
  for_blocks(rows / PANEL, 1, [&](long panel) {
    char* to = static_cast<char*>(p) + panel * size;
    char* from = static_cast<char*>(scratch(TASK, size_t(size)));
    memcpy(from, to, size_t(size));
    const char* row[PANEL];
    for (long j = 0; j < PANEL; ++j) row[j] = from + j * columns * bytes;
    if (bytes == 4) interleave(row, PANEL, columns * 4, to, PANEL);
    else for (long k = 0; k < columns; ++k)
      for (long j = 0; j < PANEL; ++j) memcpy(to + 2 * (k * PANEL + j), row[j] + 2 * k, 2);
  });
}

void kv_write(const void* k, long ldk, const void* v, long ldv, void* k_cache, void* v_cache, const int64_t* slots,
              long tokens, long row_bytes) {
  for_blocks(tokens, 64, [&](long t) {
    memcpy(static_cast<char*>(k_cache) + slots[t] * row_bytes, static_cast<const char*>(k) + t * ldk, size_t(row_bytes));
    memcpy(static_cast<char*>(v_cache) + slots[t] * row_bytes, static_cast<const char*>(v) + t * ldv, size_t(row_bytes));
  });
}

long gather(const void* table, long rows, long row_bytes, const int64_t* ids, void* out, long n) {
  for (long i = 0; i < n; ++i)
    if (ids[i] < 0 || ids[i] >= rows) return i;
  const char* from = static_cast<const char*>(table);
  if (n > 1)
    for (long i = 0; i < n; ++i) ask_for(from + ids[i] * row_bytes, row_bytes);
  for_blocks(n, 16, [&](long i) {
    memcpy(static_cast<char*>(out) + i * row_bytes, from + ids[i] * row_bytes, size_t(row_bytes));
  });
  return -1;
}

void rotary_angles(const int64_t* positions, const float* inv_freq, long ld, float* cos, float* sin, long tokens, long half) {
  for_blocks(tokens, 64, [&](long t) {
    for (long i = 0; i < half; ++i) {
      const float angle = float(positions[t]) * inv_freq[t * ld + i];
      cos[t * half + i] = std::cos(angle);
      sin[t * half + i] = std::sin(angle);
    }
  });
}

void delta_gates(const void* a, long lda, const void* b, long ldb, int dtype, const void* a_log, int a_log_type,
                 const void* dt_bias, int bias_type, float* g, float* beta, long tokens, long heads) {
  for_blocks(tokens, 64, [&](long t) {
    for (long h = 0; h < heads; ++h) {
      const float x = read_any(a, dtype, t * lda + h) + read_any(dt_bias, bias_type, h);
      const float softplus = x > 20.0f ? x : std::log1p(std::exp(x));
      g[t * heads + h] = -std::exp(read_any(a_log, a_log_type, h)) * softplus;
      beta[t * heads + h] = 1.0f / (1.0f + std::exp(-read_any(b, dtype, t * ldb + h)));
    }
  });
}

}  // namespace sf
