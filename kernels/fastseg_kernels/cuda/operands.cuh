// One voxel of any array: any element type, any strides, labels, masks.
//
// A job is the record of job.py, passed by value. Rows that are runs of memory in the type that is
// computed in are read by vectors elsewhere; this is the way for all others.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "constants.cuh"
#include "points.cuh"

struct Operand {
  const char* address;  // null: there is none
  long long code;       // of the element type, as constants.DTYPE_CODES
  long long stride_n, stride_c, strides[MAX_DIMS];  // in bytes
};

struct Job {
  Operand logits, targets, mask, weights, out;
  long long ndim, sizes[MAX_DIMS];
  long long samples, classes, voxels;  // voxels of one row
  long long task_voxels, row_tasks, tasks;  // voxels of one task, tasks of one row and of all
  long long labelled, target_mode;     // targets are labels; how they become targets
  long long has_ignore, ignore_label, positive_label;
  double ignore_real, positive_real, threshold;
};

__device__ __forceinline__ float widened(float v) { return v; }
__device__ __forceinline__ double widened(double v) { return v; }
__device__ __forceinline__ float widened(__half v) { return __half2float(v); }
__device__ __forceinline__ float widened(__nv_bfloat16 v) { return __bfloat162float(v); }
__device__ __forceinline__ void narrow(float v, float& to) { to = v; }
__device__ __forceinline__ void narrow(double v, double& to) { to = v; }
__device__ __forceinline__ void narrow(double v, float& to) { to = float(v); }
__device__ __forceinline__ void narrow(float v, __half& to) { to = __float2half_rn(v); }
__device__ __forceinline__ void narrow(float v, __nv_bfloat16& to) { to = __float2bfloat16_rn(v); }
__device__ __forceinline__ void narrow(double v, __half& to) { narrow(float(v), to); }
__device__ __forceinline__ void narrow(double v, __nv_bfloat16& to) { narrow(float(v), to); }

template <typename E>
__device__ __forceinline__ E element(const char* address) {
  return *reinterpret_cast<const E*>(address);
}

// How far from its address each operand has its row, and a voxel of it.
struct Place {
  long long logits, targets, mask, weights, out;

  // The row of sample n and class c.
  __device__ __forceinline__ Place(const Job& job, long long n, long long c)
      : logits(n * job.logits.stride_n + c * job.logits.stride_c),
        targets(n * job.targets.stride_n + c * job.targets.stride_c),
        mask(n * job.mask.stride_n + c * job.mask.stride_c),
        weights(n * job.weights.stride_n + c * job.weights.stride_c),
        out(n * job.out.stride_n + c * job.out.stride_c) {}

  __device__ __forceinline__ void move(const Job& job, int axis, long long steps) {
    logits += steps * job.logits.strides[axis];
    targets += steps * job.targets.strides[axis];
    mask += steps * job.mask.strides[axis];
    weights += steps * job.weights.strides[axis];
    out += steps * job.out.strides[axis];
  }

  // A voxel of this row. I: an unsigned type that counts the voxels of a row; a division of 64 bits
  // is a call of some seventy instructions.
  template <typename I>
  __device__ __forceinline__ Place voxel(const Job& job, I number) const {
    Place there = *this;
    for (int axis = int(job.ndim) - 1; axis > 0; --axis) {
      const I size = I(job.sizes[axis]), rest = number / size;
      there.move(job, axis, (long long)(number - rest * size));
      number = rest;
    }
    there.move(job, 0, (long long)number);
    return there;
  }
};

template <typename T>
__device__ __forceinline__ T read_real(const char* address, long long code) {
  switch (code) {
    case CODE_FLOAT32: return T(element<float>(address));
    case CODE_FLOAT64: return T(element<double>(address));
    case CODE_FLOAT16: return T(widened(element<__half>(address)));
    case CODE_BFLOAT16: return T(widened(element<__nv_bfloat16>(address)));
    case CODE_INT8: return T(element<signed char>(address));
    case CODE_UINT16: return T(element<unsigned short>(address));
    case CODE_INT16: return T(element<short>(address));
    case CODE_UINT32: return T(element<unsigned>(address));
    case CODE_INT32: return T(element<int>(address));
    case CODE_UINT64: return T(element<unsigned long long>(address));
    case CODE_INT64: return T(element<long long>(address));
    default: return T(element<unsigned char>(address));
  }
}

