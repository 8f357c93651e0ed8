// A block's threads as fibers of one thread of the CPU. Between barriers the warps run one after
// another in a random order, and so do the lanes of a warp between what a warp does together: a
// barrier that is missing shows in the results.

#pragma once

#include <ucontext.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#endif

namespace emulator {

inline constexpr int kWarp = 32;
inline constexpr size_t kStackBytes = 256 << 10;

struct Copy {
  unsigned char* to;
  const void* from;  // null for zeros
};

struct Fiber {
  int thread = 0;
  bool done = false, started = false;
  ucontext_t context;
  std::unique_ptr<char[]> stack;
  void* fake_stack = nullptr;             // of the address sanitizer
  std::vector<std::vector<Copy>> groups;  // of asynchronous copies, under way
  std::vector<Copy> uncommitted;
};

// Fibers that wait for one another, and what they are about to do together.
struct Meeting {
  const char* what = nullptr;
  int arrived = 0;
  void* given[kWarp] = {};
};

class Block {
 public:
  static Block& current() { return *running_; }

  // Runs a block of threads to their ends.
  void run(int threads, size_t shared_bytes, const std::function<void()>& kernel) {
    kernel_ = &kernel;
    running_ = this;
    shared_bytes_ = shared_bytes;
    void* memory = nullptr;
    if (posix_memalign(&memory, 1024, std::max<size_t>(shared_bytes, 1)) != 0)
      throw std::bad_alloc();
    const std::unique_ptr<void, void (*)(void*)> owner(memory, std::free);
    shared_ = static_cast<unsigned char*>(memory);
    std::memset(shared_, 0xff, shared_bytes);  // NaN until it is written
    if (static_cast<int>(fibers_.size()) < threads) fibers_.resize(threads);
    threads_ = live_ = threads;
    warps_.assign((threads + kWarp - 1) / kWarp, {});
    ready_.assign(warps_.size(), {});
    barrier_ = {};
    error_.clear();
    for (int t = 0; t < threads; ++t) {
      Fiber& fiber = fibers_[t];
      if (!fiber.stack) fiber.stack.reset(new char[kStackBytes]);
      fiber.thread = t;
      fiber.done = fiber.started = false;
      fiber.groups.clear();
      fiber.uncommitted.clear();
      getcontext(&fiber.context);
      fiber.context.uc_stack.ss_sp = fiber.stack.get();
      fiber.context.uc_stack.ss_size = kStackBytes;
      fiber.context.uc_link = nullptr;
      makecontext(&fiber.context, &Block::enter, 0);
      ready_[t / kWarp].push_back(t);
    }
    shuffle_warps();
    while (live_ > 0 && error_.empty()) {
      Fiber* next = pick();
      if (next == nullptr) {
        error_ = "the threads wait for one another";
        const char* what = barrier_.arrived > 0 ? barrier_.what : nullptr;
        for (const Meeting& warp : warps_) what = warp.arrived > 0 ? warp.what : what;
        if (what != nullptr) error_ += std::string(", some at ") + what;
        break;
      }
      fiber_ = next;
      set_thread(next->thread);
      switch_to_fiber(*next);
    }
    if (!error_.empty()) throw std::runtime_error("CUDA emulator: " + error_);
  }

  Fiber& fiber() { return *fiber_; }
  int lane() const { return fiber_->thread % kWarp; }
  unsigned char* shared() const { return shared_; }

  // `size` bytes of dynamic shared memory at a place, aligned.
  unsigned char* shared(unsigned offset, size_t size) {
    if (offset % size != 0) fail("misaligned shared memory");
    if (offset + size > shared_bytes_) fail("outside shared memory");
    return shared_ + offset;
  }

  // Lets the lanes of a warp do something together: each gives its own arguments, and the last to
  // come calls `together` with everyone's.
  template <typename Arguments, typename Together>
  void warp(const char* what, Arguments& own, const Together& together) {
    const int number = fiber_->thread / kWarp;
    Meeting& meeting = warps_[number];
    arrive(meeting, what);
    meeting.given[lane()] = &own;
    const int lanes = std::min(kWarp, threads_ - number * kWarp);
    if (meeting.arrived < lanes) return suspend();
    Arguments* all[kWarp];
    for (int l = 0; l < lanes; ++l) all[l] = static_cast<Arguments*>(meeting.given[l]);
    together(all, lanes);
    meeting = {};
    for (int l = 0; l < lanes; ++l) {
      if (l != lane()) ready_[number].push_back(number * kWarp + l);
    }
    ready_[number].push_back(fiber_->thread);
    suspend();
  }

