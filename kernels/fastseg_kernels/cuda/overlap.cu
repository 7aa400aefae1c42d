// Statistics and gradient of the overlap family: the two passes over a volume.
//
// A task is a run of voxels of one row, its length fixed by the row's alone; a thread block takes
// tasks in turns and writes the sums of each to a place of its own, and a second kernel adds up the
// tasks of a row by their number. Which thread adds which voxel is fixed too. So the bits depend on
// neither the size of the grid nor the order in which blocks come.
#include "histograms.cuh"
#include "operands.cuh"
#include "reduction.cuh"

// Where a task's voxels are.
struct Run {
  long long row, n, c, first, end;

  // In 32 bits: a 64-bit division is a call, around which registers are spilt.
  __device__ __forceinline__ Run(const Job& job, unsigned number) {
    const unsigned in_row = unsigned(job.row_tasks), classes = unsigned(job.classes);
    const unsigned which = number / in_row;
    row = which;
    n = which / classes;
    c = which % classes;
    first = number % in_row * job.task_voxels;
    end = first + job.task_voxels < job.voxels ? first + job.task_voxels : job.voxels;
  }

  __device__ __forceinline__ const char* row_of(const Operand& o) const {
    return o.address + n * o.stride_n + c * o.stride_c;
  }
};

// Columns of the statistics, in the order of constants.columns; which ones there are is the
// variant's. `invalid`, `count` and the hard counts are integers until the end.
template <typename V>
struct Columns {
  static constexpr int inner = 4, l1 = inner + (V::overlap ? 3 : 0);
  static constexpr int squared = l1 + (V::l1 ? 3 : 0), bce = squared + (V::squared ? 2 : 0);
  static constexpr int flipped = bce + (V::split ? 2 : V::bce ? 1 : 0);
  static constexpr int focal = flipped + (V::flipped ? 2 : 0), hard = focal + (V::focal ? 2 : 0);
  static constexpr int number = hard + (V::hard ? 4 : 0);
};

// The sums of one thread, wide.
template <typename V>
struct Totals {
  double column[Columns<V>::number];

  __device__ __forceinline__ Totals() {
    for (int k = 0; k < Columns<V>::number; ++k) column[k] = 0.0;
  }

  template <typename T>
  __device__ __forceinline__ void widen(const Sums<T>& s, int voxels) {
    typedef Columns<V> At;
    column[0] += voxels;
    column[1] += s.count;
    column[2] += s.invalid;
    column[3] += V::binary ? double(s.foreground) : double(s.target);
    if (V::overlap) {
      column[At::inner] += double(s.inner);
      column[At::inner + 1] += double(s.missed);
      column[At::inner + 2] += double(s.false_alarm);
    }
    if (V::l1) {
      column[At::l1] += double(V::folded ? s.inner : s.common);
      column[At::l1 + 1] += double(V::folded ? s.missed : s.short_by);
      column[At::l1 + 2] += double(V::folded ? s.false_alarm : s.excess);
    }
    if (V::squared) {
      column[At::squared] += double(s.inner);
      column[At::squared + 1] += double(s.square);
    }
    if (V::bce) column[At::bce] += double(s.bce_pos + log_1p(s.product_pos));
    if (V::split) column[At::bce + 1] += double(s.bce_neg + log_1p(s.product_neg));
    if (V::flipped) {
      column[At::flipped] += double(s.flipped_pos + log_1p(s.product_pos));
      column[At::flipped + 1] += double(s.flipped_neg + log_1p(s.product_neg));
    }
    if (V::focal) {
      column[At::focal] += double(s.focal_pos);
      column[At::focal + 1] += double(s.focal_neg);
    }
    if (V::hard) {
      column[At::hard] += s.hits;
      column[At::hard + 1] += s.predicted - s.hits;
      column[At::hard + 2] += s.foreground - s.hits;
      column[At::hard + 3] += s.undefined;
    }
  }

  // Adds up those of all threads of the block and writes them.
  __device__ __forceinline__ void write(double* sums) const {
    __shared__ double buffer[WARPS];
    for (int k = 0; k < Columns<V>::number; ++k) {
      const double sum = block_sum(column[k], buffer);
      if (threadIdx.x == 0) sums[k] = sum;
    }
  }
};

// A voxel of a prediction of type E and a target of type P. A label that is neither 0 nor 1 is told
// by any other number.
template <typename T, typename E, typename P>
__device__ __forceinline__ Voxel<T> plain_voxel(E x, P p) {
  const T target = sizeof(P) == 8 ? (p == P(0) ? T(0) : p == P(1) ? T(1) : T(2)) : T(p);
  return Voxel<T>{T(widened(x)), target, T(1), false};
}

