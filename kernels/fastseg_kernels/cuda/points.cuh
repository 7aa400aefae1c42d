// What one voxel adds to the sums, and its gradient: the mathematics of the overlap family.
//
// The functions and their reasons are those of ../cpu/points.py. A variant is a type: the element
// type that is computed in, the kind of targets and of predictions, and the families of sums.
#pragma once
#include "elementary.cuh"

enum Targets { BINARY, SOFT, WEIGHTED };
enum Activation { SIGMOID, PROBS };
enum Families {
  OVERLAP = 1, BCE = 2, BCE_SPLIT = 4, HARD = 8, CE = 16, CE_UNIFORM = 32, OVERLAP_L1 = 64,
  OVERLAP_SQUARED = 128, CURVE = 256, LOVASZ = 512, LABELS = 1024, SORTED = 2048
};

template <typename T, int TARGETS, int ACTIVATION, int FAMILIES = 0>
struct Variant {
  typedef T Real;
  static constexpr bool binary = TARGETS == BINARY, weighted = TARGETS == WEIGHTED;
  static constexpr bool probs = ACTIVATION == PROBS;
  static constexpr bool overlap = FAMILIES & OVERLAP, hard = FAMILIES & HARD;
  static constexpr bool l1 = FAMILIES & OVERLAP_L1, squared = FAMILIES & OVERLAP_SQUARED;
  // With targets of 0 and 1 min(p, q) is p q: these sums then serve as those, and these slopes.
  static constexpr bool folded = l1 && binary && !probs;
  static constexpr bool curve = FAMILIES & CURVE, lovasz = FAMILIES & LOVASZ;
  static constexpr bool labels = FAMILIES & LABELS, sorted = FAMILIES & SORTED;
  static constexpr bool products = overlap || squared || folded;
  static constexpr bool split = FAMILIES & BCE_SPLIT, bce = split || (FAMILIES & BCE);
  // Thread blocks that a multiprocessor is to hold at once while it adds up rows in place: by this
  // the compiler allots registers, and left to itself it spills some to have more blocks.
  static constexpr int resident = sizeof(T) == 8 || split ? 1 : 3;
};

template <typename T>
struct Voxel {
  T x, p, w;      // prediction, target, weight (1 unless weighted)
  bool left_out;  // by the mask or ignore_index: nothing else of it may be used then
};

// Sums of a few voxels of one thread, in the type that is computed in.
template <typename T>
struct Sums {
  T product_pos = 0, bce_pos = 0, product_neg = 0, bce_neg = 0;
  T inner = 0, missed = 0, false_alarm = 0, target = 0;
  T common = 0, short_by = 0, excess = 0, square = 0;  // of min(p, q), p - q, q - p, (p - q)^2
  int hits = 0, predicted = 0, foreground = 0, undefined = 0, invalid = 0, count = 0;
};

// Counts of a prediction and its target; `foreground` and `undefined` are counted by the caller.
template <typename V, typename T = typename V::Real>
__device__ __forceinline__ void add_hard(Sums<T>& s, T x, bool is_target, T threshold) {
  if (!V::hard) return;
  const bool over = x >= threshold;
  s.predicted += over;
  s.hits += over && is_target;
}

// One voxel whose target is 0 or 1. Its BCE is log(1 + exp(-|x|)), and |x| more where the logit is on
// the wrong side. Errors near 0, and near 1, keep their digits: neither is formed as a difference.
// QUICK: it is a number of half precision, and the quick exp will do.
template <typename V, bool QUICK, typename T = typename V::Real>
__device__ __forceinline__ void add_binary(Sums<T>& s, T x, bool is_target) {
  if (!V::products && !V::bce) return;
  const T size = magnitude(x);
  const T e = QUICK ? quick_exp_negative(size) : exp_negative(size);
  const bool wrong = (x >= T(0)) != is_target;
  if (V::products) {
    const T large = QUICK ? reciprocal(T(1) + e) : newton_reciprocal(T(1) + e);
    const T small = e * large;
    const T error = wrong ? large : small, right = wrong ? small : large;
    if (V::squared) s.square = fused(error, error, s.square);
    if (is_target) {
      s.missed += error;
      s.inner += right;
    } else {
      s.false_alarm += error;
    }
  }
  if (V::split && !is_target) {
    s.product_neg = fused(s.product_neg, e, s.product_neg + e);
    if (wrong) s.bce_neg += size;
  } else if (V::bce) {
    s.product_pos = fused(s.product_pos, e, s.product_pos + e);
    if (wrong) s.bce_pos += size;
  }
}

// What the l1 and squared forms add up.
template <typename V, typename S, typename T>
__device__ __forceinline__ void add_bent(S& s, T p, T q, T difference, T w) {
  if (V::l1 && !V::folded) {
    s.common += w * (difference > T(0) ? q : p);
    s.short_by += w * (difference > T(0) ? difference : T(0));
    s.excess += w * (difference >= T(0) ? T(0) : -difference);  // NaN is here
  }
  if (V::squared) s.square += w * (difference * difference);
}

