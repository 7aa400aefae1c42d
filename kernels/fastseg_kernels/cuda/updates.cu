// Parameter updates of whole lists of arrays: gradient descent, momentum, Adam.
//
// The rules, and their coefficients, are those of ../updates.py. The arrays of a list are laid end
// to end, in thought, each at a multiple of four, and cut into tasks; a task may
// hold many small arrays or a part of a large one.
#include "operands.cuh"

struct Task {
  long long tensor, start;
};

// The coefficients of a step: numbers of the host, some of which are multiplied by numbers of the
// device. An address that is null stands for 1.
struct Coefficients {
  double k[UPDATE_COEFFICIENTS];
  const char *lr, *grad_scale;
  long long lr_code, grad_scale_code;
  long long by_lr;        // bit k: the step size multiplies coefficient k
  const double* by_step;  // two factors, of the last two coefficients

  __device__ __forceinline__ void read(double* to) const {
    const double rate = lr == nullptr ? 1.0 : read_real<double>(lr, lr_code);
#pragma unroll
    for (int j = 0; j < UPDATE_COEFFICIENTS; ++j) to[j] = by_lr >> j & 1 ? k[j] * rate : k[j];
    if (grad_scale != nullptr) to[0] *= read_real<double>(grad_scale, grad_scale_code);
    if (by_step == nullptr) return;
    to[UPDATE_COEFFICIENTS - 2] *= by_step[0];
    to[UPDATE_COEFFICIENTS - 1] *= by_step[1];
  }
};

// (high + low) state + added: a factor that acts step after step is kept as two numbers.
template <typename T>
__device__ __forceinline__ T decayed(T state, T high, T low, T added) {
  return fused(high, state, fused(low, state, added));
}

template <typename T>
struct Descent {
  T scale, l2, lr;
  __device__ explicit Descent(const double* k) : scale(k[0]), l2(k[1]), lr(k[2]) {}
  static constexpr int states = 0;
  __device__ __forceinline__ void operator()(T& theta, T grad, T&, T&) const {
    theta = fused(-lr, fused(l2, theta, scale * grad), theta);
  }
};

template <typename T>
struct Momentum {
  T scale, l2, keep, keep_low, add, by_v, by_g;
  __device__ explicit Momentum(const double* k)
      : scale(k[0]), l2(k[1]), keep(k[2]), keep_low(k[2] - double(T(k[2]))), add(k[3]),
        by_v(k[4]), by_g(k[5]) {}
  static constexpr int states = 1;
  __device__ __forceinline__ void operator()(T& theta, T grad, T& velocity, T&) const {
    const T g = fused(l2, theta, scale * grad);
    velocity = decayed(velocity, keep, keep_low, add * g);
    theta -= fused(by_v, velocity, by_g * g);
  }
};

template <typename T>
struct Adam {
  T scale, l2, decay, beta1, low1, new1, beta2, low2, new2, eps, rate, root;
  __device__ explicit Adam(const double* k)
      : scale(k[0]), l2(k[1]), decay(k[2]),
        beta1(k[3]), low1(k[3] - double(T(k[3]))), new1(1.0 - k[3]),
        beta2(k[4]), low2(k[4] - double(T(k[4]))), new2(1.0 - k[4]),
        eps(k[5]), rate(k[6]), root(k[7]) {}
  static constexpr int states = 2;
  __device__ __forceinline__ void operator()(T& theta, T grad, T& exp_avg, T& exp_avg_sq) const {
    const T g = fused(l2, theta, scale * grad);
    exp_avg = decayed(exp_avg, beta1, low1, new1 * g);
    exp_avg_sq = decayed(exp_avg_sq, beta2, low2, new2 * g * g);
    theta = fused(-decay, theta, theta);
    theta = fused(-rate, exp_avg / fused(root, square_root(exp_avg_sq), eps), theta);
  }
};

// Counts a step and writes what it multiplies the last two coefficients of Adam by. grid: 1.
__global__ void __launch_bounds__(THREADS)
count_step(long long* step, double beta1, double beta2, double* by_step) {
  if (threadIdx.x != 0) return;
  const double number = double(++*step);
  by_step[0] = 1.0 / (1.0 - pow(beta1, number));
  by_step[1] = 1.0 / sqrt(1.0 - pow(beta2, number));
}

// params to sizes: of each array, as TENSOR_FIELDS. chunk: elements of a task; elements: of the
// line, gaps included. grid: at most the tasks; block: THREADS.
template <template <typename> class Rule, typename T>
__global__ void __launch_bounds__(THREADS, 1)
update(T* const* params, T* const* grads, T* const* firsts, T* const* seconds,
       const long long* sizes, const Task* tasks, long long count, long long chunk,
       long long elements, const __grid_constant__ Coefficients coefficients, bool zero_grads) {
  double k[UPDATE_COEFFICIENTS];
  coefficients.read(k);
  const Rule<T> rule(k);
  constexpr int states = Rule<T>::states;
  for (long long task = blockIdx.x; task < count; task += gridDim.x) {
    long long index = tasks[task].tensor, start = tasks[task].start;
    long long left = elements - task * chunk < chunk ? elements - task * chunk : chunk;
    for (; left > 0; ++index, start = 0) {
      T *const param = params[index], *const grad = grads[index];
      T *const first = firsts[index], *const second = seconds[index];
      const long long size = sizes[index], places = (size + 3) / 4 * 4 - start;
      const long long here = left < places ? left : places;
      const long long end = start + here < size ? start + here : size;
      const bool aligned = is_aligned(param) && is_aligned(grad) && is_aligned(first) &&
                           is_aligned(second);
      left -= here;
      for (long long i = start + 4 * threadIdx.x; i < end; i += 4 * THREADS) {
        if (aligned && i + 4 <= end) {
          Four<T> theta = read_four(param + i), g = read_four(grad + i);
          Four<T> m = states > 0 ? read_four(first + i) : Four<T>{};
          Four<T> v = states > 1 ? read_four(second + i) : Four<T>{};
#pragma unroll
          for (int j = 0; j < 4; ++j)
            rule(theta.element[j], g.element[j], m.element[j], v.element[j]);
          write_four(param + i, theta);
          if (states > 0) write_four(first + i, m);
          if (states > 1) write_four(second + i, v);
          if (zero_grads) write_four(grad + i, Four<T>{});
        } else {
          for (long long j = i; j < i + 4 && j < end; ++j) {
            T none = 0;
            rule(param[j], grad[j], states > 0 ? first[j] : none, states > 1 ? second[j] : none);
            if (zero_grads) grad[j] = T(0);
          }
        }
      }
    }
  }
}
