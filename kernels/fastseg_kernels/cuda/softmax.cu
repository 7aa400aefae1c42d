// Statistics and gradient where the classes of a voxel share one softmax.
//
// The mathematics is that of ../cpu/softmax.py. A task is a run of voxels of one sample, with all of
// its classes. A thread holds HELD voxels and walks over their classes: it reads each logit from
// memory once, and from the cache when it comes again. What a warp's voxels add to the sums of a
// class is added up by the warp, in one order, and written to a place of the warp's own: add_tasks
// adds up those places by their number.
#include "histograms.cuh"
#include "operands.cuh"
#include "reduction.cuh"

template <typename T, bool INDEXED, bool WEIGHTED, int FAMILIES = 0>
struct Softmax {
  typedef T Real;
  static constexpr bool indexed = INDEXED, weighted = WEIGHTED;
  static constexpr bool overlap = FAMILIES & OVERLAP, hard = FAMILIES & HARD;
  static constexpr bool l1 = FAMILIES & OVERLAP_L1, squared = FAMILIES & OVERLAP_SQUARED;
  static constexpr bool folded = l1 && INDEXED;  // as in points.cuh
  static constexpr bool curve = FAMILIES & CURVE, lovasz = FAMILIES & LOVASZ;
  static constexpr bool labels = FAMILIES & LABELS, sorted = FAMILIES & SORTED;
  static constexpr bool bends = squared || lovasz || sorted || (l1 && !INDEXED);  // dL/dq depends on q
  static constexpr bool ce = FAMILIES & CE, uniform = FAMILIES & CE_UNIFORM;
  static constexpr bool focal = FAMILIES & FOCAL_CE, logs = ce || uniform || focal;
  // Columns of the statistics, in the order of constants.columns.
  static constexpr int at_inner = 4, at_l1 = at_inner + (overlap ? 3 : 0);
  static constexpr int at_squared = at_l1 + (l1 ? 3 : 0), at_ce = at_squared + (squared ? 2 : 0);
  static constexpr int at_uniform = at_ce + ce, at_focal = at_uniform + uniform;
  static constexpr int at_hard = at_focal + focal;
  static constexpr int columns = at_hard + (hard ? 4 : 0);
};

constexpr int NOBODY = -1;  // class of a voxel that is left out
constexpr int CLASSES_AT_ONCE = 16;  // whose exponentials are added up before all are
constexpr long long NO_LABEL = -0x7fffffffffffffffLL - 1;

struct Any {};  // any element type, by its code; any strides

template <typename T, typename E>
struct Reader {
  static __device__ __forceinline__ T real(const char* address, long long) {
    return T(widened(element<E>(address)));
  }
  static __device__ __forceinline__ long long label(const char* address, long long) {
    return (long long)(element<E>(address));
  }
};

template <typename T>
struct Reader<T, Any> {
  static __device__ __forceinline__ T real(const char* address, long long code) {
    return read_real<T>(address, code);
  }
  // What is no integer is no class.
  static __device__ __forceinline__ long long label(const char* address, long long code) {
    if (code < CODE_FLOAT16) return read_integer(address, code);
    const double value = read_real<double>(address, code);
    const bool whole = magnitude(value) < 9007199254740992.0;
    const long long label = whole ? (long long)value : NO_LABEL;
    return whole && double(label) == value ? label : NO_LABEL;
  }
};

template <typename T>
struct Held {
  long long logits, targets, out;  // from the addresses of the operands, for class 0
  bool inside, kept, used;         // in the task; not left out; and of a weight that is not 0
  int target;                      // class, or NOBODY
  T weight, top, base, near, largest, left, scaled;
  int power;
};

