// exp, reciprocal and logarithms for float and double.
//
// exp is the polynomial of ../cpu/elementary.py (tools/fit_exp.py), 13 instructions. The hardware's
// ex2.approx with its argument split would take 7, but errs 2 units in the last place by itself,
// which alone takes the gradient past the 4 that are promised: to be weighed where a GPU is at hand.
// The reciprocal is the hardware's, asked for by name: a division is made of ten instructions. Its
// error is NVIDIA's (PTX ISA, rcp.approx.ftz.f32: 1 unit in the last place) and was not measured
// here yet; on the CPU, in tests, it is correctly rounded.
#pragma once

__device__ __forceinline__ float reciprocal(float d) {
#ifdef HOSTCUDA
  return 1.0f / d;
#else
  float result;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(d));
  return result;
#endif
}

__device__ __forceinline__ double reciprocal(double d) { return 1.0 / d; }

// exp(-a) for a >= 0; 0 where the result would be subnormal (from 87.34 on, where CuPy has subnormal
// numbers flushed), NaN for NaN. Maximum error: 0.89 ulp below, as on the CPU: every operation is
// rounded correctly on both.
//
// exp(-a) = 2^n exp(r). n is rounded by adding 1.5 * 2^23, which leaves n + 127 in the low bits:
// shifted into place they are 2^n, and 0 where that is no longer a normal number.
__device__ __forceinline__ float exp_negative(float a) {
  constexpr float LOG2_E = 1.44269502f, LN_2 = 0.693147182f, LN_2_REST = -1.90465421e-9f;
  constexpr float ROUNDER = 12582912.0f + 127.0f;
  a = a > 88.0f ? 88.0f : a;  // in this order NaN stays
  const float shifted = fmaf(a, -LOG2_E, ROUNDER);
  const float n = shifted - ROUNDER;
  const float r = fmaf(n, -LN_2_REST, fmaf(n, -LN_2, -a));
  float p = 0.0013814599f;
  p = fmaf(p, r, 0.008368717f);
  p = fmaf(p, r, 0.04166839f);
  p = fmaf(p, r, 0.16666521f);
  p = fmaf(p, r, 0.49999994f);
  p = fmaf(fmaf(p, r, 1.0f), r, 1.0f);
  return p * __uint_as_float(__float_as_uint(shifted) << 23);
}

__device__ __forceinline__ double exp_negative(double a) { return a > 709.0 ? 0.0 : exp(-a); }

__device__ __forceinline__ float log_1p(float s) { return log1pf(s); }
__device__ __forceinline__ double log_1p(double s) { return log1p(s); }
__device__ __forceinline__ float natural_log(float u) { return logf(u); }
__device__ __forceinline__ double natural_log(double u) { return log(u); }
__device__ __forceinline__ float fused(float a, float b, float c) { return fmaf(a, b, c); }
__device__ __forceinline__ double fused(double a, double b, double c) { return fma(a, b, c); }
__device__ __forceinline__ float magnitude(float x) { return fabsf(x); }
__device__ __forceinline__ double magnitude(double x) { return fabs(x); }
__device__ __forceinline__ float square_root(float x) { return sqrtf(x); }
__device__ __forceinline__ double square_root(double x) { return sqrt(x); }
