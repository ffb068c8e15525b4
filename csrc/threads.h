// threads that live for one call only, so that nothing is left that a fork could lose, and how they wait for each
// other.
#pragma once

#include <atomic>
#include <cstdint>
#include <future>
#include <system_error>
#include <thread>
#include <vector>

namespace avfast {

// waits for other threads of this library, which are never long: the core is given away only after some 10 us.
template <class Condition>
void wait_until(const Condition& condition) {
  for (int spins = 0; !condition(); ++spins) {
    if (spins < 2000) {
#if defined(__x86_64__)
      __builtin_ia32_pause();
#endif
    } else {
      std::this_thread::yield();
    }
  }
}

// threads that solve one pair together.
class Team {
 public:
  explicit Team(int size) : size_(size), progress_(size) {}

  int size() const { return size_; }

  // returns when all threads of the team have come here.
  void barrier() {
    if (size_ == 1) return;
    const int generation = generation_.load(std::memory_order_relaxed);
    if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == size_) {
      arrived_.store(0, std::memory_order_relaxed);
      generation_.store(generation + 1, std::memory_order_release);
    } else {
      wait_until([&] { return generation_.load(std::memory_order_acquire) != generation; });
    }
  }

  void reset_progress(int rank) { progress_[rank].value.store(0, std::memory_order_relaxed); }
  void publish(int rank, int64_t value) { progress_[rank].value.store(value, std::memory_order_release); }
  void wait_for(int rank, int64_t value) {
    wait_until([&] { return progress_[rank].value.load(std::memory_order_acquire) >= value; });
  }

 private:
  struct alignas(64) Counter {
    std::atomic<int64_t> value{0};
  };
  const int size_;
  std::vector<Counter> progress_;
  std::atomic<int> arrived_{0}, generation_{0};
};

// runs body(rank, count) on `count` threads, this one among them; where the system has no more threads to give, on
// fewer.
template <class Body>
void run_threads(int count, const Body& body) {
  std::promise<int> started;
  const std::shared_future<int> total = started.get_future().share();
  std::vector<std::thread> threads;
  threads.reserve(count - 1);
  for (int rank = 1; rank < count; ++rank) {
    try {
      threads.emplace_back([&body, total, rank] { body(rank, total.get()); });
    } catch (const std::system_error&) {
      break;
    }
  }
  started.set_value(static_cast<int>(threads.size()) + 1);
  body(0, total.get());
  for (std::thread& thread : threads) thread.join();
}

}  // namespace avfast