// Finds the voxel and reads what it has once. Returns whether its label or weight is invalid.
template <typename V, typename E, typename P, typename I, typename T = typename V::Real>
__device__ __forceinline__ bool find(const Job& job, const Place& sample, long long i,
                                     long long end, Held<T>& v) {
  v.inside = i < end;
  const Place at = sample.voxel(job, I(v.inside ? i : end - 1));
  v.logits = at.logits;
  v.targets = at.targets;
  v.out = at.out;
  v.kept = v.inside;
  v.target = NOBODY;
  bool invalid = false;
  if (V::indexed) {
    const long long label = Reader<T, P>::label(job.targets.address + at.targets, job.targets.code);
    const bool ignored = job.has_ignore && label == job.ignore_label;
    const bool is_class = label >= 0 && label < job.classes;
    invalid = v.inside && !ignored && !is_class;
    v.kept &= !ignored && is_class;
    v.target = v.kept ? int(label) : NOBODY;
  }
  if (job.mask.address != nullptr && read_integer(job.mask.address + at.mask, job.mask.code) == 0) {
    v.kept = invalid = false;
    v.target = NOBODY;
  }
  v.weight = v.kept ? T(1) : T(0);
  if (V::weighted && v.kept) {
    v.weight = read_real<T>(job.weights.address + at.weights, job.weights.code);
    invalid |= !(v.weight >= T(0));
  }
  v.used = v.kept && v.weight != T(0);
  return invalid;
}

template <typename V, typename E, typename T = typename V::Real>
__device__ __forceinline__ T logit_of(const Job& job, const Held<T>& v, long long c) {
  const T x = Reader<T, E>::real(job.logits.address + v.logits + c * job.logits.stride_c, job.logits.code);
  return v.used ? x : T(0);
}

template <typename V, typename T = typename V::Real>
__device__ __forceinline__ T share_of(const Job& job, const Held<T>& v, long long c) {
  const char* address = job.targets.address + v.targets + c * job.targets.stride_c;
  return v.kept ? read_real<T>(address, job.targets.code) : T(0);
}

// By what the exponentials are taken, once the largest logit is known.
template <typename T>
__device__ __forceinline__ void refer(Held<T>& v) {
  const bool is_large = magnitude(v.top) > T(256);
  v.base = is_large ? v.top : T(0);
  v.near = is_large ? T(0) : v.top;
  v.power = power_near(v.near);
  v.largest = exp_ratio(v.near, v.power);
}

template <typename T>
__device__ __forceinline__ T exponential(const Held<T>& v, T x) {
  const T below = x == v.top ? v.near : x - v.base;  // inf - inf is 0 here
  return exp_ratio(below < T(-2048) ? T(-2048) : below, v.power);
}

// Finds the classes of the largest logit (also of a voxel of weight 0) and of the largest target.
// Returns whether a logit is NaN.
template <typename V, typename E, typename T = typename V::Real>
__device__ __forceinline__ bool judge(const Job& job, const Held<T>& v, int& predicted, int& label) {
  T best = T(0), strongest = T(0);
  bool is_nan = false;
  label = v.target;
  for (long long c = 0; c < job.classes; ++c) {
    const T x = Reader<T, E>::real(job.logits.address + v.logits + c * job.logits.stride_c, job.logits.code);
    is_nan |= x != x;
    if (c == 0 || x > best) {
      best = x;
      predicted = int(c);
    }
    if (V::indexed) continue;
    const T share = share_of<V>(job, v, c);
    if (c == 0 || share > strongest) {
      strongest = share;
      label = int(c);
    }
  }
  if (is_nan || !v.kept) predicted = NOBODY;
  if (!v.kept) label = NOBODY;
  return v.kept && is_nan;
}

// The sums of a thread's voxels for one class.
template <typename T>
struct ClassSums {
  T inner = 0, missed = 0, false_alarm = 0, target = 0, ce = 0, uniform = 0;
  T common = 0, short_by = 0, excess = 0, square = 0, focal = 0;
  int hits = 0, predicted = 0, truly = 0, invalid = 0;
};

// What all threads of a warp have, added up in every one of them.
template <typename N>
__device__ __forceinline__ N warp_sum(N value) {
  for (int distance = 16; distance > 0; distance /= 2)
    value += __shfl_xor_sync(0xffffffffu, value, distance);
  return value;
}

