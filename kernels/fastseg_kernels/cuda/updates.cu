// Parameter updates of whole lists of arrays: gradient descent, momentum, Adam.
//
// The rules, and their coefficients, are those of ../updates.py. The arrays of a list are laid end
// to end, in thought, each at a multiple of four, and cut into tasks; a task may
// hold many small arrays or a part of a large one.
#include "operands.cuh"
#include "reduction.cuh"

struct Task {
  long long tensor, start;
};

constexpr double LARGEST = 1.7976931348623157e308;  // that is finite

// A number of the device, as it is stored; without an address, the number that is given.
struct Number {
  double value;
  const char* address;
  long long code;

  __device__ __forceinline__ double read() const {
    return address == nullptr ? value : read_real<double>(address, code);
  }
};

// The coefficients of a step: numbers of the host, some of which are multiplied by numbers of the
// device, and what may drop the step.
struct Coefficients {
  double k[UPDATE_COEFFICIENTS];
  Number lr, grad_scale, norm, found_inf;  // the last two as updates.Guard
  double max_norm;         // infinite where there is no limit
  long long skip_non_finite;
  long long by_lr;           // bit k: the step size multiplies coefficient k
  const double* by_step;     // two factors, of the last two coefficients
  long long number;          // of the step, 1 at the first
  const long long* counter;  // holds it instead, unless null

  // The scale of the gradients once they are clipped; false: the step is dropped.
  __device__ __forceinline__ bool guarded_scale(double& scale) const {
    scale = grad_scale.read();
    if (!(found_inf.read() == 0.0)) return false;
    if (max_norm > LARGEST && !skip_non_finite) return true;
    const double scaled = fabs(scale) * norm.read();
    if (skip_non_finite && !(scaled <= LARGEST)) return false;
    if (scaled > max_norm) scale *= max_norm / scaled;
    return true;
  }

  __device__ __forceinline__ bool read(double* to) const {
    double scale;
    const bool taken = guarded_scale(scale);
    const double rate = lr.read();
#pragma unroll
    for (int j = 0; j < UPDATE_COEFFICIENTS; ++j) to[j] = by_lr >> j & 1 ? k[j] * rate : k[j];
    to[0] *= scale;
    if (by_step == nullptr) return taken;
    to[UPDATE_COEFFICIENTS - 2] *= by_step[0];
    to[UPDATE_COEFFICIENTS - 1] *= by_step[1];
    return taken;
  }
};

// (high + low) state + added: a factor that acts step after step is kept as two numbers.
template <typename T>
__device__ __forceinline__ T decayed(T state, T high, T low, T added) {
  return fused(high, state, fused(low, state, added));
}

// What elements are computed in.
template <typename E>
using Computed = decltype(widened(E()));

template <typename T>
struct Descent {
  T scale, l2, lr;
  __device__ explicit Descent(const double* k) : scale(k[0]), l2(k[1]), lr(k[2]) {}
  static constexpr int states = 0;
  __device__ __forceinline__ void operator()(T& theta, T grad, T&, T&, T&) const {
    theta = fused(-lr, fused(l2, theta, scale * grad), theta);
  }
};

template <typename T>
struct Momentum {
  T scale, l2, keep, keep_low, add, by_v, by_g;
  __device__ explicit Momentum(const double* k)
      : scale(k[0]), l2(k[1]), keep(k[2]), keep_low(k[2] - double(T(k[2]))), add(k[3] + k[6]),
        by_v(k[4]), by_g(k[5]) {}
  static constexpr int states = 1;
  __device__ __forceinline__ void operator()(T& theta, T grad, T& velocity, T&, T&) const {
    const T g = fused(l2, theta, scale * grad);
    velocity = decayed(velocity, keep, keep_low, add * g);
    theta -= fused(by_v, velocity, by_g * g);
  }
};

