// The threads that the library works on.
//
// The library has one pool of its own and does not use PyTorch's OpenMP threads: those are not there without PyTorch,
// do not survive a fork, and all wait for the slowest of them by spinning.
//
// Measured with 2 threads on 2 cores (Xeon with AVX-512, Linux 6.18), median per call in us: the version before, which
// used PyTorch's threads where there were any, and this one.
//
//                                                    one thread    before    now
//   gates 16x128x3x3      alone                              32        18     25
//                         beside a busy process              44      8000     48
//   gates 16x128x12x12    alone                             515       310    315
//                         right after a PyTorch op          720       420    570
//   TV-L1, 2 pairs 64x64  alone                             980       745    755
//                         beside a busy process             965      8000    985
//
// "Beside a busy process" and "after a PyTorch op" are in a process with PyTorch and OpenMP's default policy. There
// OpenMP's threads keep their cores for some milliseconds after an op of PyTorch, so that a second thread of this pool
// gains little. OMP_WAIT_POLICY=passive makes them sleep.
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
