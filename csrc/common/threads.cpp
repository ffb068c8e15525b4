#include "threads.h"

#include <dlfcn.h>
#include <pthread.h>

#include <atomic>
#include <exception>
#include <memory>
#include <mutex>
#include <system_error>
#include <thread>
#include <vector>

#include "signal.h"

namespace avfast {
namespace {

struct Job {
  Task task;
  const void* work;
  bool in_parts;
  int64_t count;  // parts, or threads
  std::atomic<int64_t> next_part{0};
  std::mutex failed{};
  std::exception_ptr error{};

  void run(int rank) {
    try {
      if (in_parts) {
        for (int64_t part; (part = next_part.fetch_add(1)) < count;) task(work, part, count);
      } else {
        task(work, rank, count);
      }
    } catch (...) {
      const std::lock_guard<std::mutex> lock(failed);
      if (!error) error = std::current_exception();
    }
  }
};

// Workers of rank 1 and up, for one caller at a time. Crews and workers are never destroyed: the workers sleep until
// the process ends.
class Crew {
 public:
  void run(int threads, Job& job) {
    const int total = grow(threads);
    if (!job.in_parts) job.count = total;
    unfinished_.store(total - 1);
    for (int rank = 1; rank < total; ++rank) workers_[rank - 1]->give(&job);
    job.run(0);
    // the workers that have not begun are too late for a part
    for (int rank = 1; job.in_parts && rank < total; ++rank) {
      if (workers_[rank - 1]->take_back()) unfinished_.fetch_sub(1);
    }
    finished_.wait([&] { return unfinished_.load() == 0; });
  }

 private:
  class Worker {
   public:
    Worker(Crew& crew, int rank) : crew_(crew), rank_(rank) {
      std::thread([this] { serve(); }).detach();
    }

    void give(Job* job) {
      job_.store(job);
      given_.notify();
    }

    // Returns whether the worker had not begun with the job, and now will not.
    bool take_back() { return job_.exchange(nullptr) != nullptr; }

   private:
    [[noreturn]] void serve() {
      for (;;) {
        given_.wait([&] { return job_.load() != nullptr; });
        Job* const job = job_.exchange(nullptr);
        if (job == nullptr) continue;
        job->run(rank_);
        // from here on the job may be gone, as its caller may go on
        crew_.unfinished_.fetch_sub(1);
        crew_.finished_.notify();
      }
    }

    Crew& crew_;
    const int rank_;
    std::atomic<Job*> job_{nullptr};
    Signal given_;
  };

  // Returns how many threads there are for a job that wants `threads`, the caller's among them.
  int grow(int threads) {
    while (static_cast<int>(workers_.size()) < threads - 1) {
      try {
        workers_.push_back(std::make_unique<Worker>(*this, static_cast<int>(workers_.size()) + 1));
      } catch (const std::system_error&) {
        return static_cast<int>(workers_.size()) + 1;
      }
    }
    return threads;
  }

  std::vector<std::unique_ptr<Worker>> workers_;
  std::atomic<int> unfinished_{0};
  Signal finished_;
};

// The crews that no caller uses at the moment: as many as there ever were callers at the same time.
struct IdleCrews {
  std::mutex mutex;
  std::vector<Crew*> crews;
};
std::atomic<IdleCrews*> idle_crews{new IdleCrews};

// A forked child has none of its parent's threads, OpenMP's or ours, and perhaps a lock that nobody will open: it
// begins anew, with threads of its own.
std::atomic<bool> forked{false};
const int registered = pthread_atfork(nullptr, nullptr, [] {
  idle_crews = new IdleCrews;
  forked = true;
});

Crew* take_crew() {
  IdleCrews& idle = *idle_crews.load();
  const std::lock_guard<std::mutex> lock(idle.mutex);
  if (idle.crews.empty()) return new Crew;
  Crew* crew = idle.crews.back();
  idle.crews.pop_back();
  return crew;
}

void give_back(Crew* crew) {
  IdleCrews& idle = *idle_crews.load();
  const std::lock_guard<std::mutex> lock(idle.mutex);
  idle.crews.push_back(crew);
}

// The OpenMP runtime that this process has loaded, if any: PyTorch brings GNU's. The entry points are those of the
// compilers' ABI.
struct OpenMP {
  using Parallel = void(void (*body)(void*), void* data, unsigned threads, unsigned flags);
  Parallel* const parallel = find<Parallel>("GOMP_parallel");
  int (*const max_threads)() = find<int()>("omp_get_max_threads");
  int (*const in_parallel)() = find<int()>("omp_in_parallel");
  int (*const rank)() = find<int()>("omp_get_thread_num");

  // Returns whether this thread can have `threads` of the runtime's threads.
  bool has(int threads) const {
    return parallel != nullptr && max_threads != nullptr && in_parallel != nullptr && rank != nullptr &&
           max_threads() >= threads && !in_parallel();
  }

 private:
  template <class Function>
  static Function* find(const char* name) {
    return reinterpret_cast<Function*>(dlsym(RTLD_DEFAULT, name));
  }
};

bool run_on_openmp(int threads, Job& job) {
  static const OpenMP openmp;
  // work in parts only: OpenMP does not promise as many threads as threads that wait for each other need
  if (!job.in_parts || forked || !openmp.has(threads)) return false;
  // with as many threads as PyTorch's ops take: another number would end some of them and start others
  openmp.parallel([](void* data) { static_cast<Job*>(data)->run(openmp.rank()); }, &job, 0, 0);
  return true;
}

void run(int threads, Job&& job) {
  if (!run_on_openmp(threads, job)) {
    Crew* crew = take_crew();
    crew->run(threads, job);
    give_back(crew);
  }
  if (job.error) std::rethrow_exception(job.error);
}

}  // namespace

void run_parts(int64_t parts, int threads, Task task, const void* work) {
  if (threads > 1) return run(threads, {task, work, true, parts});
  for (int64_t part = 0; part < parts; ++part) task(work, part, parts);
}

void run_threads(int threads, Task task, const void* work) {
  if (threads <= 1) return task(work, 0, 1);
  run(threads, {task, work, false, 0});
}

}  // namespace avfast