template <typename T, bool amsgrad>
struct AnyAdam {
  T scale, l2, decay, beta1, low1, new1, beta2, low2, new2, eps, rate, root;
  __device__ explicit AnyAdam(const double* k)
      : scale(k[0]), l2(k[1]), decay(k[2]),
        beta1(k[3]), low1(k[3] - double(T(k[3]))), new1(1.0 - k[3]),
        beta2(k[4]), low2(k[4] - double(T(k[4]))), new2(1.0 - k[4]),
        eps(k[5]), rate(k[6]), root(k[7]) {}
  static constexpr int states = amsgrad ? 3 : 2;
  __device__ __forceinline__ void operator()(T& theta, T grad, T& exp_avg, T& exp_avg_sq,
                                             T& max_exp_avg_sq) const {
    const T g = fused(l2, theta, scale * grad);
    exp_avg = decayed(exp_avg, beta1, low1, new1 * g);
    exp_avg_sq = decayed(exp_avg_sq, beta2, low2, new2 * g * g);
    if (amsgrad && !(max_exp_avg_sq >= exp_avg_sq)) max_exp_avg_sq = exp_avg_sq;  // NaN stays
    theta = fused(-decay, theta, theta);
    const T v = amsgrad ? max_exp_avg_sq : exp_avg_sq;
    theta = fused(-rate, exp_avg / fused(root, square_root(v), eps), theta);
  }
};

template <typename T>
using Adam = AnyAdam<T, false>;
template <typename T>
using AMSGrad = AnyAdam<T, true>;

// A hash of a number: C. Wellons, "Prospecting for hash functions", 2018.
__device__ __forceinline__ unsigned scrambled(unsigned x) {
  x = (x ^ x >> 16) * 0x7FEB352Du;
  x = (x ^ x >> 15) * 0x846CA68Bu;
  return x ^ x >> 16;
}

// A state is written as what is computed in, or as one of the two bfloat16 beside it, by 16 bits of
// chance.
__device__ __forceinline__ void store_state(float x, unsigned, float& to) { to = x; }
__device__ __forceinline__ void store_state(double x, unsigned, double& to) { to = x; }
__device__ __forceinline__ void store_state(float x, unsigned chance, __nv_bfloat16& to) {
  const unsigned bits = __float_as_uint(x);
  const unsigned rounded = x == x ? bits + chance : bits | 0x400000u;
  to = __ushort_as_bfloat16((unsigned short)(rounded >> 16));
}

// The element before a step: that of its master, unless the parameter is not the master rounded.
template <typename T>
__device__ __forceinline__ T current(T param, T) {
  return param;
}
template <typename P, typename T>
__device__ __forceinline__ T current(P param, T master) {
  P rounded;
  narrow(master, rounded);
  return widened(rounded) == widened(param) ? master : widened(param);
}

// Counts a step, unless it is dropped, and writes what it multiplies the last two coefficients by.
// beta1 is negative for rules without moments. grid: 1.
__global__ void __launch_bounds__(THREADS)
count_step(long long* step, double beta1, double beta2, double* by_step,
           const __grid_constant__ Coefficients coefficients) {
  double scale;
  if (threadIdx.x != 0) return;
  if (coefficients.guarded_scale(scale)) ++*step;
  const double number = double(*step);
  by_step[0] = beta1 < 0 ? double(number == 1) : 1.0 / (1.0 - pow(beta1, number));
  by_step[1] = beta1 < 0 ? 0.0 : 1.0 / sqrt(1.0 - pow(beta2, number));
}

// The tasks of a line of arrays, and the parts of arrays in each. chunk: elements of a task;
// elements: of the line, gaps included; every array starts at a multiple of four.
template <typename Visit>
__device__ __forceinline__ void each_part(const long long* sizes, const Task* tasks,
                                          long long count, long long chunk, long long elements,
                                          Visit visit) {
  for (long long task = blockIdx.x; task < count; task += gridDim.x) {
    long long index = tasks[task].tensor, start = tasks[task].start;
    long long left = elements - task * chunk < chunk ? elements - task * chunk : chunk;
    for (; left > 0; ++index, start = 0) {
      const long long size = sizes[index], places = (size + 3) / 4 * 4 - start;
      const long long here = left < places ? left : places;
      left -= here;
      visit(index, start, start + here < size ? start + here : size);
    }
  }
}

