#include "threads.h"

#include <pthread.h>

#include <condition_variable>
#include <exception>
#include <memory>
#include <mutex>
#include <system_error>

namespace avfast {
namespace {

// after its share a worker looks out for the next one for about 10 us before it sleeps: waking it costs 20 to 50.
constexpr int kSpins = 500;

struct Job {
  Share share;
  const void* work;
  int total;
  std::atomic<int> unfinished;
  std::mutex failed{};
  std::exception_ptr error{};

  void run(int rank) {
    try {
      share(work, rank, total);
    } catch (...) {
      const std::lock_guard<std::mutex> lock(failed);
      if (!error) error = std::current_exception();
    }
  }
};

// a thread that sleeps until it is given a job.
class Worker {
 public:
  explicit Worker(int rank) : rank_(rank), thread_([this] { serve(); }) { thread_.detach(); }

  void give(Job* job) {
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      job_.store(job, std::memory_order_release);
    }
    wake_.notify_one();
  }

 private:
  [[noreturn]] void serve() {
    for (;;) {
      for (int i = 0; i < kSpins && job_.load(std::memory_order_acquire) == nullptr; ++i) pause();
      Job* job = job_.load(std::memory_order_acquire);
      if (job == nullptr) {
        std::unique_lock<std::mutex> lock(mutex_);
        wake_.wait(lock, [&] { return (job = job_.load(std::memory_order_acquire)) != nullptr; });
      }
      job_.store(nullptr, std::memory_order_relaxed);
      job->run(rank_);
      // the last that is done to the job: its caller may go on
      job->unfinished.fetch_sub(1, std::memory_order_release);
    }
  }

  const int rank_;
  std::atomic<Job*> job_{nullptr};
  std::mutex mutex_;
  std::condition_variable wake_;
  std::thread thread_;  // the last: it begins to serve at once
};

// workers of rank 1 and up, for one caller at a time.
class Crew {
 public:
  void run(int count, Job& job) {
    job.total = grow(count);
    job.unfinished.store(job.total - 1, std::memory_order_relaxed);
    for (int rank = 1; rank < job.total; ++rank) workers_[rank - 1]->give(&job);
    job.run(0);
    wait_until([&] { return job.unfinished.load(std::memory_order_acquire) == 0; });
  }

 private:
  // how many threads there are for a job that wants `count`, the caller's among them.
  int grow(int count) {
    while (static_cast<int>(workers_.size()) < count - 1) {
      try {
        workers_.push_back(std::make_unique<Worker>(static_cast<int>(workers_.size()) + 1));
      } catch (const std::system_error&) {
        return static_cast<int>(workers_.size()) + 1;
      }
    }
    return count;
  }

  std::vector<std::unique_ptr<Worker>> workers_;
};

// the crews that nobody uses at the moment: as many as there ever were callers at once.
struct Idle {
  std::mutex mutex;
  std::vector<Crew*> crews;
};

// never destroyed: the workers sleep on until the process ends.
std::atomic<Idle*> idle{nullptr};

Idle& idle_crews() {
  static std::once_flag once;
  std::call_once(once, [] {
    idle = new Idle;
    // a child has none of its parent's threads, and perhaps a lock that nobody will open: it begins anew
    pthread_atfork(nullptr, nullptr, [] { idle = new Idle; });
  });
  return *idle.load();
}

Crew* take_crew() {
  Idle& from = idle_crews();
  const std::lock_guard<std::mutex> lock(from.mutex);
  if (from.crews.empty()) return new Crew;
  Crew* crew = from.crews.back();
  from.crews.pop_back();
  return crew;
}

void give_back(Crew* crew) {
  Idle& to = idle_crews();
  const std::lock_guard<std::mutex> lock(to.mutex);
  to.crews.push_back(crew);
}

}  // namespace

void run_shares(int count, Share share, const void* work) {
  if (count <= 1) return share(work, 0, 1);
  Job job{share, work, 0, {0}};
  Crew* crew = take_crew();
  crew->run(count, job);
  give_back(crew);
  if (job.error) std::rethrow_exception(job.error);
}

}  // namespace avfast
