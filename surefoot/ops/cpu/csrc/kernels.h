// The kernels of one instruction set as a table of plain functions. Shapes and meanings are those of the OpSpecs in
// surefoot/ops; ld... is the distance in elements between consecutive rows (tokens).
#pragma once
#include <stdint.h>

#include "types.h"

namespace sf {

enum WeightKind : int { W_FLOAT = 0, W_INT8 = 1, W_INT4 = 2 };

// y = x @ w.T + bias; w is [N, K] row by row as in a checkpoint, or packed where it lies (panels.h).
struct Linear {
  const void* x; long ldx; int xtype;            // x, y and a float w are of one dtype
  void* y; long ldy;
  const void* bias; int bias_type;               // null: none
  const void* w;                                 // W_INT4: [N, K / 2] bytes, element 2i in the low nibble, stored + 8
  const void* wscale; int scale_type;            // W_INT8: float [N]; W_INT4: [N, K / group]
  long M, N, K, group;
  int kind;
  int act_bits;                                  // W_INT8, W_INT4: 8 or 16 bits for the activations
  int packed;                                    // W_INT8, W_INT4: w, and the scales of groups, are panels
};

struct Attention {
  const void* q; long ldq;                       // [T, H, D]
  void* out;                                     // [T, H, D] contiguous
  int dtype;                                     // of q, out and the caches
  const void* k; const void* v;                  // [num_blocks, block_size, Hk, D]
  const int32_t* block_table; long max_blocks;   // [N, max_blocks]
  const int32_t* starts;                         // [N + 1]
  const int32_t* lens;                           // [N]
  long N, H, Hk, D, block_size;
  float scale;
};

struct Delta {
  const void* q; const void* k; const void* v; long ldq, ldk, ldv;  // [T, Hk, Dk], [T, Hk, Dk], [T, Hv, Dv]
  int dtype;
  const float* g; const float* beta;             // [T, Hv]
  float* state; const int64_t* slots;            // [num_slots, Hv, Dk, Dv], [N]
  void* out;                                     // [T, Hv, Dv] contiguous
  const int32_t* starts;                         // [N + 1], or null for one token per request
  long N, Hk, Hv, Dk, Dv;
};

struct Conv {
  const void* x; long ldx;                       // [T, C]
  const void* w; int wtype; const void* bias;    // [C, taps], [C] or null
  void* state; const int64_t* slots;             // [num_slots, C, taps - 1], [N]
  void* out;                                     // [T, C] contiguous
  int dtype;
  const int32_t* starts;
  long N, C, taps;
};

struct Norm {
  const void* x; long ldx;
  const void* other; long ldo;                   // residual to add first, or gate to multiply by; null: neither
  const void* w; int wtype;
  void* y; void* sum;                            // contiguous; sum: null, or where x + other goes
  int dtype;
  long rows, width;
  float eps;
};

struct Kernels {
  const char* name;
  void (*linear)(const Linear&);
  void (*attention)(const Attention&);
  void (*delta)(const Delta&);
  void (*conv)(const Conv&);
  void (*norm)(const Norm&);
  void (*gate)(int op, int dtype, const void* a, long lda, const void* b, long ldb, void* y, long rows, long width);
  void (*rotary)(int dtype, const void* x, long ldx, const float* cos, const float* sin, void* y, long tokens,
                 long heads, long dim, long half);
  void (*argmax)(int dtype, const void* x, long ldx, void* best, int64_t* index, long rows, long width);
  double (*read)(const void* p, long bytes);
  double (*peak)(int what, long steps);
};

enum Gate : int { SWIGLU = 0, SIGMOID_MUL = 1, ADD = 2 };
enum Peak : int { PEAK_INT8 = 0, PEAK_FP32 = 1, PEAK_BF16 = 2, PEAK_INT16 = 3 };

extern const Kernels kernels_portable, kernels_avx2, kernels_avx2_vnni, kernels_avx512, kernels_avx512_bf16, kernels_neon,
    kernels_neon_dotprod;

}  // namespace sf
