// Lovasz terms that sort: from sorted errors to the extension of each group and the slope of each voxel.
//
// The mathematics is that of ../reference/lovasz.py. A group is a row, or the rows of all samples of a
// class. Its errors come from errors_* of overlap.cu and softmax.cu, the sign bit set for foreground;
// they are sorted by the array library. What a voxel's weight is made of, are numbers of voxels with
// larger errors, and of those with the same: counts, so that the weights are the same in any order.
#include "operands.cuh"
#include "reduction.cuh"

// By value. An element of a group: number k of its `length`.
struct Groups {
  long long number, length, task_length, tasks;  // of elements, and tasks of a group
  long long samples, classes, voxels;
  long long batch;  // a group has the samples of a class

  // Where an element lies in (samples, classes, voxels).
  __device__ __forceinline__ long long place(long long group, long long k) const {
    if (!batch) return group * voxels + k;
    return (k / voxels * classes + group) * voxels + k % voxels;
  }
  __device__ __forceinline__ long long row(long long group, long long k) const {
    return batch ? k / voxels * classes + group : group;
  }
};

__device__ __forceinline__ bool is_negative(float x) { return __float_as_int(x) < 0; }
__device__ __forceinline__ bool is_negative(double x) { return __double_as_longlong(x) < 0; }

// Writes what is sorted: the size of each error, and -1 where it is NaN.
// grid: at most groups * tasks; block: THREADS. sizes: (groups, length).
template <typename T>
__global__ void __launch_bounds__(THREADS, 1)
write_sizes(const __grid_constant__ Groups groups, const T* __restrict__ errors, T* __restrict__ sizes) {
  for (long long task = blockIdx.x; task < groups.number * groups.tasks; task += gridDim.x) {
    const long long group = task / groups.tasks, first = task % groups.tasks * groups.task_length;
    for (long long k = first + threadIdx.x; k < first + groups.task_length && k < groups.length;
         k += THREADS) {
      const T error = errors[groups.place(group, k)];
      sizes[group * groups.length + k] = error != error ? T(-1) : magnitude(error);
    }
  }
}

// Writes 1 for each foreground voxel, in the order of sizes; they are summed up by the array library.
template <typename T>
__global__ void __launch_bounds__(THREADS, 1)
write_labels(const __grid_constant__ Groups groups, const T* __restrict__ errors,
             const long long* __restrict__ order, long long* __restrict__ labels) {
  for (long long task = blockIdx.x; task < groups.number * groups.tasks; task += gridDim.x) {
    const long long group = task / groups.tasks, first = task % groups.tasks * groups.task_length;
    for (long long k = first + threadIdx.x; k < first + groups.task_length && k < groups.length;
         k += THREADS) {
      const long long at = group * groups.length + k;
      labels[at] = is_negative(errors[groups.place(group, order[at])]);
    }
  }
}

// The first of the elements from `first` to `last` that is smaller than a size; they descend.
template <typename T>
__device__ __forceinline__ long long first_below(const T* sizes, long long first, long long last, T size) {
  while (first < last) {
    const long long middle = first + (last - first) / 2;
    if (sizes[middle] < size) last = middle;
    else first = middle + 1;
  }
  return first;
}

template <typename T>
__device__ __forceinline__ long long first_at_most(const T* sizes, long long last, T size) {
  long long first = 0;
  while (first < last) {
    const long long middle = first + (last - first) / 2;
    if (sizes[middle] <= size) last = middle;
    else first = middle + 1;
  }
  return first;
}