// grid: at most the tasks; block: THREADS. sums: (samples, classes, row_tasks * WARPS, columns).
// E, P: the types of logits and of class indices that lie in runs, or Any. I: counts the voxels of a
// sample.
template <typename V, int HELD, typename E, typename P, typename I>
__global__ void __launch_bounds__(THREADS, 1)
statistics_softmax(const __grid_constant__ Job job, double* __restrict__ sums,
                   const __grid_constant__ Counting counting) {
  typedef typename V::Real T;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const long long step = job.row_tasks * WARPS * V::columns;
  for (unsigned number = blockIdx.x; number < job.tasks; number += gridDim.x) {
    const unsigned in_row = unsigned(job.row_tasks), n = number / in_row, turn = number % in_row;
    const long long first = turn * job.task_voxels;
    const long long end = first + job.task_voxels < job.voxels ? first + job.task_voxels : job.voxels;
    const Place sample(job, n, 0);
    double* mine = sums + n * job.classes * step + (turn * (long long)WARPS + warp) * V::columns;
    if (lane < V::columns)
      for (long long c = 0; c < job.classes; ++c) mine[c * step + lane] = 0.0;
    for (long long start = first; start < end; start += THREADS * HELD) {
      Held<T> v[HELD];
      int predicted[HELD], labels[HELD];
      int voxels = 0, count = 0, invalid = 0, undefined = 0;
#pragma unroll
      for (int k = 0; k < HELD; ++k) {
        const long long i = start + k * THREADS + threadIdx.x;
        const bool is_wrong = find<V, E, P, I>(job, sample, i, end, v[k]);
        invalid += is_wrong;
        voxels += v[k].inside;
        count += v[k].kept || is_wrong;
        if (V::hard || V::curve) undefined += judge<V, E>(job, v[k], predicted[k], labels[k]);
      }
      // In each of these walks a thread has the loads of all its voxels under way at once.
      for (long long c = 0; c < job.classes; ++c) {
#pragma unroll
        for (int k = 0; k < HELD; ++k) {
          const T x = logit_of<V, E>(job, v[k], c);
          if (c == 0 || x > v[k].top) v[k].top = x;
        }
      }
      T rest[HELD], group[HELD], ties[HELD], own[HELD];
#pragma unroll
      for (int k = 0; k < HELD; ++k) {
        refer(v[k]);
        rest[k] = group[k] = ties[k] = T(0);
        own[k] = v[k].top;
      }
      for (long long c = 0; c < job.classes; ++c) {
        const bool is_last = c % CLASSES_AT_ONCE == CLASSES_AT_ONCE - 1;
#pragma unroll
        for (int k = 0; k < HELD; ++k) {
          const T x = logit_of<V, E>(job, v[k], c);
          const bool is_top = x == v[k].top;
          group[k] += is_top ? T(0) : exponential(v[k], x);
          ties[k] += is_top ? T(1) : T(0);
          if (V::indexed && v[k].target == c) own[k] = x;
          if (is_last) {
            rest[k] += group[k];
            group[k] = T(0);
          }
        }
      }
      T missed[HELD], nll[HELD], logs[HELD], focal[HELD];
      const T gamma = T(counting.gamma);
#pragma unroll
      for (int k = 0; k < HELD; ++k) {
        v[k].left = fused(ties[k] - T(1), v[k].largest, rest[k] + group[k]);
        v[k].scaled = v[k].weight / (v[k].left + v[k].largest);
        missed[k] = (v[k].left + (v[k].largest - exponential(v[k], own[k]))) * v[k].scaled;
        if (V::logs) {
          const T below = own[k] == v[k].top ? T(0) : v[k].top - own[k];
          logs[k] = v[k].weight * log_1p(v[k].left / v[k].largest);
          nll[k] = logs[k] + (v[k].used ? v[k].weight * below : T(0));
          if (V::focal && V::indexed) {
            const T wrong = (v[k].left + (v[k].largest - exponential(v[k], own[k]))) / (v[k].left + v[k].largest);
            const T its = log_1p(v[k].left / v[k].largest) + below;
            focal[k] = v[k].used ? v[k].weight * focal_loss(wrong, its, gamma) : T(0);
          }
        }
      }
      voxels = warp_sum(voxels);
      count = warp_sum(count);
      invalid = warp_sum(invalid);
      undefined = warp_sum(undefined);
      for (long long c = 0; c < job.classes; ++c) {
        ClassSums<T> s;
#pragma unroll
        for (int k = 0; k < HELD; ++k) {
          const T x = logit_of<V, E>(job, v[k], c), e = exponential(v[k], x), q = e * v[k].scaled;
          const T below = x == v[k].top ? T(0) : v[k].top - x;
          const T its_nll = logs[k] + (v[k].used ? v[k].weight * below : T(0));
          if (V::indexed) {
            const bool is_target = v[k].target == c;
            s.target += is_target ? v[k].weight : T(0);
            s.inner += is_target ? q : T(0);
            s.missed += is_target ? missed[k] : T(0);
            s.false_alarm += is_target ? T(0) : q;
            if (V::squared) {
              const T right = v[k].left + (v[k].largest - e);
              const T wrong = (is_target ? right : e) / (v[k].left + v[k].largest);
              s.square += v[k].weight * (wrong * wrong);
            }
            if (V::ce) s.ce += is_target ? nll[k] : T(0);
            if (V::focal) s.focal += is_target ? focal[k] : T(0);
          } else {
            const T p = share_of<V>(job, v[k], c);
            const bool valid = V::labels ? p == T(0) || p == T(1) : p >= T(0) && p <= T(1);
            s.invalid += v[k].kept && !valid;
            s.target += v[k].weight * p;
            s.inner += p * q;
            s.missed += p * ((v[k].left + (v[k].largest - e)) * v[k].scaled);
            s.false_alarm += (T(1) - p) * q;
            if (V::squared || V::l1) {
              const T sum = v[k].left + v[k].largest, right = v[k].left + (v[k].largest - e);
              add_bent<V>(s, p, e / sum, (p * right - (T(1) - p) * e) / sum, v[k].weight);
            }
            if (V::ce) s.ce += p != T(0) ? p * its_nll : T(0);
            if (V::focal && p != T(0) && v[k].used) {
              const T wrong = (v[k].left + (v[k].largest - e)) / (v[k].left + v[k].largest);
              const T nll = its_nll / v[k].weight;
              s.focal += p * (v[k].weight * focal_loss(wrong, nll, gamma));
            }
          }
          if ((V::curve || V::lovasz) && v[k].kept) {
            const T sum = v[k].left + v[k].largest;
            unsigned long long* row = counting.counts + (n * job.classes + c) * counting.columns;
            if (V::curve) count_prediction(row, e / sum, false, labels[k] == c);
            if (V::lovasz) {
              const bool is_target = V::indexed ? v[k].target == c : share_of<V>(job, v[k], c) != T(0);
              const T right = v[k].left + (v[k].largest - e);
              count_error(counting, row, (is_target ? right : e) / sum, is_target);
            }
          }
          if (V::uniform) s.uniform += its_nll;
          if (V::hard) {
            s.hits += predicted[k] == c && labels[k] == c;
            s.predicted += predicted[k] == c;
            s.truly += labels[k] == c;
          }
        }
        double column = 0.0;  // of this lane
        if (lane == 0) column = voxels;
        if (lane == 1) column = count;
        const int wrong = V::indexed ? (c == 0 ? invalid : 0) : warp_sum(s.invalid) + (c == 0 ? invalid : 0);
        if (lane == 2) column = wrong;
        const T target = warp_sum(s.target);
        if (lane == 3) column = double(target);
        if (V::overlap) {
          const T inner = warp_sum(s.inner), fn = warp_sum(s.missed), fp = warp_sum(s.false_alarm);
          if (lane == V::at_inner) column = double(inner);
          if (lane == V::at_inner + 1) column = double(fn);
          if (lane == V::at_inner + 2) column = double(fp);
        }
        if (V::l1) {
          const T common = warp_sum(V::folded ? s.inner : s.common);
          const T fn = warp_sum(V::folded ? s.missed : s.short_by);
          const T fp = warp_sum(V::folded ? s.false_alarm : s.excess);
          if (lane == V::at_l1) column = double(common);
          if (lane == V::at_l1 + 1) column = double(fn);
          if (lane == V::at_l1 + 2) column = double(fp);
        }
        if (V::squared) {
          const T product = warp_sum(s.inner), square = warp_sum(s.square);
          if (lane == V::at_squared) column = double(product);
          if (lane == V::at_squared + 1) column = double(square);
        }
        if (V::ce) {
          const T ce = warp_sum(s.ce);
          if (lane == V::at_ce) column = double(ce);
        }
        if (V::uniform) {
          const T uniform = warp_sum(s.uniform);
          if (lane == V::at_uniform) column = double(uniform);
        }
        if (V::focal) {
          const T of_focal = warp_sum(s.focal);
          if (lane == V::at_focal) column = double(of_focal);
        }
        if (V::hard) {
          const int hits = warp_sum(s.hits), over = warp_sum(s.predicted), truly = warp_sum(s.truly);
          if (lane == V::at_hard) column = hits;
          if (lane == V::at_hard + 1) column = over - hits;
          if (lane == V::at_hard + 2) column = truly - hits;
          if (lane == V::at_hard + 3) column = undefined;
        }
        if (lane < V::columns) mine[c * step + lane] += column;
      }
    }
  }
}

