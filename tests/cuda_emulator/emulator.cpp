// Runs the threads of a block as fibers, one at a time, always in the same order, and checks what they do.
#include <algorithm>
#include <cstdarg>
#include <cstdio>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "cuda_runtime.h"
#include "fiber.h"
#include "written.h"

uint3 threadIdx, blockIdx;
dim3 blockDim, gridDim;

namespace emulator {
namespace {

constexpr unsigned kWarp = 32, kMaxThreads = 1024, kFullMask = 0xffffffffu;
constexpr size_t kMaxParameterBytes = CUDART_VERSION >= 12010 ? 32764 : 4096;
constexpr int kDevices = 2;

// What the next thread to arrive has to match.
struct Meeting {
  Site site;
  unsigned arrived;
};

struct Warp {
  uint32_t lanes;     // a bit for each that exists,
  uint32_t runnable;  // and for each that neither waits nor has ended
  Meeting meeting;
  unsigned meetings;  // so far
  // Of the shuffle that gathers and of the one before: a lane reads that one's values while others arrive at the next.
  uint64_t values[2][kWarp];
};

struct Block {
  unsigned threads, ended;
  Meeting barrier;
  Warp warps[kMaxThreads / kWarp];
  Site waiting[kMaxThreads];  // without a function where the thread does not wait
};

struct Launch {
  cudaLaunchConfig_t config;
  int device;
};

// What a check found in the calling thread's last launch.
struct Finding {
  cudaError_t error;
  std::string what;
};

// What tests control and ask for.
cudaError_t planted_error = cudaSuccess;
bool stub = false;
int64_t launches = 0;
Launch last_launch;

std::mutex one_launch_at_a_time;
Block block;
const std::function<void()>* kernel;
WrittenBytes written;
std::vector<std::unique_ptr<Fiber>> fibers;
Context host;
bool failed;

thread_local int current_device = 0;
thread_local cudaError_t last_error = cudaSuccess;
thread_local Finding finding;

[[gnu::format(printf, 1, 2)]] std::string text(const char* format, ...) {
  char buffer[1024];
  va_list arguments;
  va_start(arguments, format);
  vsnprintf(buffer, sizeof(buffer), format, arguments);
  va_end(arguments);
  return buffer;
}

// Leaves the kernel for good.
void fail(unsigned thread, const std::string& what) {
  finding = {cudaErrorLaunchFailure, text("block %u, thread %u %s", blockIdx.x, thread, what.c_str())};
  failed = true;
  switch_to(fibers[threadIdx.x]->context, host);
}

void fail(const std::string& what) { fail(threadIdx.x, what); }

std::string name(const Site& site) {
  return text("%s (%s:%d)", site.function, site.file, site.line);
}

bool is_same(const Site& a, const Site& b) {
  const auto same = [](const char* x, const char* y) { return x == y || !strcmp(x, y); };
  return a.line == b.line && same(a.function, b.function) && same(a.file, b.file);
}

Warp& warp_of(unsigned thread) { return block.warps[thread / kWarp]; }
uint32_t bit_of(unsigned thread) { return 1u << thread % kWarp; }

// Every thread waits or has ended: names one that waits, and one that it waits for in vain.
std::string report_deadlock(unsigned& waits) {
  waits = 0;
  while (!block.waiting[waits].function) ++waits;
  const Site& site = block.waiting[waits];
  const bool at_barrier = block.barrier.arrived > 0 && is_same(site, block.barrier.site);
  unsigned missing = at_barrier ? 0 : waits / kWarp * kWarp;
  const auto is_there = [&](const Site& other) { return other.function && is_same(site, other); };
  while (is_there(block.waiting[missing])) ++missing;
  const Site& other = block.waiting[missing];
  return text("waits at %s, which thread %u does not reach: it %s", name(site).c_str(), missing,
              other.function ? ("waits at " + name(other)).c_str() : "has ended");
}

// Lanes take turns in the order 0 ^ 21, 1 ^ 21, ... 31 ^ 21, and warps from the last to the first. It goes upwards at some
// distances and downwards at others: without a barrier some thread reads too early, whichever way the data goes.
constexpr unsigned kScramble = 0b10101;

// Moves the bit of each lane to its place in that order.
uint32_t by_turn(uint32_t lanes) {
  lanes = (lanes & 0x55555555u) << 1 | (lanes >> 1 & 0x55555555u);
  lanes = (lanes & 0x0f0f0f0fu) << 4 | (lanes >> 4 & 0x0f0f0f0fu);
  return lanes << 16 | lanes >> 16;
}

// The next thread that can run, of the same warp if there is one.
bool find_runnable(unsigned& thread) {
  const unsigned warps = (block.threads + kWarp - 1) / kWarp;
  const uint32_t later = kFullMask << (thread % kWarp ^ kScramble) << 1;
  for (unsigned i = 0; i < warps; ++i) {
    const unsigned warp = (thread / kWarp + warps - i) % warps;
    const uint32_t runnable = by_turn(block.warps[warp].runnable);
    if (runnable) {
      thread = warp * kWarp + (__builtin_ctz(runnable & later ? runnable & later : runnable) ^ kScramble);
      return true;
    }
  }
  return false;
}

// Returns when the calling thread is woken.
void run_others() {
  const unsigned from = threadIdx.x;
  warp_of(from).runnable &= ~bit_of(from);
  unsigned next = from;
  if (!find_runnable(next)) {
    const std::string what = report_deadlock(next);
    fail(next, what);
  }
  threadIdx.x = next;
  switch_to(fibers[from]->context, fibers[next]->context);
}

// Whether the calling thread is the last of `expected`; if not, it has waited for the last.
bool gather(Meeting& meeting, unsigned expected, const Site& site) {
  if (meeting.arrived == 0) meeting.site = site;
  if (!is_same(meeting.site, site)) {
    fail("arrives at " + name(site) + " while others wait at " + name(meeting.site));
  }
  if (++meeting.arrived == expected) {
    meeting.arrived = 0;
    return true;
  }
  block.waiting[threadIdx.x] = site;
  run_others();
  return false;
}

void wake(Warp& warp) {
  const size_t first = (&warp - block.warps) * kWarp;
  std::fill_n(block.waiting + first, kWarp, Site{});
  warp.runnable = warp.lanes;
}

void thread_of_many_blocks() {
  arrive(fibers[threadIdx.x]->context);
  for (;;) {
    (*kernel)();
    if (++block.ended == block.threads) {
      switch_to(fibers[threadIdx.x]->context, host);
    } else {
      run_others();
    }
  }
}

void start_block(unsigned threads) {
  block.threads = threads;
  block.ended = 0;
  block.barrier = {};
  for (unsigned first = 0; first < threads; first += kWarp) {
    Warp& warp = warp_of(first);
    warp.lanes = kFullMask >> (kWarp - std::min(kWarp, threads - first));
    warp.meeting = {};
    wake(warp);
  }
  threadIdx.x = threads - 1;
  find_runnable(threadIdx.x);
  switch_to(host, fibers[threadIdx.x]->context);
}

cudaError_t run(const cudaLaunchConfig_t& config, const std::function<void()>& thread) {
  while (fibers.size() < config.blockDim.x) fibers.push_back(std::make_unique<Fiber>(thread_of_many_blocks));
  kernel = &thread;
  gridDim = config.gridDim;
  blockDim = config.blockDim;
  failed = false;
  for (blockIdx = {}; blockIdx.x < gridDim.x && !failed; ++blockIdx.x) start_block(blockDim.x);
  written.clear();
  if (failed) {
    for (auto& fiber : fibers) fiber->restart();
  }
  return failed ? cudaErrorLaunchFailure : cudaSuccess;
}

cudaError_t refuse(cudaError_t error, const std::string& why) {
  finding = {error, why};
  return error;
}

cudaError_t check(const cudaLaunchConfig_t& config, size_t parameter_bytes) {
  const dim3 &grid = config.gridDim, &threads = config.blockDim;
  if (grid.x < 1 || grid.x > 0x7fffffffu) {
    return refuse(cudaErrorInvalidConfiguration, text("the grid has %u blocks, not 1 to 2147483647", grid.x));
  }
  if (threads.x < 1 || threads.x > kMaxThreads) {
    return refuse(cudaErrorInvalidConfiguration, text("a block has %u threads, not 1 to %u", threads.x, kMaxThreads));
  }
  if (grid.y != 1 || grid.z != 1 || threads.y != 1 || threads.z != 1 || config.dynamicSmemBytes) {
    return refuse(cudaErrorInvalidConfiguration, "the emulator knows only x, and no dynamic shared memory");
  }
  if (parameter_bytes > kMaxParameterBytes) {
    return refuse(cudaErrorInvalidValue, text("the kernel takes %zu bytes of parameters, more than %zu", parameter_bytes,
                  kMaxParameterBytes));
  }
  return cudaSuccess;
}

void check_alignment(const char* access, const void* address, size_t bytes) {
  if (reinterpret_cast<uintptr_t>(address) % bytes) {
    fail(text("%s %zu bytes at %p, which is no multiple of %zu", access, bytes, address, bytes));
  }
}

}  // namespace

unsigned lane() { return threadIdx.x % kWarp; }

void meet_block(Site site) {
  if (!gather(block.barrier, block.threads, site)) return;
  for (unsigned first = 0; first < block.threads; first += kWarp) wake(warp_of(first));
}

void meet_warp(unsigned mask, Site site) {
  if (mask != kFullMask) fail(text("calls %s with the mask %#x, not a full one", name(site).c_str(), mask));
  Warp& warp = warp_of(threadIdx.x);
  if (!gather(warp.meeting, __builtin_popcount(warp.lanes), site)) return;
  ++warp.meetings;
  wake(warp);
}

uint64_t exchange(unsigned mask, uint64_t bits, unsigned source_lane, Site site) {
  Warp& warp = warp_of(threadIdx.x);
  if (!(warp.lanes >> source_lane & 1)) fail(text("reads lane %u, which its warp does not have", source_lane));
  uint64_t* values = warp.values[warp.meetings % 2];
  values[lane()] = bits;
  meet_warp(mask, site);
  return values[source_lane];
}

void check_load(const void* address, size_t bytes) { check_alignment("reads", address, bytes); }

void check_unwritten(const void* address, size_t bytes) {
  if (written.any(reinterpret_cast<uintptr_t>(address), bytes)) {
    fail(text("reads %zu bytes at %p with __ldg, which this launch has written", bytes, address));
  }
}

void check_store(const void* address, size_t bytes) {
  check_alignment("writes", address, bytes);
  if (written.any(reinterpret_cast<uintptr_t>(address), bytes)) {
    fail(text("writes %zu bytes at %p, which this launch has written before", bytes, address));
  }
  written.add(reinterpret_cast<uintptr_t>(address), bytes);
}

cudaError_t launch(const cudaLaunchConfig_t& config, size_t parameter_bytes, const std::function<void()>& thread) {
  const std::lock_guard<std::mutex> lock(one_launch_at_a_time);
  ++launches;
  last_launch = {config, current_device};
  finding = {};
  cudaError_t error = planted_error;
  planted_error = cudaSuccess;
  if (error == cudaSuccess) error = check(config, parameter_bytes);
  if (error == cudaSuccess && !stub) error = run(config, thread);
  if (error != cudaSuccess) last_error = error;
  return error;
}

}  // namespace emulator

