#include "threads.h"

#include <dlfcn.h>
#include <pthread.h>

#include <algorithm>
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

  void run(int rank, int total) {
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
      job->run(rank_, job->total);
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
    job.run(0, job.total);
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
std::atomic<Idle*> idle{new Idle};

// a child has none of its parent's threads, OpenMP's or ours, and perhaps a lock that nobody will open: it begins anew.
std::atomic<bool> forked{false};
const int watching_forks = pthread_atfork(nullptr, nullptr, [] {
  idle = new Idle;
  forked = true;
});

Crew* take_crew() {
  Idle& from = *idle.load();
  const std::lock_guard<std::mutex> lock(from.mutex);
  if (from.crews.empty()) return new Crew;
  Crew* crew = from.crews.back();
  from.crews.pop_back();
  return crew;
}

void give_back(Crew* crew) {
  Idle& to = *idle.load();
  const std::lock_guard<std::mutex> lock(to.mutex);
  to.crews.push_back(crew);
}

// the OpenMP runtime that this process has loaded for all to use, if any: PyTorch brings one. Its workers look out for
// work for a while after each of PyTorch's ops, and take half of their cores from any other thread meanwhile: between
// PyTorch's ops, ours took up to twice as long on threads of our own. The entry points are those of the compilers' ABI.
struct OpenMP {
  void (*parallel)(void (*body)(void*), void* data, unsigned threads, unsigned flags);
  int (*max_threads)();
  int (*in_parallel)();
  int (*rank)();
  int (*size)();

  OpenMP() {
    find("GOMP_parallel", &parallel);
    find("omp_get_max_threads", &max_threads);
    find("omp_in_parallel", &in_parallel);
    find("omp_get_thread_num", &rank);
    find("omp_get_num_threads", &size);
  }

  // whether `count` of its threads can be had by this thread.
  bool has(int count) const {
    return parallel != nullptr && max_threads != nullptr && in_parallel != nullptr && rank != nullptr &&
           size != nullptr && max_threads() >= count && !in_parallel();
  }

 private:
  template <class Function>
  static void find(const char* name, Function* function) {
    *function = reinterpret_cast<Function>(dlsym(RTLD_DEFAULT, name));
  }
};

bool run_on_openmp(int count, Job& job) {
  static const OpenMP openmp;
  if (forked || !openmp.has(count)) return false;
  job.total = count;
  // with as many threads as PyTorch's ops take: another number would end some of them and start others
  openmp.parallel(
      [](void* data) {
        Job& job = *static_cast<Job*>(data);
        const int total = std::min(job.total, openmp.size());
        if (openmp.rank() < total) job.run(openmp.rank(), total);
      },
      &job, 0, 0);
  return true;
}

}  // namespace

void run_shares(int count, Share share, const void* work) {
  if (count <= 1) return share(work, 0, 1);
  Job job{share, work, 0, {0}};
  if (!run_on_openmp(count, job)) {
    Crew* crew = take_crew();
    crew->run(count, job);
    give_back(crew);
  }
  if (job.error) std::rethrow_exception(job.error);
}

}  // namespace avfast
