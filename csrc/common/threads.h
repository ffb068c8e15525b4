// The threads that the library works on.
//
// The library has one pool of its own and does not use PyTorch's OpenMP threads: those are not there without PyTorch,
// do not survive a fork, and all wait for the slowest of them by spinning.
//
// Time per call against a version that used PyTorch's threads where there were any, medians with 2 threads on 2 cores
// (Xeon with AVX-512), in a process with PyTorch and OpenMP's default policy, November 2026:
//
//                        alone   right after a PyTorch op   beside one busy process   beside two or more
//   gates 16x128x3x3     0.83    1.9                        1.9                       0.006
//   gates 16x128x12x12   0.87    1.1
//   TV-L1, 2 of 64x64    1.2     1.4                        1.9                       0.12
//
// The price: after an op of PyTorch, OpenMP's threads keep their cores for some milliseconds, and a second thread of
// this pool gains little. A training step of the motion stage (batch 16, 48x48) takes 1.15 times as long; with
// OMP_WAIT_POLICY=passive 0.95 times.
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
