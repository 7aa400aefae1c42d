// The device functions that the kernels call. What is missing here does not compile: add it.
#pragma once
#include <atomic>
#include <bit>
#include <type_traits>

#include "hostcuda/scheduler.hpp"

#define HOSTCUDA_PLACE hostcuda::Place place = hostcuda::Place::current()

// Synchronisation

inline void __syncthreads(HOSTCUDA_PLACE) {
  hostcuda::Gate& gate = hostcuda::this_block->barrier_gates[hostcuda::this_block->barriers & 1];
  gate.release();
  hostcuda::wait(hostcuda::State::at_barrier, "__syncthreads", place);
  gate.acquire();
}

// ThreadSanitizer does not understand fences: there, one address of the launch stands for them all.
inline void __threadfence() {
#if defined(__SANITIZE_THREAD__)
  hostcuda::this_block->launch->fence.acquire();
  hostcuda::this_block->launch->fence.release();
#else
  std::atomic_thread_fence(std::memory_order_seq_cst);
#endif
}

// Warp operations

namespace hostcuda {

inline unsigned lane() { return thread_number() & 31; }

template <class T>
HOSTCUDA_QUIET T exchange(const char* operation, unsigned mask, T value, int source, Place place) {
  static_assert(sizeof(T) <= sizeof(std::uint64_t));
  Thread& thread = *this_thread;
  if (!(mask >> lane() & 1)) {
    thread.operation = operation;
    thread.place = place;
    this_block->launch->fail(at(thread) + " is not in its own mask");
  }
  thread.value = 0;
  std::memcpy(&thread.value, &value, sizeof value);
  thread.mask = mask;
  thread.source = source;
  wait(State::in_warp_operation, operation, place);
  T answer;
  std::memcpy(&answer, &thread.answer, sizeof answer);
  return answer;
}

}  // namespace hostcuda

inline void __syncwarp(unsigned mask = ~0u, HOSTCUDA_PLACE) {
  hostcuda::Gate& gate = hostcuda::this_block->warp_gates[hostcuda::this_block->warp_operations & 1];
  gate.release();
  hostcuda::exchange("__syncwarp", mask, 0, hostcuda::BALLOT, place);
  gate.acquire();
}
inline unsigned __ballot_sync(unsigned mask, int predicate, HOSTCUDA_PLACE) {
  const std::uint64_t vote = predicate != 0;
  return unsigned(hostcuda::exchange("__ballot_sync", mask, vote, hostcuda::BALLOT, place));
}
template <class T>
T __shfl_sync(unsigned mask, T value, int source, HOSTCUDA_PLACE) {
  return hostcuda::exchange("__shfl_sync", mask, value, source & 31, place);
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, HOSTCUDA_PLACE) {
  const unsigned lane = hostcuda::lane(), source = lane + delta;
  return hostcuda::exchange("__shfl_down_sync", mask, value, source < 32 ? source : lane, place);
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int bits, HOSTCUDA_PLACE) {
  const int source = hostcuda::lane() ^ bits;
  return hostcuda::exchange("__shfl_xor_sync", mask, value, source, place);
}

// Memory

template <class T>
T __ldg(const T* address) { return *address; }
template <class T>
T __ldcs(const T* address) { return *address; }
template <class T>
T __ldcg(const T* address) { return *address; }
template <class T>
void __stcs(T* address, std::type_identity_t<T> value) { *address = value; }
template <class T>
void __stcg(T* address, std::type_identity_t<T> value) { *address = value; }

template <class T>
T atomicAdd(T* address, std::type_identity_t<T> value) {
  static_assert(std::is_integral_v<T>, "sums of floats depend on the order of atomics");
  return std::atomic_ref<T>(*address).fetch_add(value, std::memory_order_relaxed);
}
inline unsigned atomicOr(unsigned* address, unsigned value) {
  return std::atomic_ref<unsigned>(*address).fetch_or(value, std::memory_order_relaxed);
}
inline unsigned atomicExch(unsigned* address, unsigned value) {
  return std::atomic_ref<unsigned>(*address).exchange(value, std::memory_order_relaxed);
}
// Wraps to 0 after `last`: a ticket that is ready for the next launch.
inline unsigned atomicInc(unsigned* address, unsigned last) {
  std::atomic_ref<unsigned> counter(*address);
  unsigned old = counter.load(std::memory_order_relaxed);
  while (!counter.compare_exchange_weak(old, old >= last ? 0 : old + 1, std::memory_order_relaxed)) {
  }
  return old;
}

// Arithmetic

namespace hostcuda {

// The float that lies so many units in the last place above one: an instruction that errs as much as
// its documentation allows. Subnormal numbers are flushed to 0, as CuPy has them.
inline float off_by(int units, float value) {
  if (std::fabs(value) < 1.17549435e-38f) return std::copysign(0.0f, value);
  if (!(std::fabs(value) < 3e38f)) return value;
  return std::bit_cast<float>(std::bit_cast<int>(value) + units);
}

}  // namespace hostcuda

inline float __fdividef(float a, float b) { return a / b; }
inline float __frcp_rn(float a) { return 1.0f / a; }
inline double __drcp_rn(double a) { return 1.0 / a; }
inline int __popc(unsigned bits) { return std::popcount(bits); }
inline float __int_as_float(int bits) { return std::bit_cast<float>(bits); }
inline int __float_as_int(float value) { return std::bit_cast<int>(value); }
inline float __uint_as_float(unsigned bits) { return std::bit_cast<float>(bits); }
inline unsigned __float_as_uint(float value) { return std::bit_cast<unsigned>(value); }
inline double __longlong_as_double(long long bits) { return std::bit_cast<double>(bits); }
inline long long __double_as_longlong(double value) { return std::bit_cast<long long>(value); }

// extern __shared__ has no counterpart: kernels ask for their dynamic shared memory by this.
template <class T>
T* hostcuda_dynamic_shared() {
  return static_cast<T*>(hostcuda::this_block->dynamic_shared.get());
}
