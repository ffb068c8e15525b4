// Threads that solve one pair of images together.
#pragma once

#include <atomic>
#include <cstdint>
#include <limits>
#include <vector>

#include "../common/signal.h"

namespace avfast::tvl1 {

class Team {
 public:
  explicit Team(int size) : size_(size), progress_(size) {}

  int size() const { return size_; }

  // Returns when all members of the team have come here.
  void barrier() {
    if (size_ == 1) return;
    const int generation = generation_.load();
    if (arrived_.fetch_add(1) + 1 == size_) {
      arrived_.store(0);
      generation_.store(generation + 1);
      signal_.notify();
    } else {
      signal_.wait([&] { return generation_.load() != generation; });
    }
  }

  // Every member counts how far it has come; one other member at a time may wait for that.
  void reset_progress(int rank) { progress_[rank].value.store(0); }

  void publish_progress(int rank, int64_t value) {
    progress_[rank].value.store(value);
    if (value >= progress_[rank].awaited.load()) signal_.notify();
  }

  void wait_for_progress(int rank, int64_t value) {
    Progress& progress = progress_[rank];
    if (progress.value.load(std::memory_order_acquire) >= value) return;
    progress.awaited.store(value);
    signal_.wait([&] { return progress.value.load() >= value; });
    progress.awaited.store(kNobodyWaits);
  }

 private:
  static constexpr int64_t kNobodyWaits = std::numeric_limits<int64_t>::max();
  struct alignas(64) Progress {
    std::atomic<int64_t> value{0}, awaited{kNobodyWaits};
  };
  const int size_;
  std::vector<Progress> progress_;
  std::atomic<int> arrived_{0}, generation_{0};
  Signal signal_;
};

// One thread's place in a team, and the memory that is its own.
struct Member {
  Team& team;
  int rank;
  float* scratch;

  // This member's share of `rows` rows.
  int begin(int rows) const { return static_cast<int>(static_cast<int64_t>(rows) * rank / team.size()); }
  int end(int rows) const { return static_cast<int>(static_cast<int64_t>(rows) * (rank + 1) / team.size()); }
};

}  // namespace avfast::tvl1
