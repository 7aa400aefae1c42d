// What one voxel adds to the sums, and its gradient: the mathematics of the overlap family.
//
// The functions and their reasons are those of ../cpu/points.py. A variant is a type: the element
// type that is computed in, the kind of targets and of predictions, and the families of sums.
#pragma once
#include "elementary.cuh"

enum Targets { BINARY, SOFT, WEIGHTED };
enum Activation { SIGMOID, PROBS };
enum Families { OVERLAP = 1, BCE = 2, BCE_SPLIT = 4, HARD = 8 };

template <typename T, int TARGETS, int ACTIVATION, int FAMILIES = 0>
struct Variant {
  typedef T Real;
  static constexpr bool binary = TARGETS == BINARY, weighted = TARGETS == WEIGHTED;
  static constexpr bool probs = ACTIVATION == PROBS;
  static constexpr bool overlap = FAMILIES & OVERLAP, hard = FAMILIES & HARD;
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
  int hits = 0, predicted = 0, foreground = 0, undefined = 0, invalid = 0, count = 0;
};

template <typename V, typename T = typename V::Real>
__device__ __forceinline__ void add_logits(Sums<T>& s, T x, T p, T w) {
  const T size = magnitude(x), other = T(1) - p, e = exp_negative(size);
  const bool positive = x >= T(0);
  if (V::overlap) {
    const T large = reciprocal(T(1) + e), small = e * large;
    const T q = positive ? large : small, rest = positive ? small : large;
    if (V::binary) {
      s.inner += p != T(0) ? q : T(0);
      s.missed += p != T(0) ? rest : T(0);
      s.false_alarm += p != T(0) ? T(0) : q;
    } else {
      s.inner += w * p * q;
      s.missed += w * p * rest;
      s.false_alarm += w * other * q;
    }
  }
  if (V::split && V::binary) {
    const bool is_target = p != T(0);
    const T e_pos = is_target ? e : T(0), e_neg = is_target ? T(0) : e;
    s.product_pos = fused(s.product_pos, e_pos, s.product_pos + e_pos);
    s.product_neg = fused(s.product_neg, e_neg, s.product_neg + e_neg);
    s.bce_pos += is_target && x < T(0) ? size : T(0);
    s.bce_neg += !is_target && positive ? size : T(0);
  } else if (V::split) {
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
  if (V::overlap) {
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
  s.target += v.w * v.p;
  const bool valid = V::binary ? v.p == T(0) || v.p == T(1) : v.p >= T(0) && v.p <= T(1);
  const bool outside = V::probs && (v.x < T(0) || v.x > T(1));
  s.invalid += !valid || outside || (V::weighted && !(v.w >= T(0)));
  if (V::hard) {
    const bool over = v.x >= threshold, is_target = v.p >= T(0.5);
    s.predicted += over;
    s.foreground += is_target;
    s.hits += over && is_target;
    s.undefined += v.x != v.x;
  }
  const T x = V::weighted && v.w == T(0) ? T(0) : v.x;  // weight 0: whatever is stored there
  if (V::probs) add_probs<V>(s, x, v.p, v.w);
  else add_logits<V>(s, x, v.p, v.w);
}

// dL/dx from (on_target, off_target, bce_target, bce_other), which carry every scale.
template <typename V, typename T = typename V::Real>
__device__ __forceinline__ T slope(Voxel<T> v, const T* k) {
  const T x = V::weighted && v.w == T(0) ? T(0) : v.x, p = v.p, other = T(1) - p;
  T value;
  if (V::probs) {
    const T rest = T(1) - x, spread = x * rest;
    value = k[0] * p + k[1] * other;
    value += (k[3] * other * x - k[2] * p * rest) / (spread < T(1e-12) ? T(1e-12) : spread);
  } else {
    const T e = exp_negative(magnitude(x)), large = reciprocal(T(1) + e);
    const T small = fused(-e, e * large, e), spread = fused(-small, small, small);
    const bool positive = x >= T(0);
    if (V::binary) {
      const bool is_target = p != T(0);
      const T wrong = positive != is_target ? large : small;
      return fused(is_target ? -k[2] : k[3], wrong, (is_target ? k[0] : k[1]) * spread);
    }
    const T q = positive ? large : small, rest = positive ? small : large;
    value = fused(k[3] * other, q, (k[0] * p + k[1] * other) * spread) - k[2] * p * rest;
  }
  return V::weighted ? v.w * value : value;
}
