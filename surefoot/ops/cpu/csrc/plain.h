// Kernels that gain nothing from vectors and are compiled once.
#pragma once
#include <stdint.h>

namespace sf {

// [rows, columns] elements of 2 or 4 bytes, rows a multiple of 16, into panels.h's [rows / 16][columns][16], in place.
void pack_panels(void* p, long rows, long columns, long bytes);

// Rows of k and v to their slots. row_bytes: Hk x D values of one token; ld...: bytes between tokens.
void kv_write(const void* k, long ldk, const void* v, long ldv, void* k_cache, void* v_cache, const int64_t* slots,
              long tokens, long row_bytes);

// Rows of table [rows, row_bytes] at ids [n], one behind the other. Returns the position of the first id that is outside the
// table, and copies nothing, or -1.
long gather(const void* table, long rows, long row_bytes, const int64_t* ids, void* out, long n);

// cos and sin, [tokens, half] each, of positions times inv_freq; ld: elements between its rows, 0 if all tokens share one.
void rotary_angles(const int64_t* positions, const float* inv_freq, long ld, float* cos, float* sin, long tokens, long half);

// g = -exp(A_log) softplus(a + dt_bias), beta = sigmoid(b), both [T, H] fp32; lda, ldb: elements between tokens.
void delta_gates(const void* a, long lda, const void* b, long ldb, int dtype, const void* a_log, int a_log_type,
                 const void* dt_bias, int bias_type, float* g, float* beta, long tokens, long heads);

}  // namespace sf
