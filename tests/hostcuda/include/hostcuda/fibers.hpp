// Switching stacks: a CUDA thread is a fiber of the OS thread that is its block.
//
// The sanitizers must be told of every switch, or they take one fiber's stack for another's.
#pragma once
#include <cstddef>
#include <cstdlib>
#include <sys/mman.h>

#if defined(__SANITIZE_THREAD__)
#include <sanitizer/tsan_interface.h>
#endif
#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif
// Only kernels are under test: what the scheduler itself touches is no race of theirs.
#define HOSTCUDA_QUIET __attribute__((no_sanitize_thread, noinline))

#if !defined(__x86_64__)
#error "hostcuda switches stacks in x86-64 assembly"
#endif
// Push what the calling convention preserves, exchange the stack pointers, pop.
extern "C" __attribute__((visibility("hidden"))) void hostcuda_switch(void** save, void* load);
asm(R"(
.pushsection .text
.weak hostcuda_switch
.hidden hostcuda_switch
.type hostcuda_switch, @function
hostcuda_switch:
    push %rbp
    push %rbx
    push %r12
    push %r13
    push %r14
    push %r15
    mov %rsp, (%rdi)
    mov %rsi, %rsp
    pop %r15
    pop %r14
    pop %r13
    pop %r12
    pop %rbx
    pop %rbp
    ret
.size hostcuda_switch, .-hostcuda_switch
.popsection
)");

namespace hostcuda {

constexpr std::size_t STACK_BYTES = 128 * 1024;
constexpr int PRESERVED = 6;  // registers that hostcuda_switch pushes

// Where a flow of control stands while another one runs.
struct Context {
  void* stack_pointer = nullptr;
  char* stack = nullptr;  // its lowest address; unknown for an OS thread until it was left once
  std::size_t bytes = 0;
#if defined(__SANITIZE_THREAD__)
  void* race_detector = nullptr;
#endif
#if defined(__SANITIZE_ADDRESS__)
  void* fake_stack = nullptr;
#endif
};

// Prepares a context in which `entry` runs when it is first switched to; it must never return.
inline void prepare(Context& context, char* stack, void (*entry)()) {
  context.stack = stack;
  context.bytes = STACK_BYTES;
  void** top = reinterpret_cast<void**>(stack + STACK_BYTES) - 2;  // as aligned as after a call
  *top = reinterpret_cast<void*>(entry);
  context.stack_pointer = top - PRESERVED;
#if defined(__SANITIZE_THREAD__)
  context.race_detector = __tsan_create_fiber(0);
#endif
}

// Goes on in `to`; returns when somebody switches back. `forever`: nobody will.
HOSTCUDA_QUIET inline void switch_context(Context& from, Context& to, bool forever = false) {
#if defined(__SANITIZE_THREAD__)
  __tsan_switch_to_fiber(to.race_detector, __tsan_switch_to_fiber_no_sync);
#endif
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(forever ? nullptr : &from.fake_stack, to.stack, to.bytes);
#endif
  hostcuda_switch(&from.stack_pointer, to.stack_pointer);
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(from.fake_stack, nullptr, nullptr);
#endif
  (void)forever;
}

// Called first thing in a new fiber; `from` is the OS thread's context, whose stack is now known.
HOSTCUDA_QUIET inline void arrived(Context& from) {
#if defined(__SANITIZE_ADDRESS__)
  const void* stack;
  __sanitizer_finish_switch_fiber(nullptr, &stack, &from.bytes);
  from.stack = static_cast<char*>(const_cast<void*>(stack));
#endif
  (void)from;
}

inline char* allocate_stacks(std::size_t count) {
  void* memory = mmap(nullptr, count * STACK_BYTES, PROT_READ | PROT_WRITE,
                      MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  return memory == MAP_FAILED ? nullptr : static_cast<char*>(memory);
}

inline void free_stacks(char* stacks, std::size_t count) {
#if defined(__SANITIZE_ADDRESS__)
  __asan_unpoison_memory_region(stacks, count * STACK_BYTES);
#endif
  munmap(stacks, count * STACK_BYTES);
}

}  // namespace hostcuda