// uint64 is read as int64: labels past 2^63 come out negative, as the host passes them.
__device__ __forceinline__ long long read_integer(const char* address, long long code) {
  switch (code) {
    case CODE_INT8: return element<signed char>(address);
    case CODE_UINT16: return element<unsigned short>(address);
    case CODE_INT16: return element<short>(address);
    case CODE_UINT32: return element<unsigned>(address);
    case CODE_INT32: return element<int>(address);
    case CODE_UINT64:
    case CODE_INT64: return element<long long>(address);
    default: return element<unsigned char>(address);
  }
}

// Turns a label into 0 or 1, or into 2 if it is neither; ignore_index is compared first.
template <typename L>
__device__ __forceinline__ int classify(L label, L ignore, L positive, const Job& job,
                                        bool& left_out) {
  left_out = job.has_ignore && label == ignore;
  if (label != label) return 2;  // NaN
  if (job.target_mode == TARGETS_NONZERO) return label != L(0);
  if (job.target_mode == TARGETS_EQUAL) return label == positive;
  return label == L(0) ? 0 : label == L(1) ? 1 : 2;
}

template <typename V, typename T = typename V::Real>
__device__ __forceinline__ Voxel<T> read_voxel(const Job& job, const Place& at) {
  Voxel<T> v;
  v.left_out = false;
  v.x = read_real<T>(job.logits.address + at.logits, job.logits.code);
  const char* target = job.targets.address + at.targets;
  if (!job.labelled) {
    v.p = read_real<T>(target, job.targets.code);
    v.left_out = job.has_ignore && v.p == T(job.ignore_real);
  } else if (job.targets.code < CODE_FLOAT16) {
    const long long label = read_integer(target, job.targets.code);
    v.p = T(classify(label, job.ignore_label, job.positive_label, job, v.left_out));
  } else {
    const double label = read_real<double>(target, job.targets.code);
    v.p = T(classify(label, job.ignore_real, job.positive_real, job, v.left_out));
  }
  v.w = V::weighted ? read_real<T>(job.weights.address + at.weights, job.weights.code) : T(1);
  if (job.mask.address != nullptr)
    v.left_out |= read_integer(job.mask.address + at.mask, job.mask.code) == 0;
  return v;
}

template <typename T>
__device__ __forceinline__ void write_real(const char* where, long long code, T value) {
  char* const address = const_cast<char*>(where);
  switch (code) {
    case CODE_FLOAT32: *reinterpret_cast<float*>(address) = float(value); break;
    case CODE_FLOAT64: *reinterpret_cast<double*>(address) = double(value); break;
    case CODE_FLOAT16: narrow(float(value), *reinterpret_cast<__half*>(address)); break;
    default: narrow(float(value), *reinterpret_cast<__nv_bfloat16*>(address));
  }
}

// Four voxels at once: 16 bytes of float, 8 of a half.
template <typename E>
struct alignas(4 * sizeof(E) > 16 ? 16 : 4 * sizeof(E)) Four {
  E element[4];
};

// At these the following may be read and written at once.
template <typename E>
__device__ __forceinline__ bool is_aligned(const E* address) {
  return reinterpret_cast<unsigned long long>(address) % alignof(Four<E>) == 0;
}

template <typename E>
__device__ __forceinline__ Four<E> read_four(const E* address) {
  return *reinterpret_cast<const Four<E>*>(address);
}

template <typename E>
__device__ __forceinline__ void write_four(E* address, const Four<E>& values) {
  *reinterpret_cast<Four<E>*>(address) = values;
}
