// Blocks, threads, barriers and warp operations.
//
// A block resumes its threads one after the other. Each runs until it waits (for a barrier, or for
// the other lanes of a warp operation) or returns. When all wait, `settle` completes what is
// complete, and says what is wrong where nothing is.
#pragma once
#include <algorithm>
#include <atomic>
#include <link.h>
#include <memory>
#include <mutex>
#include <source_location>
#include <string>
#include <thread>
#include <vector>

#include "hostcuda/fibers.hpp"
#include "hostcuda/language.hpp"

namespace hostcuda {

using Place = std::source_location;

// An address that ThreadSanitizer knows: what is released there is seen by who acquires it.
struct alignas(8) Gate {
  char byte;
#if defined(__SANITIZE_THREAD__)
  void release() { __tsan_release(this); }
  void acquire() { __tsan_acquire(this); }
#else
  void release() {}
  void acquire() {}
#endif
};

enum class State { ready, at_barrier, in_warp_operation, returned };

struct Thread {
  Context context;
  State state = State::ready;
  uint3 index{};
  // What it waits for, and where it says so.
  const char* operation = "";
  Place place{};
  unsigned mask = 0;        // lanes of the warp operation
  int source = 0;           // lane whose value it asks for; BALLOT: one bit of every lane
  std::uint64_t value = 0;  // that it offers
  std::uint64_t answer = 0;
};
constexpr int BALLOT = -1;

struct Launch {
  dim3 grid, block;
  std::size_t shared_bytes;
  unsigned order;  // 0: forward, 1: reverse, more: shuffled, another way for each number
  void (*call)(void**);
  void** arguments;
  Gate start, end, fence;
  std::mutex mutex;
  std::atomic<bool> failed{false};
  std::string error;
  std::vector<std::shared_ptr<void>> kept;  // until all blocks are done: sanitizers know addresses