  // Waits for all threads of the block; true if `agrees` is true of each.
  bool barrier(const char* what, bool agrees = true) {
    arrive(barrier_, what);
    all_agree_ = barrier_.arrived == 1 ? agrees : all_agree_ && agrees;
    waiting_.push_back(fiber_->thread);
    open_barrier_if_all_came();
    suspend();
    return agreed_;
  }

  [[noreturn]] void fail(const std::string& why) {
    error_ = why;
    for (;;) suspend();
  }

  // A random choice, the same on every run.
  unsigned random(unsigned choices) { return generator_() % choices; }

 private:
  static void set_thread(int thread);

  static void enter() {
    Block& block = current();
    block.arrived_in_fiber();
    (*block.kernel_)();
    Fiber& fiber = *block.fiber_;
    fiber.done = true;
    --block.live_;
    block.open_barrier_if_all_came();
    block.suspend();
  }

  void arrive(Meeting& meeting, const char* what) {
    if (meeting.arrived++ == 0) meeting.what = what;
    if (std::strcmp(meeting.what, what) != 0) {
      fail(std::string("threads meet at ") + meeting.what + " and " + what);
    }
  }

  void open_barrier_if_all_came() {
    if (barrier_.arrived == 0 || barrier_.arrived < live_) return;
    agreed_ = all_agree_;
    barrier_ = {};
    for (const int thread : waiting_) ready_[thread / kWarp].push_back(thread);
    waiting_.clear();
    shuffle_warps();
  }

  void shuffle_warps() {
    order_.resize(ready_.size());
    for (size_t w = 0; w < order_.size(); ++w) order_[w] = static_cast<int>(w);
    std::shuffle(order_.begin(), order_.end(), generator_);
  }

  Fiber* pick() {
    for (const int warp : order_) {
      std::vector<int>& ready = ready_[warp];
      if (ready.empty()) continue;
      std::swap(ready[random(static_cast<unsigned>(ready.size()))], ready.back());
      const int thread = ready.back();
      ready.pop_back();
      return &fibers_[thread];
    }
    return nullptr;
  }

#if defined(__SANITIZE_ADDRESS__)
  void switch_to_fiber(Fiber& fiber) {
    __sanitizer_start_switch_fiber(&scheduler_fake_stack_, fiber.stack.get(), kStackBytes);
    swapcontext(&scheduler_, &fiber.context);
    __sanitizer_finish_switch_fiber(scheduler_fake_stack_, nullptr, nullptr);
  }
  void suspend() {
    Fiber& fiber = *fiber_;
    __sanitizer_start_switch_fiber(fiber.done ? nullptr : &fiber.fake_stack, scheduler_stack_,
                                   scheduler_stack_size_);
    swapcontext(&fiber.context, &scheduler_);
    __sanitizer_finish_switch_fiber(fiber.fake_stack, nullptr, nullptr);
  }
  void arrived_in_fiber() {
    __sanitizer_finish_switch_fiber(nullptr, &scheduler_stack_, &scheduler_stack_size_);
  }
  void* scheduler_fake_stack_ = nullptr;
  const void* scheduler_stack_ = nullptr;
  size_t scheduler_stack_size_ = 0;
#else
  void switch_to_fiber(Fiber& fiber) { swapcontext(&scheduler_, &fiber.context); }
  void suspend() { swapcontext(&fiber_->context, &scheduler_); }
  void arrived_in_fiber() {}
#endif

  inline static Block* running_ = nullptr;
  const std::function<void()>* kernel_ = nullptr;
  std::vector<Fiber> fibers_;
  Fiber* fiber_ = nullptr;
  ucontext_t scheduler_;
  int threads_ = 0, live_ = 0;
  std::vector<Meeting> warps_;
  std::vector<std::vector<int>> ready_;  // threads of each warp
  std::vector<int> order_;               // in which the warps run
  Meeting barrier_;
  std::vector<int> waiting_;  // at the barrier
  bool all_agree_ = true, agreed_ = true;
  unsigned char* shared_ = nullptr;
  size_t shared_bytes_ = 0;
  std::string error_;
  std::mt19937 generator_;
};

}  // namespace emulator
