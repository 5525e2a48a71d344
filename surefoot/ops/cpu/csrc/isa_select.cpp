#include "isa_select.h"

#if defined(__x86_64__)
#include <cpuid.h>
#endif
#if defined(__aarch64__) && defined(__linux__)
#include <sys/auxv.h>
#endif

namespace sf {
namespace {

#if defined(__x86_64__)
// Asked of the processor directly: __builtin_cpu_supports does not know every name in older compilers.
struct Cpu {
  unsigned leaf1_c = 0, leaf7_b = 0, leaf7_c = 0, leaf71_a = 0;
  unsigned long saved = 0;  // registers that the operating system preserves

  Cpu() {
    unsigned a, b, c, d;
    if (__get_cpuid(1, &a, &b, &c, &d)) leaf1_c = c;
    if (__get_cpuid_count(7, 0, &a, &b, &c, &d)) { leaf7_b = b; leaf7_c = c; }
    if (__get_cpuid_count(7, 1, &a, &b, &c, &d)) leaf71_a = a;
    if (leaf1_c & bit_OSXSAVE) {
      unsigned lo, hi;
      __asm__("xgetbv" : "=a"(lo), "=d"(hi) : "c"(0));
      saved = lo;
    }
  }
  bool avx2() const {
    const unsigned need = bit_AVX | bit_FMA | bit_F16C;
    return (leaf1_c & need) == need && (leaf7_b & bit_AVX2) && (saved & 0x6) == 0x6;
  }
  bool avx2_vnni() const { return avx2() && (leaf71_a & 1u << 4); }
  bool avx512() const {
    const unsigned need = bit_AVX512F | bit_AVX512BW | bit_AVX512DQ | bit_AVX512VL;
    return avx2() && (leaf7_b & need) == need && (leaf7_c & 1u << 11) && (saved & 0xe6) == 0xe6;
  }
  bool avx512_bf16() const { return avx512() && (leaf71_a & 1u << 5); }
};
#endif

const Kernels* const* find() {
  static const Kernels* found[8];
  int n = 0;
#if defined(__x86_64__)
  const Cpu cpu;
#ifdef SF_HAVE_AVX512_BF16
  if (cpu.avx512_bf16()) found[n++] = &kernels_avx512_bf16;
#endif
#ifdef SF_HAVE_AVX512
  if (cpu.avx512()) found[n++] = &kernels_avx512;
#endif
#ifdef SF_HAVE_AVX2_VNNI
  if (cpu.avx2_vnni()) found[n++] = &kernels_avx2_vnni;
#endif
#ifdef SF_HAVE_AVX2
  if (cpu.avx2()) found[n++] = &kernels_avx2;
#endif
  (void)cpu;
#endif
#if defined(__aarch64__)
#ifdef SF_HAVE_NEON_DOTPROD
#if defined(__linux__)
  if (getauxval(AT_HWCAP) & 1ul << 20) found[n++] = &kernels_neon_dotprod;
#else
  found[n++] = &kernels_neon_dotprod;  // every Apple processor has it
#endif
#endif
#ifdef SF_HAVE_NEON
  found[n++] = &kernels_neon;
#endif
#endif
  found[n++] = &kernels_portable;
  found[n] = nullptr;
  return found;
}

}  // namespace

const Kernels* const* available() {
  static const Kernels* const* const list = find();
  return list;
}

}  // namespace sf