// The coefficients of a sample's classes, and the sum of b over the other classes.
template <typename T>
struct Pulls {
  T on, off, own, all, others, below, above, square, focal;
};

// u_c, by which a focal loss outweighs a cross-entropy; 0 where no other class is.
template <typename T>
__device__ __forceinline__ T steepness(const Held<T>& v, T x, T e, T gamma) {
  const T wrong = (v.left + (v.largest - e)) * v.scaled;
  if (wrong == T(0)) return T(0);
  const T nll = log_1p(v.left / v.largest) + (x == v.top ? T(0) : v.top - x);
  return focal_slope(wrong, e * v.scaled, nll, gamma) / wrong;
}

// h_c = dL/dq_c; q and rest = 1 - q are used where it depends on them.
template <typename V, typename T>
__device__ __forceinline__ T slope_of(const Pulls<T>& k, const double* table,
                                      const Counting& counting, T given, T p, T q, T rest) {
  const T linear = k.on * p + k.off * (T(1) - p);
  if (!V::bends) return linear;
  const T of_form[COEFFICIENTS] = {0, 0, 0, 0, k.below, k.above, k.square};
  const T value = linear + bent<V>(p * rest - (T(1) - p) * q, of_form);
  if (V::sorted) return value + given;
  if (!V::lovasz) return value;
  const bool positive = p != T(0);
  const T of_error = slope_of_error(counting, table, positive ? rest : q, positive);
  return value + (positive ? -of_error : of_error);
}

