// Counting voxels by a number that each has, and looking up the slopes of Lovasz terms by it.
//
// What is counted, constants.Histogram says; ../cpu/histograms.py does the same. Counts are integers,
// so atomics add them up to the same bits in any order.
#pragma once
#include "constants.cuh"
#include "points.cuh"

// By value; what of it is used, the families of a variant say.
struct Counting {
  double gamma;                       // of the focal sums
  const void* slopes;                 // (samples, classes, voxels) of a term that sorts
  unsigned long long* counts;         // (samples, classes, columns)
  long long columns;                  // of a row
  long long first;                    // column where those of errors begin
  long long bins, lowest, octave_bits;  // of errors: bins of a label, first octave, bits of a bin in it
};

// The bin of an error above 0, and its part of the bin's sum.
__device__ __forceinline__ long long bin_of(const Counting& c, long long bits, int fraction_bits,
                                            long long bias, long long& part) {
  const long long below = fraction_bits - c.octave_bits, spare = fraction_bits - FRACTION_BITS;
  const long long k = (bits >> below) - ((bias + c.lowest) << c.octave_bits);
  part = (bits & ((1LL << below) - 1)) >> spare;
  if (k < 1) part = 0;
  if (k >= c.bins) part = 1LL << (below - spare);
  return k < 1 ? 0 : k >= c.bins ? c.bins - 1 : k;
}
__device__ __forceinline__ long long bin_of(const Counting& c, float error, long long& part) {
  return bin_of(c, __float_as_int(error), 23, 127, part);
}
__device__ __forceinline__ long long bin_of(const Counting& c, double error, long long& part) {
  return bin_of(c, __double_as_longlong(error), 52, 1023, part);
}

template <typename T>
__device__ __forceinline__ T hinge_error(T x, bool positive) {
  return T(1) - (positive ? x : -x);
}

template <typename T>
__device__ __forceinline__ void count_error(const Counting& c, unsigned long long* row, T error,
                                            bool positive) {
  row += c.first;
  if (error > T(0)) {
    long long part;
    const long long k = 1 + bin_of(c, error, part) + (positive ? 0 : c.bins);
    atomicAdd(row + k, 1ULL);
    if (part != 0) atomicAdd(row + k + 2 * c.bins, (unsigned long long)part);
  } else if (error != error) {
    atomicAdd(row, 1ULL);
  }
}

template <typename T>
__device__ __forceinline__ void count_prediction(unsigned long long* row, T x, bool is_logit,
                                                 bool positive) {
  if (x != x) {
    atomicAdd(row, 1ULL);
    return;
  }
  const T scaled = x * T(is_logit ? 32 : CURVE_BINS);  // exact; adding the shift to it would round
  const long long shift = is_logit ? CURVE_BINS / 2 : 0, last = CURVE_BINS - 1 - shift;
  const T inside = scaled > T(-shift) ? (scaled < T(last) ? scaled : T(last)) : T(-shift);
  long long k = (long long)inside;
  if (T(k) > inside) --k;
  atomicAdd(row + 1 + k + shift + (positive ? 0 : CURVE_BINS), 1ULL);
}

template <typename V, typename T>
__device__ __forceinline__ void count_voxel(const Counting& c, unsigned long long* row, T x,
                                            bool positive) {
  if (V::curve) count_prediction(row, x, !V::probs, positive);
  if (V::lovasz) count_error(c, row, hinge_error(x, positive), positive);
}

// dL/de of an error, from the slopes of the bins of the foreground, then of the background. Where the
// error is not above 0, or NaN, its sign or NaN decides.
template <typename T>
__device__ __forceinline__ T slope_of_error(const Counting& c, const double* table, T error,
                                            bool positive) {
  if (!(error > T(0))) return error != error ? error : T(0);
  long long part;
  return T(table[bin_of(c, error, part) + (positive ? 0 : c.bins)]);
}
