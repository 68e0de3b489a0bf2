// Where the threads of a parallel region wait for one another.
//
// At OpenMP's own barriers they spin for milliseconds, which is best while each has a processor to
// itself: they come within microseconds of each other, some hundred times a step. Where another
// process runs as well, it is a processor that one of them waits for, and the others keep theirs
// from it: a step took twenty times as long. Here a thread soon sleeps, and at once where it holds
// the processor of one that has yet to come.

#pragma once

#include <omp.h>

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <mutex>

#ifdef __linux__
#include <sched.h>
#endif

#include "vectors.h"

namespace dynamic_lora {

// Tells the processor that the calling thread spins.
inline void pause_briefly() {
#if defined(__x86_64__) || defined(__i386__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  __asm__ volatile("isb");  // `yield` takes no time on most
#endif
}

// The processor of the calling thread; -1 if it is not to be known.
inline int own_processor() {
#ifdef __linux__
  return sched_getcpu();
#else
  return -1;
#endif
}

// The threads of one parallel region, of which each is made a `Member`.
class Team {
 public:
  Team() {
    for (std::atomic<int>& processor : processors_) processor.store(-1, std::memory_order_relaxed);
  }

  // Returns once all have come; the last of them calls `last` before that.
  template <typename Last>
  void meet(const Last& last) {
    const int size = omp_get_num_threads(), round = round_.load(std::memory_order_relaxed);
    if (size > 1) come(omp_get_thread_num());
    if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 < size) return wait(round, size);
    last();
    arrived_.store(0, std::memory_order_relaxed);
    if (size > 1) release(round + 1);
  }

 private:
  static constexpr int kLooks = 8192;      // before a thread sleeps: a quarter of a millisecond
  static constexpr int kLooksAside = 256;  // before it looks whom it keeps from a processor
  static constexpr int kMostKnown = 128;   // threads of which is known where they run

  void come(int thread) {
    if (thread >= kMostKnown) return;
    const int processor = own_processor();
    if (processors_[thread].load(std::memory_order_relaxed) != processor)
      processors_[thread].store(processor, std::memory_order_relaxed);
  }

  // Whether another thread was last seen on this one's processor. Where this one came is no matter:
  // it may have been moved since.
  bool in_the_way(int size) const {
    const int processor = own_processor(), own = omp_get_thread_num();
    if (processor < 0) return false;
    for (int thread = 0; thread < std::min(size, kMostKnown); thread++)
      if (thread != own && processors_[thread].load(std::memory_order_relaxed) == processor)
        return true;
    return false;
  }

  void release(int round) {
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      round_.store(round, std::memory_order_release);
    }
    released_.notify_all();
  }

  void wait(int round, int size) {
    const auto over = [&] { return round_.load(std::memory_order_acquire) != round; };
    for (int look = 0; look < kLooks; look++) {
      if (over()) return;
      if (look % kLooksAside == kLooksAside - 1 && in_the_way(size)) break;
      pause_briefly();
    }
    std::unique_lock<std::mutex> lock(mutex_);
    released_.wait(lock, over);
  }

  std::atomic<int> arrived_{0};
  std::atomic<int> processors_[kMostKnown];  // of each thread, as it last came
  alignas(kLineBytes) std::atomic<int> round_{0};  // what the others look at
  alignas(kLineBytes) std::mutex mutex_;
  std::condition_variable released_;
};

// Makes the calling thread one of a team while it lasts.
class Member {
 public:
  explicit Member(Team& team) : before_(own()) { own() = &team; }
  ~Member() { own() = before_; }
  Member(const Member&) = delete;
  Member& operator=(const Member&) = delete;

  static Team*& own() {
    static thread_local Team* team = nullptr;
    return team;
  }

 private:
  Team* before_;
};

// A barrier, for all members of the calling thread's team; the last who comes calls `last` before
// the others go on.
template <typename Last>
void meet(const Last& last) {
  Member::own()->meet(last);
}

inline void meet() {
  meet([] {});
}

}  // namespace dynamic_lora