// What they add to dL/dq. k: the coefficients of a row.
template <typename V, typename T>
__device__ __forceinline__ T bent(T difference, const T* k) {
  T value = T(0);
  if (V::l1 && !V::folded) {
    const T side = difference > T(0) ? k[4] : k[5];
    value = difference != T(0) ? side : T(0.5) * (k[4] + k[5]);
  }
  return V::squared ? fused(-k[6], difference, value) : value;
}

// One voxel of a soft target, or with a weight.
template <typename V, typename T = typename V::Real>
__device__ __forceinline__ void add_soft(Sums<T>& s, T x, T p, T w) {
  const T size = magnitude(x), other = T(1) - p, e = exp_negative(size);
  const bool positive = x >= T(0);
  if (V::products || V::l1) {
    const T large = newton_reciprocal(T(1) + e), small = e * large;
    const T q = positive ? large : small, rest = positive ? small : large;
    add_bent<V>(s, p, q, p * rest - other * q, w);
    s.inner += w * p * q;
    s.missed += w * p * rest;
    s.false_alarm += w * other * q;
  }
  if (V::split) {
    const T rest = log_1p(e);
    if (p != T(0)) s.bce_pos += w * p * ((x < T(0) ? size : T(0)) + rest);
    if (other != T(0)) s.bce_neg += w * other * ((x > T(0) ? size : T(0)) + rest);
    if (x != x) s.bce_pos += x, s.bce_neg += x;
  } else if (V::bce) {
    const T share = positive ? other : p;
    const T excess = share != T(0) ? size * share : T(0);
    if (V::weighted) {
      s.bce_pos += w * (excess + log_1p(e));
    } else {
      s.product_pos = fused(s.product_pos, e, s.product_pos + e);
      s.bce_pos += excess;
    }
  }
}

// Both logarithms are clamped at -100, as PyTorch does.
template <typename V, typename T = typename V::Real>
__device__ __forceinline__ void add_probs(Sums<T>& s, T x, T p, T w) {
  const T other = T(1) - p, rest = T(1) - x;
  add_bent<V>(s, p, x, p - x, w);
  if (V::products) {
    s.inner += w * p * x;
    s.missed += w * p * rest;
    s.false_alarm += w * other * x;
  }
  if (V::bce) {
    const T log_q = natural_log(x), log_rest = log_1p(-x);
    const T pos = -p * (log_q < T(-100) ? T(-100) : log_q);
    const T neg = -other * (log_rest < T(-100) ? T(-100) : log_rest);
    s.bce_pos += w * (V::split ? pos : pos + neg);
    if (V::split) s.bce_neg += w * neg;
  }
}

template <typename V, typename T = typename V::Real>
__device__ __forceinline__ void add(Sums<T>& s, Voxel<T> v, T threshold) {
  ++s.count;
  const bool is_label = v.p == T(0) || v.p == T(1);
  const bool valid = V::binary || V::labels ? is_label : v.p >= T(0) && v.p <= T(1);
  const bool outside = V::probs && (v.x < T(0) || v.x > T(1)), is_target = v.p >= T(0.5);
  s.invalid += !valid || outside || (V::weighted && !(v.w >= T(0)));
  s.foreground += is_target;
  if (!V::binary) s.target += v.w * v.p;
  add_hard<V>(s, v.x, is_target, threshold);
  s.undefined += v.x != v.x;
  const T x = V::weighted && v.w == T(0) ? T(0) : v.x;  // weight 0: whatever is stored there
  if (V::probs) add_probs<V>(s, x, v.p, v.w);
  else if (V::binary) add_binary<V, false>(s, x, is_target);
  else add_soft<V>(s, x, v.p, v.w);
}

// dL/dx from (on_target, off_target, bce_target, bce_other, below, above, square), which carry every
// scale; `folded`: the first two have what belongs to them of below and above. QUICK: it is
// going to be rounded to half precision, and the quick exp will do.
template <typename V, bool QUICK, typename T = typename V::Real>
__device__ __forceinline__ T slope(Voxel<T> v, const T* k) {
  const T x = V::weighted && v.w == T(0) ? T(0) : v.x, p = v.p, other = T(1) - p;
  T value;
  if (V::probs) {
    const T rest = T(1) - x, spread = x * rest;
    value = k[0] * p + k[1] * other + bent<V>(p - x, k);
    value += (k[3] * other * x - k[2] * p * rest) / (spread < T(1e-12) ? T(1e-12) : spread);
  } else {
    const T size = magnitude(x), e = QUICK ? quick_exp_negative(size) : exp_negative(size);
    const T large = QUICK ? reciprocal(T(1) + e) : newton_reciprocal(T(1) + e);
    const T small = fused(-e, e * large, e), spread = fused(-small, small, small);
    const bool positive = x >= T(0);
    if (V::binary) {
      const bool is_target = p != T(0);
      const T wrong = positive != is_target ? large : small;
      T region = is_target ? k[0] : k[1];
      if (V::squared) region = fused(k[6], is_target ? -wrong : wrong, region);
      return fused(is_target ? -k[2] : k[3], wrong, region * spread);
    }
    const T q = positive ? large : small, rest = positive ? small : large;
    const T region = k[0] * p + k[1] * other + bent<V>(p * rest - other * q, k);
    value = fused(k[3] * other, q, region * spread) - k[2] * p * rest;
  }
  return V::weighted ? v.w * value : value;
}
