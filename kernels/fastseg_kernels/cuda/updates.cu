// Parameter updates of whole lists of arrays: gradient descent, momentum, Adam.
//
// The rules are those of ../cpu/updates.py, with the same coefficients. The arrays of a list are
// laid end to end, in thought, and cut into tasks of CHUNK elements; a task may hold many small
// arrays or a part of a large one.
#include "operands.cuh"

constexpr int CHUNK = UPDATE_CHUNK;

template <typename T>
struct Tensor {
  T *param, *grad, *first, *second;
  long long size;
};
struct Task {
  long long tensor, start;
};
struct Coefficients {
  double k[8];
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

// grid: at most the tasks; block: THREADS.
template <template <typename> class Rule, typename T>
__global__ void __launch_bounds__(THREADS)
update(const Tensor<T>* tensors, const Task* tasks, long long count, long long elements,
       const Coefficients coefficients, bool zero_grads) {
  const Rule<T> rule(coefficients.k);
  constexpr int states = Rule<T>::states;
  for (long long number = blockIdx.x; number < count; number += gridDim.x) {
    long long index = tasks[number].tensor, start = tasks[number].start;
    long long left = elements - number * CHUNK < CHUNK ? elements - number * CHUNK : CHUNK;
    for (; left > 0; ++index, start = 0) {
      const Tensor<T> tensor = tensors[index];
      const long long rest = tensor.size - start, here = left < rest ? left : rest;
      left -= here;
      for (long long i = start + 4 * threadIdx.x; i < start + here; i += 4 * THREADS) {
        if (i + 4 <= start + here) {
          Four<T> theta = read_four(tensor.param + i), grad = read_four(tensor.grad + i);
          Four<T> first = states > 0 ? read_four(tensor.first + i) : Four<T>{};
          Four<T> second = states > 1 ? read_four(tensor.second + i) : Four<T>{};
#pragma unroll
          for (int j = 0; j < 4; ++j)
            rule(theta.element[j], grad.element[j], first.element[j], second.element[j]);
          write_four(tensor.param + i, theta);
          if (states > 0) write_four(tensor.first + i, first);
          if (states > 1) write_four(tensor.second + i, second);
          if (zero_grads) write_four(tensor.grad + i, Four<T>{});
        } else {
          for (long long j = i; j < start + here; ++j) {
            T none = 0;
            rule(tensor.param[j], tensor.grad[j], states > 0 ? tensor.first[j] : none,
                 states > 1 ? tensor.second[j] : none);
            if (zero_grads) tensor.grad[j] = T(0);
          }
        }
      }
    }
  }
}
