// Fibers: stacks that take turns on one OS thread. A switch costs no system call, as swapcontext's would.
#pragma once

#include <sys/mman.h>
#include <ucontext.h>

#include <cstddef>
#include <new>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

namespace emulator {

// A stack, and where on it to go on: that of the OS thread, or a fiber's.
struct Context {
  void* registers[5];  // of __builtin_setjmp
  const void* stack;
  size_t stack_bytes;
  void* fake_stack;        // AddressSanitizer's
  ucontext_t* beginning;  // of a fiber that has not begun
};

inline Context* left;  // by the last switch

#if defined(__SANITIZE_ADDRESS__)
inline void leave(Context& from, const Context& to) {
  left = &from;
  __sanitizer_start_switch_fiber(&from.fake_stack, to.stack, to.stack_bytes);
}
// Tells, too, which stack the OS thread came with.
inline void arrive(Context& here) {
  __sanitizer_finish_switch_fiber(here.fake_stack, &left->stack, &left->stack_bytes);
}
inline void forget_frames(const Context& context) { ASAN_UNPOISON_MEMORY_REGION(context.stack, context.stack_bytes); }
#else
inline void leave(Context&, const Context&) {}
inline void arrive(Context&) {}
inline void forget_frames(const Context&) {}
#endif

// Not instrumented: AddressSanitizer takes each longjmp for one that unwinds the stack.
#define EMULATOR_SWITCH inline __attribute__((noinline, no_sanitize("address", "undefined")))

EMULATOR_SWITCH void enter(Context& to) {
  if (!to.beginning) __builtin_longjmp(to.registers, 1);
  ucontext_t* beginning = to.beginning;
  to.beginning = nullptr;
  setcontext(beginning);
}

// Returns when something switches back.
EMULATOR_SWITCH void switch_to(Context& from, Context& to) {
  leave(from, to);
  if (__builtin_setjmp(from.registers) == 0) enter(to);
  arrive(from);
}

#undef EMULATOR_SWITCH

class Fiber {
 public:
  Context context = {};

  // `body` calls `arrive` first, and never returns.
  explicit Fiber(void (*body)()) : body_(body) {
    void* memory = mmap(nullptr, kBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED || mprotect(memory, kGuard, PROT_NONE) != 0) throw std::bad_alloc();
    context.stack = static_cast<char*>(memory) + kGuard;
    context.stack_bytes = kBytes - kGuard;
    restart();
  }

  // The next switch to it begins `body`, whatever it was doing.
  void restart() {
    forget_frames(context);
    getcontext(&beginning_);
    beginning_.uc_stack.ss_sp = const_cast<void*>(context.stack);
    beginning_.uc_stack.ss_size = context.stack_bytes;
    makecontext(&beginning_, body_, 0);
    context.fake_stack = nullptr;
    context.beginning = &beginning_;
  }

 private:
  static constexpr size_t kBytes = 256 << 10, kGuard = 64 << 10;

  void (*body_)();
  ucontext_t beginning_;
};

}  // namespace emulator