// The bits of a word that a mask has. Written in PTX, since the compiler makes a shift and two tests
// of a bit that is tested, where the machine has one instruction.
__device__ __forceinline__ unsigned bits_of(unsigned word, unsigned mask) {
#ifdef HOSTCUDA
  return word & mask;
#else
  unsigned bits;
  asm("and.b32 %0, %1, %2;" : "=r"(bits) : "r"(word), "r"(mask));
  return bits;
#endif
}

// Adds a group of voxels all of which are in the row, at addresses of vectors: all loads come before
// the first use. Returns false, with nothing added, if a label of one byte is neither 0 nor 1.
template <typename V, typename E, typename P, typename T = typename V::Real>
__device__ __forceinline__ bool add_whole(Totals<V>& totals, const E* x, const P* p,
                                          Settings<T> settings) {
  constexpr int VECTORS = GROUP / 4;
  Four<E> xs[VECTORS];
  Four<P> ps[VECTORS];
#pragma unroll
  for (int k = 0; k < VECTORS; ++k) {
    xs[k] = read_four(x + k * (4 * THREADS));
    ps[k] = read_four(p + k * (4 * THREADS));
  }
  Sums<T> s;
#pragma unroll
  for (int k = 0; k < GROUP; ++k)
    add<V>(s, plain_voxel<T>(xs[k / 4].element[k % 4], ps[k / 4].element[k % 4]), settings);
  totals.widen(s, GROUP);
  return true;
}

template <typename V, typename E, typename T = typename V::Real>
__device__ __forceinline__ bool add_whole(Totals<V>& totals, const E* x, const unsigned char* p,
                                          Settings<T> settings) {
  constexpr int VECTORS = GROUP / 4;
  constexpr unsigned NO_LABELS = 0xfefefefeu;  // bits that four labels of one byte do not have
  Four<E> xs[VECTORS];
  unsigned ps[VECTORS], all = 0;
#pragma unroll
  for (int k = 0; k < VECTORS; ++k) {
    xs[k] = read_four(x + k * (4 * THREADS));
    ps[k] = *reinterpret_cast<const unsigned*>(p + k * (4 * THREADS));
    all |= ps[k];
  }
  if (all & NO_LABELS) return false;
  Sums<T> s;
#pragma unroll
  for (int k = 0; k < GROUP; ++k) {
    const T value = T(widened(xs[k / 4].element[k % 4]));
    const bool is_target = bits_of(ps[k / 4], 1u << k % 4 * 8) != 0;
    if (V::probs) {
      add<V>(s, Voxel<T>{value, T(is_target), T(1), false}, settings);
    } else {
      add_hard<V>(s, value, is_target, settings.threshold);
      add_binary<V, sizeof(E) == 2>(s, value, is_target, settings.gamma);
    }
  }
  if (!V::probs) {
    // Whether any prediction is NaN, the sums tell; who counts has few of them.
    const T sum = V::bce ? s.product_pos + s.product_neg : s.missed + s.false_alarm;
    if (V::hard && (sum != sum || !(V::bce || V::products))) {
#pragma unroll
      for (int k = 0; k < GROUP; ++k) {
        const T value = T(widened(xs[k / 4].element[k % 4]));
        s.undefined += value != value;
      }
    }
    s.count = GROUP;
#pragma unroll
    for (int k = 0; k < VECTORS; ++k) s.foreground += __popc(ps[k]);
  }
  totals.widen(s, GROUP);
  return true;
}

// For rows that are runs of memory: predictions of type E and targets of type P.
// grid: at most samples * classes * row_tasks; block: THREADS.
// sums: (samples, classes, row_tasks, columns)
template <typename V, typename E, typename P>
__global__ void __launch_bounds__(THREADS, sizeof(P) == 1 ? V::resident : 1)
statistics_in_place(const __grid_constant__ Job job, double* __restrict__ sums,
                    const __grid_constant__ Counting counting) {
  typedef typename V::Real T;
  const Settings<T> settings = {T(job.threshold), T(counting.gamma)};
  for (unsigned number = blockIdx.x; number < job.tasks; number += gridDim.x) {
    const Run run(job, number);
    const E* x = reinterpret_cast<const E*>(run.row_of(job.logits));
    const P* p = reinterpret_cast<const P*>(run.row_of(job.targets));
    const bool aligned = is_aligned(x) && is_aligned(p);
    Totals<V> totals;
    for (long long start = run.first; start < run.end; start += THREADS * GROUP) {
      const long long mine = start + 4 * threadIdx.x;
      if (V::curve || V::lovasz) {
        unsigned long long* counts = counting.counts + run.row * counting.columns;
        for (int k = 0; k < GROUP; ++k) {
          const long long i = mine + k / 4 * (4 * THREADS) + k % 4;
          if (i >= run.end) continue;
          const Voxel<T> v = plain_voxel<T>(x[i], p[i]);
          count_voxel<V>(counting, counts, v.x, V::lovasz ? v.p != T(0) : v.p >= T(0.5));
        }
      }
      if (aligned && start + THREADS * GROUP <= run.end && add_whole(totals, x + mine, p + mine, settings))
        continue;
      Sums<T> s;
      int voxels = 0;
      for (int k = 0; k < GROUP; ++k) {
        const long long i = mine + k / 4 * (4 * THREADS) + k % 4;
        if (i >= run.end) continue;
        add<V>(s, plain_voxel<T>(x[i], p[i]), settings);
        ++voxels;
      }
      totals.widen(s, voxels);
    }
    totals.write(sums + number * (long long)Columns<V>::number);
  }
}