  HOSTCUDA_QUIET void fail(const std::string& message) {
    std::lock_guard<std::mutex> guard(mutex);
    if (!failed.exchange(true)) error = message;
  }
};

struct Block {
  Launch* launch;
  Context scheduler;
  std::vector<Thread> threads;
  unsigned alive;
  std::unique_ptr<void, void (*)(void*)> dynamic_shared{nullptr, std::free};
  // Two gates each, used in turn: a thread that has passed one may release the next at once.
  Gate barrier_gates[2], warp_gates[2];
  unsigned barriers = 0, warp_operations = 0;
};

inline thread_local Block* this_block = nullptr;
inline thread_local Thread* this_thread = nullptr;

inline unsigned thread_number() { return this_thread - this_block->threads.data(); }

HOSTCUDA_QUIET inline void wait(State state, const char* operation, Place place) {
  Thread& thread = *this_thread;
  thread.state = state;
  thread.operation = operation;
  thread.place = place;
  switch_context(thread.context, this_block->scheduler, state == State::returned);
}

HOSTCUDA_QUIET inline void fiber() {
  arrived(this_block->scheduler);
  Launch* launch = this_block->launch;
  launch->start.acquire();
  launch->call(launch->arguments);
  launch->end.release();
  wait(State::returned, "return", Place::current());
}

inline std::string at(const Thread& thread) {
  const auto number = &thread - this_block->threads.data();
  return "block (" + std::to_string(blockIdx.x) + ", " + std::to_string(blockIdx.y) + ") thread " +
         std::to_string(number) + " in " + thread.operation + " at " + thread.place.file_name() +
         ":" + std::to_string(thread.place.line());
}

inline bool same_wait(const Thread& a, const Thread& b) {
  return a.state == b.state && std::strcmp(a.operation, b.operation) == 0 &&
         a.place.line() == b.place.line() && a.place.column() == b.place.column();
}

// Completes the warp operation that `first` waits for, if every lane of its mask does.
inline bool complete(Thread* warp, unsigned lanes, const Thread& first) {
  const unsigned mask = first.mask;
  std::uint64_t ballot = 0;
  for (unsigned lane = 0; lane < 32; ++lane) {
    if (!(mask >> lane & 1)) continue;
    if (lane >= lanes || !same_wait(warp[lane], first) || warp[lane].mask != mask) return false;
    ballot |= std::uint64_t(warp[lane].value != 0) << lane;
  }
  for (unsigned lane = 0; lane < lanes; ++lane) {
    if (!(mask >> lane & 1)) continue;
    Thread& thread = warp[lane];
    const bool given = thread.source >= 0 && thread.source < 32 && (mask >> thread.source & 1);
    // A lane outside the mask has no value to give: all bits set, NaN as a float.
    thread.answer = thread.source == BALLOT ? ballot
                    : given                 ? warp[thread.source].value
                                            : ~std::uint64_t(0);
  }
  for (unsigned lane = 0; lane < lanes; ++lane)
    if (mask >> lane & 1) warp[lane].state = State::ready;
  return true;
}

// All threads wait: let go on who may. False: nobody may, and the launch has failed.
HOSTCUDA_QUIET inline bool settle(Block& block) {
  auto& threads = block.threads;
  bool any = false;
  for (std::size_t w = 0; w < threads.size(); w += 32) {
    const unsigned lanes = std::min<std::size_t>(32, threads.size() - w);
    for (unsigned lane = 0; lane < lanes; ++lane)
      if (threads[w + lane].state == State::in_warp_operation)
        any |= complete(&threads[w], lanes, threads[w + lane]);
  }
  if (any) {
    ++block.warp_operations;
    return true;
  }
  const Thread* first = nullptr;
  for (const Thread& thread : threads) {
    if (thread.state == State::returned) continue;
    if (first == nullptr) first = &thread;
    if (thread.state == State::at_barrier && same_wait(thread, *first)) continue;
    const std::string other = &thread == first ? "" : "; " + at(thread);
    const auto returned = threads.size() - block.alive;
    block.launch->fail("deadlock or divergent barrier: " + at(*first) + other + "; " +
                       std::to_string(returned) + " of " + std::to_string(threads.size()) +
                       " threads have returned");
    return false;
  }
  for (Thread& thread : threads)
    if (thread.state == State::at_barrier) thread.state = State::ready;
  ++block.barriers;
  return true;
}

// Static shared memory is this OS thread's part of the library's thread-local storage. It starts as
// NaN, not as the zeros that hide a missing initialisation.
HOSTCUDA_QUIET inline int poison_shared_memory(dl_phdr_info* library, std::size_t, void*) {
  const auto here = reinterpret_cast<std::uintptr_t>(&poison_shared_memory);
  bool ours = false;
  std::size_t bytes = 0;
  for (int k = 0; k < library->dlpi_phnum; ++k) {
    const auto& part = library->dlpi_phdr[k];
    if (part.p_type == PT_LOAD && here - (library->dlpi_addr + part.p_vaddr) < part.p_memsz)
      ours = true;
    if (part.p_type == PT_TLS) bytes = part.p_memsz;
  }
  if (ours && library->dlpi_tls_data != nullptr) std::memset(library->dlpi_tls_data, 0xff, bytes);
  return ours;
}

HOSTCUDA_QUIET inline void run_block(Launch& launch, unsigned number) {
  this_block = nullptr;  // makes this thread's storage exist
  dl_iterate_phdr(poison_shared_memory, nullptr);
  auto kept = std::make_shared<Block>();
  Block& block = *kept;
  {
    std::lock_guard<std::mutex> guard(launch.mutex);
    launch.kept.push_back(kept);
  }
  this_block = &block;
  blockDim = launch.block;
  gridDim = launch.grid;
  blockIdx = {number % gridDim.x, number / gridDim.x % gridDim.y, number / gridDim.x / gridDim.y};
  const unsigned count = blockDim.x * blockDim.y * blockDim.z;
  block.launch = &launch;
  block.alive = count;
  block.threads.resize(count);
  block.dynamic_shared.reset(std::aligned_alloc(128, (launch.shared_bytes / 128 + 1) * 128));
  std::memset(block.dynamic_shared.get(), 0xff, launch.shared_bytes);
#if defined(__SANITIZE_THREAD__)
  block.scheduler.race_detector = __tsan_get_current_fiber();
#endif
  char* stacks = allocate_stacks(count);
  if (stacks == nullptr) return launch.fail("no memory for the stacks of a block");
  std::vector<unsigned> order(count);
  for (unsigned i = 0; i < count; ++i) {
    Thread& thread = block.threads[i];
    thread.index = {i % blockDim.x, i / blockDim.x % blockDim.y, i / blockDim.x / blockDim.y};
    prepare(thread.context, stacks + i * STACK_BYTES, fiber);
    order[i] = launch.order == 1 ? count - 1 - i : i;
  }
  std::uint64_t random = launch.order * 0x9e3779b97f4a7c15u + number;
  while (block.alive > 0 && !launch.failed) {
    bool ran = false;
    for (unsigned i = count - 1; launch.order > 1 && i > 0; --i) {
      random = random * 6364136223846793005u + 1442695040888963407u;
      std::swap(order[i], order[(random >> 33) % (i + 1)]);
    }
    for (unsigned i = 0; i < count && !launch.failed; ++i) {
      Thread& thread = block.threads[order[i]];
      if (thread.state != State::ready) continue;
      ran = true;
      this_thread = &thread;
      threadIdx = thread.index;
      switch_context(block.scheduler, thread.context);
      block.alive -= thread.state == State::returned;
    }
    if (!ran && !settle(block)) break;
  }
#if defined(__SANITIZE_THREAD__)
  for (Thread& thread : block.threads) __tsan_destroy_fiber(thread.context.race_detector);
#endif
  free_stacks(stacks, count);
}

// Runs every block on an OS thread of its own, `workers` of them at a time. Workers share nothing, no
// counter either: a kernel must not owe it to them that its blocks see each other's writes.
HOSTCUDA_QUIET inline void run(Launch& launch, unsigned workers) {
  const unsigned blocks = launch.grid.x * launch.grid.y * launch.grid.z;
  launch.start.release();
  const auto work = [&launch, blocks, workers](unsigned first) {
    for (unsigned i = first; i < blocks && !launch.failed; i += workers)
      std::thread([&] { run_block(launch, launch.order == 1 ? blocks - 1 - i : i); }).join();
  };
  std::vector<std::thread> threads;
  for (unsigned k = 1; k < workers; ++k) threads.emplace_back(work, k);
  work(0);
  for (auto& thread : threads) thread.join();
  launch.end.acquire();
}

}  // namespace hostcuda
