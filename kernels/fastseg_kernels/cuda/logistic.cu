// The logistic function of every element: one read, one write.
#include "operands.cuh"

// QUICK: it is going to be rounded to half precision.
template <bool QUICK, typename T>
__device__ __forceinline__ T logistic(T x) {
  const T size = magnitude(x), e = QUICK ? quick_exp_negative(size) : exp_negative(size);
  const T large = QUICK ? reciprocal(T(1) + e) : newton_reciprocal(T(1) + e);
  return x >= T(0) ? large : e * large;
}

// x, out: n elements, one after the other. grid: any; block: THREADS.
template <typename T, typename E>
__global__ void __launch_bounds__(THREADS) sigmoid_in_place(const E* x, long long n, E* out) {
  constexpr bool QUICK = sizeof(E) == 2;
  const bool aligned = is_aligned(x) && is_aligned(out);
  const long long step = 4LL * THREADS * gridDim.x;
  for (long long i = 4 * (blockIdx.x * (long long)THREADS + threadIdx.x); i < n; i += step) {
    if (aligned && i + 4 <= n) {
      const Four<E> xs = read_four(x + i);
      Four<E> qs;
#pragma unroll
      for (int j = 0; j < 4; ++j) narrow(logistic<QUICK>(T(widened(xs.element[j]))), qs.element[j]);
      write_four(out + i, qs);
    } else {
      for (long long j = i; j < i + 4 && j < n; ++j)
        narrow(logistic<QUICK>(T(widened(x[j]))), out[j]);
    }
  }
}

// As above, for arrays of any layout and two dtypes; one row holds all elements. I: counts them.
template <typename T, typename I>
__global__ void __launch_bounds__(THREADS) sigmoid_anywhere(const __grid_constant__ Job job) {
  const long long step = (long long)THREADS * gridDim.x;
  const Place row(job, 0, 0);
  for (long long i = blockIdx.x * (long long)THREADS + threadIdx.x; i < job.voxels; i += step) {
    const Place at = row.voxel(job, I(i));
    const T x = read_real<T>(job.logits.address + at.logits, job.logits.code);
    write_real(job.out.address + at.out, job.out.code, logistic<false>(x));
  }
}
