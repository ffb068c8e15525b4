// the threads that the library works on, and how they wait for each other.
#pragma once

#include <atomic>
#include <cstdint>
#include <thread>
#include <vector>

namespace avfast {

inline void pause() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#endif
}

// waits for other threads of this library, which are never long: the core is given away only after some 10 us.
template <class Condition>
void wait_until(const Condition& condition) {
  for (int spins = 0; !condition(); ++spins) spins < 2000 ? pause() : std::this_thread::yield();
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

// what one thread of `total` does of a piece of work.
using Share = void (*)(const void* work, int rank, int total);

// runs share(work, rank, total) on `total` <= `count` threads, this one as rank 0, and returns when all are done. Where
// PyTorch has brought OpenMP into the process and it has as many, its threads do the work; else the library's own,
// which are kept, asleep, from call to call. There are fewer where the system has no more to give. A forked child gets
// threads of its own. What a share throws is thrown here.
void run_shares(int count, Share share, const void* work);

// the same for anything that can be called as body(rank, total).
template <class Body>
void run_threads(int count, const Body& body) {
  run_shares(
      count, [](const void* work, int rank, int total) { (*static_cast<const Body*>(work))(rank, total); }, &body);
}

}  // namespace avfast
