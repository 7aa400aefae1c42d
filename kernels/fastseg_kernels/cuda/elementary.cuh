// exp, reciprocal and logarithms for float and double.
//
// There are two exps. `exp_negative` is the polynomial of ../cpu/elementary.py (tools/fit_exp.py), 12
// instructions, every one of them rounded correctly. `quick_exp_negative`, 5 instructions, is the
// hardware's with its argument split. It errs 2 units in the last place by itself: too much for the
// 4 that the gradient of float is promised, by itself and through the sums, and nothing to a number
// of half precision.
//
// The hardware's ex2 and rcp are asked for by name: a division is made of ten instructions. Their
// errors are NVIDIA's figures (PTX ISA, ex2.approx.ftz.f32: 2 units in the last place,
// rcp.approx.ftz.f32: 1) and were not measured here yet. On the CPU, in tests, they always err by as
// much, upwards. For float the reciprocal is refined, and errs half a unit on any device.
#pragma once

__device__ __forceinline__ float reciprocal(float d) {
#ifdef HOSTCUDA
  return hostcuda::off_by(1, 1.0f / d);
#else
  float result;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(d));
  return result;
#endif
}

// With one step of Newton's method: half a unit and a little more.
__device__ __forceinline__ float newton_reciprocal(float d) {
  const float r = reciprocal(d);
  return fmaf(r, fmaf(-d, r, 1.0f), r);
}
__device__ __forceinline__ double newton_reciprocal(double d) { return 1.0 / d; }

__device__ __forceinline__ float power_of_two(float a) {
#ifdef HOSTCUDA
  return hostcuda::off_by(2, exp2f(a));
#else
  float result;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(a));
  return result;
#endif
}

__device__ __forceinline__ double reciprocal(double d) { return 1.0 / d; }

// The smaller of two numbers; NaN if `a` is.
__device__ __forceinline__ float smaller_or_nan(float a, float b) {
#if !defined(HOSTCUDA) && __CUDA_ARCH__ >= 800
  float result;
  asm("min.NaN.f32 %0, %1, %2;" : "=f"(result) : "f"(a), "f"(b));
  return result;
#else
  return a > b ? b : a;
#endif
}

// exp(-a) for a >= 0; 0 where the result would be subnormal (from 87.34 on), NaN for NaN. Maximum
// error: 0.89 ulp up to 87, as on the CPU: every operation is rounded correctly on both.
//
// exp(-a) = 2^n exp(r). n is rounded by adding 1.5 * 2^23, which leaves n + 127 in the low bits:
// shifted into place they are 2^n, and 0 where that is no longer a normal number. (Added to the
// exponent of exp(r), by one instruction less, they would make a number of a GPU's NaN.)
__device__ __forceinline__ float exp_negative(float a) {
  constexpr float LOG2_E = 1.44269502f, LN_2 = 0.693147182f, LN_2_REST = -1.90465421e-9f;
  constexpr float ROUNDER = 12582912.0f + 127.0f;
  a = smaller_or_nan(a, 88.0f);
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

// As above, with an error of at most 3.3 ulp up to a = 16 and 5 up to 87 (2 are ex2's; the rest is
// the part of ln 2 that LN_2 lacks, 5e-9 of the exponent, and one rounding). No NaN is made of
// infinity: there `rest` would be one, and is 1.
__device__ __forceinline__ float quick_exp_negative(float a) {
  constexpr float LOG2_E = 1.44269502f, LN_2 = 0.693147182f;
  const float exponent = a * -LOG2_E, power = power_of_two(exponent);
  const float rest = fminf(fmaf(exponent, -LN_2, -a), 1.0f);
  return fmaf(power, rest, power);
}

__device__ __forceinline__ double exp_negative(double a) { return a > 709.0 ? 0.0 : exp(-a); }

__device__ __forceinline__ double quick_exp_negative(double a) { return exp_negative(a); }

__device__ __forceinline__ float log_1p(float s) { return log1pf(s); }
__device__ __forceinline__ double log_1p(double s) { return log1p(s); }
__device__ __forceinline__ float natural_log(float u) { return logf(u); }
__device__ __forceinline__ double natural_log(double u) { return log(u); }
__device__ __forceinline__ float power(float w, float r) { return powf(w, r); }
__device__ __forceinline__ double power(double w, double r) { return pow(w, r); }
__device__ __forceinline__ float fused(float a, float b, float c) { return fmaf(a, b, c); }
__device__ __forceinline__ double fused(double a, double b, double c) { return fma(a, b, c); }
__device__ __forceinline__ float magnitude(float x) { return fabsf(x); }
__device__ __forceinline__ double magnitude(double x) { return fabs(x); }
__device__ __forceinline__ float square_root(float x) { return sqrtf(x); }
__device__ __forceinline__ double square_root(double x) { return sqrt(x); }

// round(m / ln 2), and exp(x) / 2^power: as make_exp_ratio of ../cpu/elementary.py, for x and m of at
// most 2^12, 0 where the result would be subnormal. Maximum error: 1.05 ulp, as on the CPU.
__device__ __forceinline__ int power_near(float m) {
  return int(__float_as_uint(fmaf(m, 1.44269502f, 12582912.0f))) - 0x4b400000;
}

__device__ __forceinline__ float exp_ratio(float x, int power) {
  constexpr float LOG2_E = 1.44269502f, LN_2 = 0.693147182f, LN_2_REST = -1.90465421e-9f;
  constexpr float ROUNDER = 12582912.0f;
  const float shifted = fmaf(x, LOG2_E, ROUNDER);
  const float n = shifted - ROUNDER;
  const float r = fmaf(n, -LN_2_REST, fmaf(n, -LN_2, x));
  float p = 0.0013814599f;
  p = fmaf(p, r, 0.008368717f);
  p = fmaf(p, r, 0.04166839f);
  p = fmaf(p, r, 0.16666521f);
  p = fmaf(p, r, 0.49999994f);
  p = fmaf(fmaf(p, r, 1.0f), r, 1.0f);
  const int exponent = int(__float_as_uint(shifted)) - 0x4b400000 + 127 - power;
  return p * __uint_as_float(unsigned(exponent > 0 ? exponent : 0) << 23);
}

__device__ __forceinline__ int power_near(double m) { return int(rint(m * 1.4426950408889634)); }

__device__ __forceinline__ double exp_ratio(double x, int power) {
  const double n = rint(x * 1.4426950408889634);
  const double r = fma(n, -2.3190468138462996e-17, fma(n, -0.6931471805599453, x));
  const long long exponent = (long long)(n == n ? n : 0.0) - power + 1023;
  return exp(r) * __longlong_as_double((exponent > 0 ? exponent : 0) << 52);
}
