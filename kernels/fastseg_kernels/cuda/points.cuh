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
  OVERLAP_SQUARED = 128, CURVE = 256, LOVASZ = 512, LABELS = 1024, SORTED = 2048,
  BCE_FLIPPED = 4096, FOCAL_BCE = 8192, FOCAL_CE = 16384
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
  static constexpr bool flipped = FAMILIES & BCE_FLIPPED, focal = FAMILIES & FOCAL_BCE;
  // Thread blocks that a multiprocessor is to hold at once while it adds up rows in place: by this
  // the compiler allots registers, and left to itself it spills some to have more blocks.
  static constexpr int resident = sizeof(T) == 8 || split || focal ? 1 : 3;
};

template <typename T>
struct Voxel {
  T x, p, w;      // prediction, target, weight (1 unless weighted)
  bool left_out;  // by the mask or ignore_index: nothing else of it may be used then
};

// Numbers that the sums of a voxel depend on.
template <typename T>
struct Settings {
  T threshold, gamma;
};

// Sums of a few voxels of one thread, in the type that is computed in.
template <typename T>
struct Sums {
  T product_pos = 0, bce_pos = 0, product_neg = 0, bce_neg = 0;
  T flipped_pos = 0, flipped_neg = 0, focal_pos = 0, focal_neg = 0;
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

// w^gamma, by products as far as gamma is whole.
template <typename T>
__device__ __forceinline__ T focal_power(T w, T gamma) {
  const int whole = int(gamma < T(7) ? gamma : T(7));
  const T square = w * w, rest = gamma - T(whole);
  T value = whole & 1 ? w : T(1);
  if (whole & 2) value *= square;
  if (whole & 4) value *= square * square;
  return rest > T(0) ? value * power(w, rest) : value;
}

// The focal loss w^gamma softplus(z), and its slope to z. w: sigma(z); right: sigma(-z); nll: softplus(z).
template <typename T>
__device__ __forceinline__ T focal_loss(T w, T nll, T gamma) {
  return w != T(0) ? focal_power(w, gamma) * nll : nll;
}
template <typename T>
__device__ __forceinline__ T focal_slope(T w, T right, T nll, T gamma) {
  return focal_power(w, gamma) * fused(gamma, right != T(0) ? right * nll : T(0), w);
}

// One voxel whose target is 0 or 1. Its BCE is log(1 + exp(-|x|)), and |x| more where the logit is on
// the wrong side. Errors near 0, and near 1, keep their digits: neither is formed as a difference.
// QUICK: it is a number of half precision, and the quick exp will do.
template <typename V, bool QUICK, typename T = typename V::Real>
__device__ __forceinline__ void add_binary(Sums<T>& s, T x, bool is_target, T gamma) {
  if (!V::products && !V::bce && !V::focal) return;
  const T size = magnitude(x);
  const T e = QUICK ? quick_exp_negative(size) : exp_negative(size);
  const bool wrong = (x >= T(0)) != is_target;
  if (V::focal) {
    const T log = log_1p(e), large = newton_reciprocal(T(1) + e), error = wrong ? large : e * large;
    (is_target ? s.focal_pos : s.focal_neg) += focal_loss(error, log + (wrong ? size : T(0)), gamma);
  }
  if (V::flipped && !wrong) (is_target ? s.flipped_pos : s.flipped_neg) += size;
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
__device__ __forceinline__ void add_soft(Sums<T>& s, T x, T p, T w, T gamma) {
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
  if (V::flipped || V::focal) {
    const T log = log_1p(e), low = log + (x > T(0) ? T(0) : size), high = log + (x < T(0) ? T(0) : size);
    if (V::flipped && p != T(0)) s.flipped_pos += w * p * high;
    if (V::flipped && other != T(0)) s.flipped_neg += w * other * low;
    if (V::focal) {
      const T large = newton_reciprocal(T(1) + e), small = e * large;
      const T q = positive ? large : small, rest = positive ? small : large;
      if (p != T(0)) s.focal_pos += w * p * focal_loss(rest, low, gamma);
      if (other != T(0)) s.focal_neg += w * other * focal_loss(q, high, gamma);
      if (x != x) s.focal_pos += x, s.focal_neg += x;
    }
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

// -log q, at most 100, as in PyTorch; NaN for NaN.
template <typename T>
__device__ __forceinline__ T nll_of(T log) {
  return log < T(-100) ? T(100) : -log;
}

template <typename V, typename T = typename V::Real>
__device__ __forceinline__ void add_probs(Sums<T>& s, T x, T p, T w, T gamma) {
  const T other = T(1) - p, rest = T(1) - x;
  add_bent<V>(s, p, x, p - x, w);
  if (V::products) {
    s.inner += w * p * x;
    s.missed += w * p * rest;
    s.false_alarm += w * other * x;
  }
  if (V::focal) {
    const T low = nll_of(natural_log(x)), high = nll_of(log_1p(-x));
    s.focal_pos += w * (p * focal_loss(rest, low, gamma));
    s.focal_neg += w * (other * focal_loss(x, high, gamma));
  }
  if (V::bce) {
    const T pos = p * nll_of(natural_log(x)), neg = other * nll_of(log_1p(-x));
    s.bce_pos += w * (V::split ? pos : pos + neg);
    if (V::split) s.bce_neg += w * neg;
  }
}

template <typename V, typename T = typename V::Real>
__device__ __forceinline__ void add(Sums<T>& s, Voxel<T> v, Settings<T> settings) {
  ++s.count;
  const bool is_label = v.p == T(0) || v.p == T(1);
  const bool valid = V::binary || V::labels ? is_label : v.p >= T(0) && v.p <= T(1);
  const bool outside = V::probs && (v.x < T(0) || v.x > T(1)), is_target = v.p >= T(0.5);
  s.invalid += !valid || outside || (V::weighted && !(v.w >= T(0)));
  s.foreground += is_target;
  if (!V::binary) s.target += v.w * v.p;
  add_hard<V>(s, v.x, is_target, settings.threshold);
  s.undefined += v.x != v.x;
  const T x = V::weighted && v.w == T(0) ? T(0) : v.x;  // weight 0: whatever is stored there
  if (V::probs) add_probs<V>(s, x, v.p, v.w, settings.gamma);
  else if (V::binary) add_binary<V, false>(s, x, is_target, settings.gamma);
  else add_soft<V>(s, x, v.p, v.w, settings.gamma);
}

// dL/dx from the coefficients of ../cpu/points.py, which carry every scale; `folded`: the first two
// have what belongs to them of below and above. QUICK: it is going to be rounded to half precision,
// and the quick exp will do.
template <typename V, bool QUICK, typename T = typename V::Real>
__device__ __forceinline__ T slope(Voxel<T> v, const T* k) {
  const T x = V::weighted && v.w == T(0) ? T(0) : v.x, p = v.p, other = T(1) - p;
  T value;
  if (V::probs) {
    const T rest = T(1) - x, spread = x * rest;
    value = k[0] * p + k[1] * other + bent<V>(p - x, k);
    T of_logit = k[3] * other * x - k[2] * p * rest;
    if (V::focal) {
      const T low = nll_of(natural_log(x)), high = nll_of(log_1p(-x));
      of_logit += k[10] * other * focal_slope(x, rest, high, k[11]);
      of_logit -= k[9] * p * focal_slope(rest, x, low, k[11]);
    }
    value += of_logit / (spread < T(1e-12) ? T(1e-12) : spread);
  } else {
    const T size = magnitude(x), e = QUICK ? quick_exp_negative(size) : exp_negative(size);
    const T large = QUICK ? reciprocal(T(1) + e) : newton_reciprocal(T(1) + e);
    const T small = fused(-e, e * large, e), spread = fused(-small, small, small);
    const bool positive = x >= T(0);
    if (V::binary) {
      const bool is_target = p != T(0);
      const bool is_wrong = positive != is_target;
      const T wrong = is_wrong ? large : small, right = is_wrong ? small : large;
      T region = is_target ? k[0] : k[1];
      if (V::squared) region = fused(k[6], is_target ? -wrong : wrong, region);
      value = fused(is_target ? -k[2] : k[3], wrong, region * spread);
      if (V::flipped) value = fused(is_target ? k[7] : -k[8], right, value);
      if (V::focal) {
        const T nll = log_1p(e) + (is_wrong ? size : T(0));
        value = fused(is_target ? -k[9] : k[10], focal_slope(wrong, right, nll, k[11]), value);
      }
      return value;
    }
    const T q = positive ? large : small, rest = positive ? small : large;
    const T region = k[0] * p + k[1] * other + bent<V>(p * rest - other * q, k);
    value = fused(k[3] * other, q, region * spread) - k[2] * p * rest;
    if (V::flipped) value += k[7] * p * q - k[8] * other * rest;
    if (V::focal) {
      const T log = log_1p(e), low = log + (x < T(0) ? size : T(0)), high = log + (x > T(0) ? size : T(0));
      value += k[10] * other * focal_slope(q, rest, high, k[11]);
      value -= k[9] * p * focal_slope(rest, q, low, k[11]);
    }
  }
  return V::weighted ? v.w * value : value;
}