// Writes what each task adds to the extension of its group to `sums` (groups, tasks), and replaces
// errors by slopes if `factors`, (samples, classes, width) from a column on, is not null.
// sizes, order, foreground (how many up to an element): (groups, length). targets_sum: as factors.
template <typename T>
__global__ void __launch_bounds__(THREADS, 1)
weigh(const __grid_constant__ Groups groups, T* errors, const T* __restrict__ sizes,
      const long long* __restrict__ order, const long long* __restrict__ foreground,
      const double* __restrict__ targets_sum, long long sums_width,
      const double* __restrict__ factors, long long factors_width, double* __restrict__ sums) {
  __shared__ double buffer[WARPS];
  for (long long task = blockIdx.x; task < groups.number * groups.tasks; task += gridDim.x) {
    const long long group = task / groups.tasks, first = task % groups.tasks * groups.task_length;
    const T* its_sizes = sizes + group * groups.length;
    const long long* before = foreground + group * groups.length;
    double P = 0.0, sum = 0.0;
    for (long long n = 0; n < (groups.batch ? groups.samples : 1); ++n)
      P += targets_sum[(groups.batch ? n * groups.classes + group : group) * sums_width];
    for (long long k = first + threadIdx.x; k < first + groups.task_length && k < groups.length;
         k += THREADS) {
      const T size = its_sizes[k];
      const long long number = order[group * groups.length + k];
      double weight = 0.0;
      if (size > T(0)) {
        const bool alone_before = k == 0 || its_sizes[k - 1] > size;
        const bool alone_after = k + 1 == groups.length || its_sizes[k + 1] < size;
        const long long start = alone_before ? k : first_at_most(its_sizes, k, size);
        const long long end = alone_after ? k + 1 : first_below(its_sizes, k + 1, groups.length, size);
        const double f = start > 0 ? double(before[start - 1]) : 0.0, b = double(start) - f;
        const double n1 = double(before[end - 1]) - f, n0 = double(end - start) - n1;
        const bool positive = (k > 0 ? before[k] - before[k - 1] : before[0]) != 0;
        const double united = P + b, inside = P - f;
        if (united == 0.0) weight = 1.0 / n0;  // the first errors of a group without foreground
        else if (positive) weight = 0.5 / united + 0.5 / (united + n0);
        else weight = 0.5 * (inside + (inside - n1)) / united / (united + n0);
        if (weight != 0.0) sum += weight * double(size);
      }
      if (factors != nullptr) {
        const long long place = groups.place(group, number);
        const double factor = factors[groups.row(group, number) * factors_width];
        const T error = errors[place];
        T slope = T(0);
        if (error != error) slope = error;
        else if (size > T(0)) slope = T(is_negative(error) ? -weight * factor : weight * factor);
        errors[place] = slope;
      }
    }
    sum = block_sum(sum, buffer);
    if (threadIdx.x == 0) sums[task] = sum;
  }
}

// Adds the extensions of the groups, times their parts in the loss, to the value: one, or (samples,
// classes). parts: (samples, classes, width) from a column on. A group with a NaN is NaN. grid: 1.
template <typename T>
__global__ void __launch_bounds__(THREADS, 1)
add_extensions(const __grid_constant__ Groups groups, const T* __restrict__ sizes,
               const double* __restrict__ sums, const double* __restrict__ parts, long long width,
               bool by_row, bool single, void* value) {
  __shared__ double buffer[WARPS];
  double total = 0.0;
  for (long long group = threadIdx.x; group < groups.number; group += THREADS) {
    double sum = 0.0;
    for (long long task = 0; task < groups.tasks; ++task) sum += sums[group * groups.tasks + task];
    if (groups.length > 0 && sizes[(group + 1) * groups.length - 1] < T(0))
      sum = __longlong_as_double(0x7ff8000000000000LL);
    const double part = parts[group * width];
    sum = part != 0.0 ? part * sum : 0.0;
    total += sum;
    if (!by_row) continue;
    if (single) static_cast<float*>(value)[group] += float(sum);
    else static_cast<double*>(value)[group] += sum;
  }
  if (by_row) return;
  total = block_sum(total, buffer);
  if (threadIdx.x != 0) return;
  if (single) static_cast<float*>(value)[0] = float(double(static_cast<float*>(value)[0]) + total);
  else static_cast<double*>(value)[0] += total;
}