// grid: at most the tasks; block: THREADS. coefficients: (samples, classes, COEFFICIENTS). The output may be the
// logits: a thread reads all of a voxel's before it writes one.
template <typename V, typename E, typename P, typename I>
__global__ void __launch_bounds__(THREADS, sizeof(typename V::Real) == 8 && V::focal ? 1 : 2)
gradient_softmax(const __grid_constant__ Job job, const double* __restrict__ coefficients,
                 const __grid_constant__ Counting counting) {
  typedef typename V::Real T;
  __shared__ Pulls<T> pulls[SOFTMAX_CLASSES];
  const long long width = COEFFICIENTS + (V::lovasz ? 2 * counting.bins : V::sorted ? 2 : 0);
  const double* exact = coefficients;  // of the sample
  unsigned of_sample = 0xffffffffu;
  for (unsigned turn = blockIdx.x; turn < job.tasks; turn += gridDim.x) {
    const unsigned number = unsigned(job.tasks) - 1 - turn, in_row = unsigned(job.row_tasks);
    const unsigned n = number / in_row;
    const long long first = number % in_row * job.task_voxels;
    const long long end = first + job.task_voxels < job.voxels ? first + job.task_voxels : job.voxels;
    if (n != of_sample) {
      __syncthreads();  // those of the sample before may still be read
      exact = coefficients + n * job.classes * width;
      double of_all = 0.0;
      for (long long c = 0; c < job.classes; ++c) of_all += exact[c * width + 3];
      for (long long c = threadIdx.x; c < job.classes; c += THREADS) {
        const double* k = exact + c * width;
        const double on = V::folded ? k[0] + k[4] : k[0], off = V::folded ? k[1] + k[5] : k[1];
        pulls[c] = {T(on), T(off), T(k[2]), T(k[3]), T(of_all - k[3]), T(k[4]), T(k[5]), T(k[6]), T(k[9])};
      }
      __syncthreads();
      of_sample = n;
    }
    const Place sample(job, n, 0);
    const T gamma = T(exact[11]);
    const auto table_of = [&](long long c) { return exact + c * width + COEFFICIENTS; };
    for (long long i = first + threadIdx.x; i < end; i += THREADS) {
      Held<T> v;
      find<V, E, P, I>(job, sample, i, end, v);
      const auto given = [&](long long c) {
        if (!V::sorted) return T(0);
        return static_cast<const T*>(counting.slopes)[(n * job.classes + c) * job.voxels + i];
      };
      // T_c, once q_c is known if it depends on it.
      const auto weigh = [&](long long c, T x, T e, T p) {
        T own = pulls[c].own;
        if (V::focal && p != T(0)) own += pulls[c].focal * steepness(v, x, e, gamma);
        return own * p;
      };
      int top_class = 0;
      T strongest = T(0);  // of the T_c of soft targets
      for (long long c = 0; c < job.classes; ++c) {
        const T x = logit_of<V, E>(job, v, c);
        if (c == 0 || x > v.top) {
          v.top = x;
          top_class = int(c);
        }
        if (!V::indexed && !V::focal) {
          const T pull = pulls[c].own * share_of<V>(job, v, c);
          strongest = pull > strongest ? pull : strongest;
        }
      }
      refer(v);
      const T share_of_top = V::indexed ? T(v.target == top_class) : share_of<V>(job, v, top_class);
      T h_top = V::bends ? T(0) : slope_of<V>(pulls[top_class], table_of(top_class), counting, given(top_class), share_of_top, T(0), T(0));
      T rest = T(0), ties = T(0), mean = T(0), pull = T(0), equal = T(0);
      for (long long begin = 0; begin < job.classes; begin += CLASSES_AT_ONCE) {
        T group = T(0), of_mean = T(0), of_pull = T(0);
        for (long long c = begin; c < begin + CLASSES_AT_ONCE && c < job.classes; ++c) {
          const T x = logit_of<V, E>(job, v, c), e = exponential(v, x);
          const bool is_top = x == v.top;
          group += is_top ? T(0) : e;
          ties += is_top ? T(1) : T(0);
          const T p = V::indexed ? T(v.target == c) : share_of<V>(job, v, c);
          if (!V::bends) of_mean = fused(e, slope_of<V>(pulls[c], table_of(c), counting, given(c), p, T(0), T(0)) - h_top, of_mean);
          if (!V::indexed && !V::focal) {
            const T its = pulls[c].own * p;
            of_pull += its == strongest ? T(0) : its;
            equal += its == strongest ? T(1) : T(0);
          }
        }
        rest += group;
        mean += of_mean;
        pull += of_pull;
      }
      v.left = fused(ties - T(1), v.largest, rest);
      v.scaled = T(1) / (v.left + v.largest);
      if (V::indexed && v.target != NOBODY) {
        const T x = logit_of<V, E>(job, v, v.target);
        strongest = weigh(v.target, x, exponential(v, x), T(1));
      } else if (!V::indexed && V::focal) {  // two more walks
        for (long long c = 0; c < job.classes; ++c) {
          const T x = logit_of<V, E>(job, v, c), its = weigh(c, x, exponential(v, x), share_of<V>(job, v, c));
          strongest = its > strongest ? its : strongest;
        }
        for (long long begin = 0; begin < job.classes; begin += CLASSES_AT_ONCE) {
          T of_pull = T(0);
          for (long long c = begin; c < begin + CLASSES_AT_ONCE && c < job.classes; ++c) {
            const T x = logit_of<V, E>(job, v, c), its = weigh(c, x, exponential(v, x), share_of<V>(job, v, c));
            of_pull += its == strongest ? T(0) : its;
            equal += its == strongest ? T(1) : T(0);
          }
          pull += of_pull;
        }
      }
      if (V::bends) {  // another walk, with q known
        h_top = slope_of<V>(pulls[top_class], table_of(top_class), counting, given(top_class), share_of_top, v.largest * v.scaled, v.left * v.scaled);
        for (long long begin = 0; begin < job.classes; begin += CLASSES_AT_ONCE) {
          T of_mean = T(0);
          for (long long c = begin; c < begin + CLASSES_AT_ONCE && c < job.classes; ++c) {
            const T e = exponential(v, logit_of<V, E>(job, v, c));
            const T p = V::indexed ? T(v.target == c) : share_of<V>(job, v, c);
            const T rest = (v.left + (v.largest - e)) * v.scaled;
            of_mean = fused(e, slope_of<V>(pulls[c], table_of(c), counting, given(c), p, e * v.scaled, rest) - h_top, of_mean);
          }
          mean += of_mean;
        }
      }
      mean *= v.scaled;
      for (long long c = 0; c < job.classes; ++c) {
        const T x = logit_of<V, E>(job, v, c), e = exponential(v, x), q = e * v.scaled;
        const T p = V::indexed ? T(v.target == c) : share_of<V>(job, v, c);
        const T wrong = (v.left + (v.largest - e)) * v.scaled;
        const T h = slope_of<V>(pulls[c], table_of(c), counting, given(c), p, q, wrong);
        T here = V::indexed ? (v.target == c ? strongest : T(0)) : weigh(c, x, e, p), there;
        if (V::indexed) there = v.target == c ? T(0) : strongest;
        else if (here == strongest) there = pull + (equal - T(1)) * strongest;
        else there = (pull + equal * strongest) - here;
        const T region = (h - h_top) - mean;
        const T value = q * (region + (there + pulls[c].others)) - (here + pulls[c].all) * wrong;
        const T g = v.used ? v.weight * value : T(0);
        write_real(job.out.address + v.out + c * job.out.stride_c, job.out.code, g);
      }
    }
  }
}

