// Sums over the threads of a block, in one order.
#pragma once
#include "constants.cuh"

constexpr int WARPS = THREADS / 32;

// The sum of every thread's number, in thread 0; buffer: WARPS doubles of shared memory.
__device__ __forceinline__ double block_sum(double value, double* buffer) {
  for (int distance = 16; distance > 0; distance /= 2)
    value += __shfl_down_sync(0xffffffffu, value, distance);
  __syncthreads();  // the buffer may still be read for the sum before
  if (threadIdx.x % 32 == 0) buffer[threadIdx.x / 32] = value;
  __syncthreads();
  if (threadIdx.x == 0)
    for (int warp = 1; warp < WARPS; ++warp) value += buffer[warp];
  return value;
}

// The same sum in every thread.
__device__ __forceinline__ double sum_for_all(double value, double* buffer) {
  value = block_sum(value, buffer);
  if (threadIdx.x == 0) buffer[0] = value;
  __syncthreads();
  return buffer[0];
}