// As above, for every other array. I: counts the voxels of a row.
template <typename V, typename I>
__global__ void __launch_bounds__(THREADS, 1)
statistics_anywhere(const __grid_constant__ Job job, double* __restrict__ sums,
                    const __grid_constant__ Counting counting) {
  typedef typename V::Real T;
  const Settings<T> settings = {T(job.threshold), T(counting.gamma)};
  for (unsigned number = blockIdx.x; number < job.tasks; number += gridDim.x) {
    const Run run(job, number);
    const Place row(job, run.n, run.c);
    Totals<V> totals;
    for (long long start = run.first; start < run.end; start += THREADS * GROUP) {
      Sums<T> s;
      int voxels = 0;
      for (int k = 0; k < GROUP; ++k) {
        // The voxels, and the order, of the kernel above.
        const long long i = start + 4 * threadIdx.x + k / 4 * (4 * THREADS) + k % 4;
        if (i >= run.end) continue;
        const Voxel<T> v = read_voxel<V>(job, row.voxel(job, I(i)));
        ++voxels;
        if (v.left_out) continue;
        add<V>(s, v, settings);
        if (V::curve || V::lovasz) {
          unsigned long long* counts = counting.counts + run.row * counting.columns;
          count_voxel<V>(counting, counts, v.x, V::lovasz ? v.p != T(0) : v.p >= T(0.5));
        }
      }
      totals.widen(s, voxels);
    }
    totals.write(sums + number * (long long)Columns<V>::number);
  }
}

// Adds up the tasks of every row, each thread those of its numbers, into the first columns of `width`.
// grid: samples * classes; block: THREADS.
__global__ void __launch_bounds__(THREADS)
add_tasks(const double* __restrict__ sums, long long row_tasks, int columns,
          double* __restrict__ total, long long width) {
  __shared__ double buffer[WARPS];
  const double* of_row = sums + blockIdx.x * row_tasks * columns;
  for (int k = 0; k < columns; ++k) {
    double sum = 0.0;
    for (long long task = threadIdx.x; task < row_tasks; task += THREADS)
      sum += of_row[task * columns + k];
    sum = block_sum(sum, buffer);
    if (threadIdx.x == 0) total[blockIdx.x * width + k] = sum;
  }
}

// Writes the counts of every row to its last columns. grid: samples * classes; block: THREADS.
__global__ void __launch_bounds__(THREADS)
widen_counts(const unsigned long long* __restrict__ counts, long long columns,
             double* __restrict__ total, long long width) {
  const unsigned long long* of_row = counts + blockIdx.x * columns;
  double* out = total + blockIdx.x * width + (width - columns);
  for (long long k = threadIdx.x; k < columns; k += THREADS) out[k] = double(of_row[k]);
}

// Where the coefficients of a row begin; those of its bins follow.
template <typename V>
__device__ __forceinline__ const double* of_row(const double* coefficients, long long row,
                                                const Counting& counting) {
  return coefficients + row * (COEFFICIENTS + (V::lovasz ? 2 * counting.bins : V::sorted ? 2 : 0));
}

template <typename V, typename T = typename V::Real>
__device__ __forceinline__ void read_coefficients(const double* exact, T* k) {
#pragma unroll
  for (int j = 0; j < COEFFICIENTS; ++j) k[j] = T(exact[j]);
  if (V::folded) {
    k[0] = T(exact[0] + exact[4]);
    k[1] = T(exact[1] + exact[5]);
  }
}

// dL/dx of a voxel, `number` of all. exact: the coefficients of its row; k: those that are no bins'.
template <typename V, bool QUICK, typename T = typename V::Real>
__device__ __forceinline__ T gradient_of(Voxel<T> v, const T* k, const double* exact,
                                         const Counting& counting, long long number) {
  const T value = slope<V, QUICK>(v, k);
  if (V::sorted) return value + static_cast<const T*>(counting.slopes)[number];
  if (!V::lovasz) return value;
  const bool positive = v.p != T(0);
  const T of_error = slope_of_error(counting, exact + COEFFICIENTS, hinge_error(v.x, positive), positive);
  return value + (positive ? -of_error : of_error);
}

