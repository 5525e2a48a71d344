// Runs the Arm kernels beside the portable ones, which the Python tests hold against the references, on the same numbers.
// Built for aarch64 and run by tests/test_neon.py, under an emulator where the machine is another.
#include <math.h>
#include <stdio.h>
#include <stdlib.h>

#include <vector>

#include "kernels.h"

using namespace sf;

static float uniform() { return float(rand()) / float(RAND_MAX) * 2 - 1; }
static int failures = 0;

template <class T> static std::vector<T> numbers(long n) {
  std::vector<T> v(n);
  for (auto& x : v) from_float(&x, uniform());
  return v;
}

template <class T> static void compare(const char* what, const char* isa, const std::vector<T>& a, const std::vector<T>& b, float tolerance) {
  for (size_t i = 0; i < a.size(); ++i) {
    const float x = to_float(a[i]), y = to_float(b[i]);
    if (!(fabsf(x - y) <= tolerance * (1 + fabsf(y)))) {
      printf("%s %s: element %zu is %g, not %g\n", isa, what, i, x, y);
      ++failures;
      return;
    }
  }
}

template <class T> static void check(const Kernels& k, int dtype, float tolerance) {
  const auto both = [&](const char* what, long size, const auto& run, float sums = 1) {
    std::vector<T> a(size), b(size);
    run(k, a.data());
    run(kernels_portable, b.data());
    compare(what, k.name, a, b, tolerance * sums);
  };
  for (long M : {1, 3, 9, 70})
    for (long K : {32, 100, 1056, 2304}) {
      const long N = 13;
      const auto x = numbers<T>(M * K), w = numbers<T>(N * K), bias = numbers<T>(N), scale4 = numbers<T>(N * K / 32 + 1);
      std::vector<int8_t> q(N * K);
      for (auto& v : q) v = int8_t(rand() % 255 - 127);
      std::vector<float> scale(N, 1.0f / 127 / 30);
      Linear j{};
      j.x = x.data(); j.ldx = K; j.xtype = dtype; j.ldy = N; j.bias = bias.data(); j.bias_type = dtype;
      j.w = w.data(); j.M = M; j.N = N; j.K = K;
      const auto linear = [&](const Kernels& by, T* y) { j.y = y; by.linear(j); };
      both("float linear", M * N, linear);
      j.kind = W_INT8; j.w = q.data(); j.wscale = scale.data();
      for (int bits : {8, 16}) { j.act_bits = bits; both("int8 linear", M * N, linear); }
      if (K % 32) continue;
      j.kind = W_INT4; j.wscale = scale4.data(); j.scale_type = dtype; j.group = 32;
      // Sums of about a hundred, in another order.
      for (int bits : {8, 16}) { j.act_bits = bits; both("int4 linear", M * N, linear, 10); }
    }
  for (long D : {6, 64}) {
    const long H = 6, Hk = 2, blocks = 20, size = 16;
    const auto q = numbers<T>(42 * H * D), keys = numbers<T>(blocks * size * Hk * D), values = numbers<T>(blocks * size * Hk * D);
    std::vector<int32_t> table(2 * 10), starts{0, 1, 42}, lens{150, 90};
    for (int i = 0; i < 20; ++i) table[i] = (i * 7) % 20;
    const Attention a{q.data(), H * D, nullptr, dtype, keys.data(), values.data(), table.data(), 10, starts.data(), lens.data(),
                      2, H, Hk, D, size, 0.125f};
    both("attention", 42 * H * D, [&](const Kernels& by, T* y) { Attention j = a; j.out = y; by.attention(j); });
  }
  for (long width : {7, 64, 300}) {
    const auto x = numbers<T>(5 * width), other = numbers<T>(5 * width), w = numbers<T>(width);
    Norm n{x.data(), width, other.data(), width, w.data(), dtype, nullptr, nullptr, dtype, 5, width, 1e-5f};
    both("gated norm", 5 * width, [&](const Kernels& by, T* y) { n.y = y; by.norm(n); });
    for (int op : {SWIGLU, SIGMOID_MUL})
      both("gate", 5 * width, [&](const Kernels& by, T* y) { by.gate(op, dtype, x.data(), width, other.data(), width, y, 5, width); });
  }
  {
    const auto x = numbers<T>(4 * 3 * 20);
    const auto cos = numbers<float>(4 * 7), sin = numbers<float>(4 * 7);
    both("rotary", 240, [&](const Kernels& by, T* y) { by.rotary(dtype, x.data(), 60, cos.data(), sin.data(), y, 4, 3, 20, 7); });
  }
  {
    const auto q = numbers<T>(9 * 2 * 24), key = numbers<T>(9 * 2 * 24), v = numbers<T>(9 * 4 * 20);
    const auto g = numbers<float>(36), beta = numbers<float>(36), state = numbers<float>(3 * 4 * 24 * 20);
    std::vector<int64_t> slots{2, 0};
    std::vector<int32_t> starts{0, 3, 9};
    both("delta rule", 9 * 4 * 20, [&](const Kernels& by, T* y) {
      auto s = state;
      by.delta({q.data(), key.data(), v.data(), 48, 48, 80, dtype, g.data(), beta.data(), s.data(), slots.data(), y, starts.data(), 2, 2, 4, 24, 20});
    });
    const auto x = numbers<T>(9 * 21), w = numbers<T>(21 * 4), past = numbers<T>(3 * 21 * 3);
    both("convolution", 9 * 21, [&](const Kernels& by, T* y) {
      auto s = past;
      by.conv({x.data(), 21, w.data(), dtype, nullptr, s.data(), slots.data(), y, dtype, starts.data(), 2, 21, 4});
    });
  }
}

int main() {
  for (const Kernels* k : {&kernels_neon, &kernels_neon_dotprod}) {
    check<float>(*k, F32, 2e-5f);
    check<bf16>(*k, BF16, 1.2e-2f);
    check<f16>(*k, F16, 2e-3f);
  }
  printf(failures ? "%d kernels differ\n" : "the Arm kernels agree\n", failures);
  return failures != 0;
}