const char* cudaGetErrorString(cudaError_t error) {
  if (error == emulator::finding.error && error != cudaSuccess) return emulator::finding.what.c_str();
  switch (error) {
    case cudaSuccess:
      return "no error";
    case cudaErrorInvalidValue:
      return "invalid argument";
    case cudaErrorInvalidConfiguration:
      return "invalid configuration argument";
    case cudaErrorInvalidDevice:
      return "invalid device ordinal";
    case cudaErrorNoKernelImageForDevice:
      return "no kernel image is available for execution on the device";
    case cudaErrorLaunchFailure:
      return "unspecified launch failure";
  }
  return "unrecognized error code";
}

cudaError_t cudaGetLastError() {
  const cudaError_t error = emulator::last_error;
  emulator::last_error = cudaSuccess;
  return error;
}

cudaError_t cudaGetDevice(int* device) {
  *device = emulator::current_device;
  return cudaSuccess;
}

cudaError_t cudaSetDevice(int device) {
  if (device < 0 || device >= emulator::kDevices) return emulator::last_error = cudaErrorInvalidDevice;
  emulator::current_device = device;
  return cudaSuccess;
}

cudaError_t cudaFuncGetAttributes(cudaFuncAttributes*, void (*)()) {
  return emulator::last_error = emulator::current_device == 0 ? cudaSuccess : cudaErrorNoKernelImageForDevice;
}

// For tests, through ctypes.
extern "C" {
#define EMULATOR_CONTROL __attribute__((visibility("default")))

EMULATOR_CONTROL void emulator_fail_next_launch(int error) { emulator::planted_error = static_cast<cudaError_t>(error); }
// A stub's launches return at once, so that what is timed is the host's work.
EMULATOR_CONTROL void emulator_set_stub(int stub) { emulator::stub = stub; }
EMULATOR_CONTROL int emulator_set_device(int device) { return cudaSetDevice(device); }
EMULATOR_CONTROL int emulator_device() { return emulator::current_device; }
EMULATOR_CONTROL int64_t emulator_launches() { return emulator::launches; }
EMULATOR_CONTROL int64_t emulator_last_grid() { return emulator::last_launch.config.gridDim.x; }
EMULATOR_CONTROL int64_t emulator_last_block() { return emulator::last_launch.config.blockDim.x; }
EMULATOR_CONTROL int emulator_last_device() { return emulator::last_launch.device; }
EMULATOR_CONTROL void* emulator_last_stream() { return emulator::last_launch.config.stream; }
}