// The task of a turn of the second pass, which runs backwards: what the first pass read last is still
// in the L2 cache.
__device__ __forceinline__ unsigned from_the_end(const Job& job, unsigned turn) {
  return unsigned(job.tasks) - 1 - turn;
}

// grid: at most the tasks; block: THREADS. coefficients: (samples, classes, COEFFICIENTS). The output lies as
// the logits do, or is the logits: no address is read once it was written.
template <typename V, typename E, typename P>
__global__ void __launch_bounds__(THREADS)
gradient_in_place(const __grid_constant__ Job job, const double* __restrict__ coefficients,
                  const __grid_constant__ Counting counting) {
  typedef typename V::Real T;
  constexpr bool QUICK = sizeof(E) == 2;
  for (unsigned turn = blockIdx.x; turn < job.tasks; turn += gridDim.x) {
    const Run run(job, from_the_end(job, turn));
    const E* x = reinterpret_cast<const E*>(run.row_of(job.logits));
    const P* p = reinterpret_cast<const P*>(run.row_of(job.targets));
    E* out = reinterpret_cast<E*>(const_cast<char*>(run.row_of(job.out)));
    const bool aligned = is_aligned(x) && is_aligned(p) && is_aligned(out);
    T k[COEFFICIENTS];
    const double* exact = of_row<V>(coefficients, run.row, counting);
    read_coefficients<V>(exact, k);
    for (long long i = run.first + 4 * threadIdx.x; i < run.end; i += 4 * THREADS) {
      if (aligned && i + 4 <= run.end) {
        const Four<E> xs = read_four(x + i);
        const Four<P> ps = read_four(p + i);
        Four<E> gs;
#pragma unroll
        for (int j = 0; j < 4; ++j)
          narrow(gradient_of<V, QUICK>(plain_voxel<T>(xs.element[j], ps.element[j]), k, exact, counting,
                                       run.row * job.voxels + i + j),
                 gs.element[j]);
        write_four(out + i, gs);
      } else {
        for (long long j = i; j < i + 4 && j < run.end; ++j)
          narrow(gradient_of<V, QUICK>(plain_voxel<T>(x[j], p[j]), k, exact, counting,
                                       run.row * job.voxels + j),
                 out[j]);
      }
    }
  }
}

template <typename V, typename I>
__global__ void __launch_bounds__(THREADS, 1)
gradient_anywhere(const __grid_constant__ Job job, const double* __restrict__ coefficients,
                  const __grid_constant__ Counting counting) {
  typedef typename V::Real T;
  for (unsigned turn = blockIdx.x; turn < job.tasks; turn += gridDim.x) {
    const Run run(job, from_the_end(job, turn));
    const Place row(job, run.n, run.c);
    T k[COEFFICIENTS];
    const double* exact = of_row<V>(coefficients, run.row, counting);
    read_coefficients<V>(exact, k);
    for (long long i = run.first + threadIdx.x; i < run.end; i += THREADS) {
      const Place at = row.voxel(job, I(i));
      const Voxel<T> v = read_voxel<V>(job, at);
      // Exactly 0 where the voxel is left out, also where a coefficient is not finite.
      const long long number = run.row * job.voxels + i;
      const T g = v.left_out ? T(0) : gradient_of<V, false>(v, k, exact, counting, number);
      write_real(job.out.address + at.out, job.out.code, g);
    }
  }
}

// Writes the errors of the Lovasz hinge, (samples, classes, voxels): the sign bit is set for foreground;
// 0 stands for no error, and for what is left out. grid: at most the tasks; block: THREADS.
template <typename V, typename I>
__global__ void __launch_bounds__(THREADS, 1)
errors_anywhere(const __grid_constant__ Job job, typename V::Real* __restrict__ errors) {
  typedef typename V::Real T;
  for (unsigned number = blockIdx.x; number < job.tasks; number += gridDim.x) {
    const Run run(job, number);
    const Place row(job, run.n, run.c);
    for (long long i = run.first + threadIdx.x; i < run.end; i += THREADS) {
      const Voxel<T> v = read_voxel<V>(job, row.voxel(job, I(i)));
      const bool positive = v.p != T(0);
      const T error = hinge_error(v.x, positive);
      const T size = v.left_out || error < T(0) ? T(0) : error;
      errors[run.row * job.voxels + i] = positive ? -size : size;
    }
  }
}
