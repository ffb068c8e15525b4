// How a thread waits for another one.
#pragma once

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <mutex>

namespace avfast {

// A waiting thread looks for so long before it sleeps: putting a thread to sleep and waking it costs 10 to 50 us.
constexpr std::chrono::microseconds kSpinTime{5};

inline void pause() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#endif
}

// Lets threads wait for a change of an atomic variable. Every store to it that a waiting thread may look for has to be
// sequentially consistent, as an atomic's plain store() is, and to be followed by notify().
class Signal {
 public:
  // Returns when condition() is true, which has to load the variable sequentially consistently.
  template <class Condition>
  void wait(const Condition& condition) {
    const auto end = std::chrono::steady_clock::now() + kSpinTime;
    do {
      for (int i = 0; i < 16; ++i) {
        if (condition()) return;
        pause();
      }
    } while (std::chrono::steady_clock::now() < end);
    std::unique_lock<std::mutex> lock(mutex_);
    // before the condition is looked at again: either it is then true, or notify() sees this thread
    sleeping_.fetch_add(1);
    changed_.wait(lock, condition);
    sleeping_.fetch_sub(1);
  }

  void notify() {
    if (sleeping_.load() == 0) return;
    const std::lock_guard<std::mutex> lock(mutex_);
    changed_.notify_all();
  }

 private:
  std::atomic<int> sleeping_{0};
  std::mutex mutex_;
  std::condition_variable changed_;
};

}  // namespace avfast