// Writes abs(p - q), (samples, classes, voxels), as errors_anywhere. grid: at most the tasks; block:
// THREADS.
template <typename V, typename E, typename P, typename I>
__global__ void __launch_bounds__(THREADS, 1)
errors_softmax(const __grid_constant__ Job job, typename V::Real* __restrict__ errors) {
  typedef typename V::Real T;
  for (unsigned number = blockIdx.x; number < job.tasks; number += gridDim.x) {
    const unsigned in_row = unsigned(job.row_tasks), n = number / in_row;
    const long long first = number % in_row * job.task_voxels;
    const long long end = first + job.task_voxels < job.voxels ? first + job.task_voxels : job.voxels;
    const Place sample(job, n, 0);
    for (long long i = first + threadIdx.x; i < end; i += THREADS) {
      Held<T> v;
      find<V, E, P, I>(job, sample, i, end, v);
      for (long long c = 0; c < job.classes; ++c) {
        const T x = logit_of<V, E>(job, v, c);
        if (c == 0 || x > v.top) v.top = x;
      }
      refer(v);
      T rest = T(0), ties = T(0);
      for (long long begin = 0; begin < job.classes; begin += CLASSES_AT_ONCE) {
        T group = T(0);
        for (long long c = begin; c < begin + CLASSES_AT_ONCE && c < job.classes; ++c) {
          const T x = logit_of<V, E>(job, v, c);
          group += x == v.top ? T(0) : exponential(v, x);
          ties += x == v.top ? T(1) : T(0);
        }
        rest += group;
      }
      v.left = fused(ties - T(1), v.largest, rest);
      v.scaled = T(1) / (v.left + v.largest);
      for (long long c = 0; c < job.classes; ++c) {
        const T e = exponential(v, logit_of<V, E>(job, v, c));
        const bool positive = V::indexed ? v.target == c : share_of<V>(job, v, c) != T(0);
        const T error = (positive ? v.left + (v.largest - e) : e) * v.scaled;
        const T size = v.kept ? error : T(0);
        errors[(n * job.classes + c) * job.voxels + i] = positive ? -size : size;
      }
    }
  }
}