// params to sizes: of each array, as TENSOR_FIELDS. grid: at most the tasks; block: THREADS.
template <template <typename> class Rule, typename P, typename S = Computed<P>>
__global__ void __launch_bounds__(THREADS, 1)
update(P* const* params, P* const* grads, Computed<P>* const* masters, S* const* firsts,
       S* const* seconds, S* const* thirds, const long long* sizes, const Task* tasks,
       long long count, long long chunk, long long elements,
       const __grid_constant__ Coefficients coefficients, bool zero_grads) {
  using T = Computed<P>;
  double k[UPDATE_COEFFICIENTS];
  const bool taken = coefficients.read(k);
  const Rule<T> rule(k);
  const unsigned number = unsigned(coefficients.counter == nullptr ? coefficients.number
                                                                   : *coefficients.counter);
  constexpr int states = Rule<T>::states;
  constexpr bool mastered = sizeof(P) < sizeof(T), by_chance = sizeof(S) < sizeof(T);
  each_part(sizes, tasks, count, chunk, elements, [&](long long index, long long from,
                                                      long long end) {
    P *const param = params[index], *const grad = grads[index];
    T* const master = masters[index];
    S *const first = firsts[index], *const second = seconds[index], *const third = thirds[index];
    const auto one = [&](long long i, P& theta, P g, T& held, S& m, S& v, S& w) {
      T value = current(theta, held), states_of[3] = {widened(m), widened(v), widened(w)};
      rule(value, widened(g), states_of[0], states_of[1], states_of[2]);
      held = value;
      narrow(value, theta);
      const unsigned chance =
          by_chance ? scrambled(unsigned(i) + (number & 0x7FFFFFFFu) * STEP_STRIDE) : 0;
      store_state(states_of[0], chance & 0xFFFFu, m);
      store_state(states_of[1], chance >> 16, v);
      store_state(states_of[2], chance >> 16, w);  // as the state that it is the largest of
    };
    const bool aligned = is_aligned(param) && is_aligned(grad) && is_aligned(master) &&
                         is_aligned(first) && is_aligned(second) && is_aligned(third);
    for (long long i = from + 4 * threadIdx.x; i < end; i += 4 * THREADS) {
      if (aligned && i + 4 <= end) {
        if (taken) {
          Four<P> theta = read_four(param + i), g = read_four(grad + i);
          Four<T> held = mastered ? read_four(master + i) : Four<T>{};
          Four<S> m = states > 0 ? read_four(first + i) : Four<S>{};
          Four<S> v = states > 1 ? read_four(second + i) : Four<S>{};
          Four<S> w = states > 2 ? read_four(third + i) : Four<S>{};
#pragma unroll
          for (int j = 0; j < 4; ++j)
            one(i + j, theta.element[j], g.element[j], held.element[j], m.element[j], v.element[j],
                w.element[j]);
          write_four(param + i, theta);
          if (mastered) write_four(master + i, held);
          if (states > 0) write_four(first + i, m);
          if (states > 1) write_four(second + i, v);
          if (states > 2) write_four(third + i, w);
        }
        if (zero_grads) write_four(grad + i, Four<P>{});
      } else {
        for (long long j = i; j < i + 4 && j < end; ++j) {
          if (taken) {
            T no_master = 0;
            S none[3] = {};
            one(j, param[j], grad[j], mastered ? master[j] : no_master,
                states > 0 ? first[j] : none[0], states > 1 ? second[j] : none[1],
                states > 2 ? third[j] : none[2]);
          }
          if (zero_grads) grad[j] = P{};
        }
      }
    }
  });
}

// The squares of the gradients, added up by each block: sums has a number for each. As `update`.
template <typename P>
__global__ void __launch_bounds__(THREADS)
squares(P* const* grads, const long long* sizes, const Task* tasks, long long count,
        long long chunk, long long elements, double* sums) {
  __shared__ double buffer[WARPS];
  double total = 0;
  each_part(sizes, tasks, count, chunk, elements, [&](long long index, long long from,
                                                      long long end) {
    const P* const grad = grads[index];
    const bool aligned = is_aligned(grad);
    for (long long i = from + 4 * threadIdx.x; i < end; i += 4 * THREADS) {
      Four<P> g{};
      if (aligned && i + 4 <= end) {
        g = read_four(grad + i);
      } else {
        for (int j = 0; j < 4 && i + j < end; ++j) g.element[j] = grad[i + j];
      }
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const double value = widened(g.element[j]);
        total = fused(value, value, total);
      }
    }
  });
  total = block_sum(total, buffer);
  if (threadIdx.x == 0) sums[blockIdx.x] = total;
}

// The norm from the sums of all blocks. grid: 1.
__global__ void __launch_bounds__(THREADS)
norm_of(const double* sums, long long count, double* norm) {
  __shared__ double buffer[WARPS];
  double total = 0;
  for (long long i = threadIdx.x; i < count; i += THREADS) total += sums[i];
  total = block_sum(total, buffer);
  if (threadIdx.x == 0) *norm = sqrt(total);
}
