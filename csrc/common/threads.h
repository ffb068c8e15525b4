// The threads that the library works on.
//
// Work in parts runs on PyTorch's OpenMP threads where the process has them, else on a pool of the library's own. After
// an op of PyTorch its threads wait by spinning and keep their cores for milliseconds, so that a second pool gains
// little beside them. A training step of the motion stage (48x48, 2 threads, Xeon with AVX-512, OpenMP's default
// policy, 7 paired rounds, December 2026) takes with the pool alone, against the borrowed threads, 1.09 times as long
// at batch 16 and 1.06 at batch 2.
//
// Threads that wait for each other (run_threads: TV-L1) are always the pool's: OpenMP does not promise as many as asked
// for. So are those of a forked child, where GNU's runtime hangs.
#pragma once

#include <cstdint>

namespace avfast {

// What a thread does of a piece of work: in run_parts part `index` of `count`, in run_threads thread `index` of
// `count`.
using Task = void (*)(const void* work, int64_t index, int64_t count);

// Calls task(work, part, parts) once for every part, on at most `threads` threads of which the caller is one. Who is
// done with a part takes the next, so that the caller does all of them alone where the others come too late.
void run_parts(int64_t parts, int threads, Task task, const void* work);

// Calls task(work, rank, total) on `total` <= `threads` threads at the same time, on the caller as rank 0: the threads
// may wait for each other. `total` is smaller than `threads` where the system has no more threads to give.
void run_threads(int threads, Task task, const void* work);

// Both return when all is done, and throw what a task has thrown. A forked child gets threads of its own.

template <class Body>
void run_parts(int64_t parts, int threads, const Body& body) {
  run_parts(
      parts, threads, [](const void* work, int64_t part, int64_t) { (*static_cast<const Body*>(work))(part); }, &body);
}

template <class Body>
void run_threads(int threads, const Body& body) {
  run_threads(
      threads,
      [](const void* work, int64_t rank, int64_t total) {
        (*static_cast<const Body*>(work))(static_cast<int>(rank), static_cast<int>(total));
      },
      &body);
}

}  // namespace avfast
