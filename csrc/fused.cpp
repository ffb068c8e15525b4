#include "fused.h"

#include <algorithm>
#include <cmath>
#include <numeric>
#include <type_traits>
#include <vector>

#include "isa.h"
#include "threads.h"

namespace avfast::fused {
namespace {

// one double as a register: the loops in the precision that gradient checks want.
struct Double {
  using Scalar = double;
  static constexpr int kWidth = 1;
  using Raw = double __attribute__((vector_size(sizeof(double))));
  using Int = int64_t __attribute__((vector_size(sizeof(int64_t))));
  Raw raw;

  Double() = default;
  Double(Raw r) : raw(r) {}
  explicit Double(double x) : raw{x} {}
  static Double load_first(const double* from, int count) { return Double(count == 0 ? 0.0 : *from); }
  static Double iota() { return Double(0.0); }
  void store_first(double* to, int) const { *to = raw[0]; }
};

Double operator+(Double a, Double b) { return a.raw + b.raw; }
Double operator-(Double a, Double b) { return a.raw - b.raw; }
Double operator*(Double a, Double b) { return a.raw * b.raw; }
Double multiply_add(Double a, Double b, Double c) { return a * b + c; }
Double reciprocal(Double a) { return Double(1.0 / a.raw[0]); }
Double exp(Double a) { return Double(std::exp(a.raw[0])); }
// b where a is NaN, as in simd.h
Double min(Double a, Double b) { return a.raw[0] < b.raw[0] ? a : b; }
Double max(Double a, Double b) { return a.raw[0] > b.raw[0] ? a : b; }
Double where(Double::Int mask, Double a, Double b) { return mask[0] ? a : b; }
Double next_lanes(Double, double last) { return Double(last); }
Double::Int floor_int(Double a) { return Double::Int{static_cast<int64_t>(std::floor(a.raw[0]))}; }

}  // namespace
}  // namespace avfast::fused

#include "fused_loops.h"

namespace avfast::fused {
namespace {

// waking a thread costs up to 50 us, what some ten thousand elements take.
constexpr int64_t kGrain = 1 << 14;

template <class T>
const Kernels<T>& choose(const char* isa) {
  if constexpr (std::is_same_v<T, double>) {
    static constexpr Kernels<double> kTable = kernels<Double, Double>();
    return kTable;
  } else {
    return choose_isa(isa, AVFAST_TABLES(kFused));
  }
}

// body(begin, end) over 0 .. count - 1 in equal parts; `work` elements in all decide how many threads are worth it.
template <class Body>
void share(int64_t count, int64_t work, int threads, const Body& body) {
  const int64_t most = std::min<int64_t>({threads, count, work / kGrain});
  const int workers = static_cast<int>(std::max<int64_t>(most, 1));
  if (workers == 1) return body(0, count);
  run_threads(workers, [&](int rank, int total) { body(count * rank / total, count * (rank + 1) / total); });
}

// body(row, first, count) over the elements begin .. end - 1 of [rows, area], row by row.
template <class Body>
void for_rows(int64_t begin, int64_t end, int64_t area, const Body& body) {
  while (begin < end) {
    const int64_t row = begin / area;
    const int64_t stop = std::min(end, (row + 1) * area);
    body(row, begin - row * area, stop - begin);
    begin = stop;
  }
}

}  // namespace

template <class T>
void gates_forward(const T* gates, const T* cell, T* hidden, T* new_cell, int64_t rows, int64_t area, int threads,
                   const char* isa) {
  const Kernels<T>& kernels = choose<T>(isa);
  share(rows * area, rows * area, threads, [&](int64_t begin, int64_t end) {
    for_rows(begin, end, area, [&](int64_t row, int64_t first, int64_t count) {
      const int64_t at = row * area + first;
      kernels.gates_forward({gates + 4 * row * area + first, cell + at, area, count}, hidden + at, new_cell + at);
    });
  });
}

template <class T>
void gates_backward(const T* gates, const T* cell, const T* grad_hidden, const T* grad_new_cell, T* grad_gates,
                    T* grad_cell, int64_t rows, int64_t area, int threads, const char* isa) {
  const Kernels<T>& kernels = choose<T>(isa);
  share(rows * area, rows * area, threads, [&](int64_t begin, int64_t end) {
    for_rows(begin, end, area, [&](int64_t row, int64_t first, int64_t count) {
      const int64_t at = row * area + first;
      const int64_t gate = 4 * row * area + first;
      kernels.gates_backward({gates + gate, cell + at, area, count}, grad_hidden + at, grad_new_cell + at,
                             grad_gates + gate, grad_cell + at);
    });
  });
}

template <class T>
void warp_forward(const T* image, const T* flow, T* out, int64_t batch, int channels, int height, int width, bool zeros,
                  int threads, const char* isa) {
  const Kernels<T>& kernels = choose<T>(isa);
  const int64_t plane = static_cast<int64_t>(height) * width;
  const int64_t size = channels * plane;
  share(batch * height, batch * size, threads, [&](int64_t begin, int64_t end) {
    for_rows(begin, end, height, [&](int64_t b, int64_t first, int64_t count) {
      const int y = static_cast<int>(first);
      const Warp<T> warp{
          image + b * size, flow + 2 * b * plane, channels, height, width, y, y + static_cast<int>(count), zeros};
      kernels.warp_forward(warp, out + b * size);
    });
  });
}

template <class T>
void warp_backward(const T* image, const T* flow, const T* grad_out, T* grad_image, T* grad_flow, int64_t batch,
                   int channels, int height, int width, bool zeros, int threads, const char* isa) {
  const Kernels<T>& kernels = choose<T>(isa);
  const int64_t plane = static_cast<int64_t>(height) * width;
  const int64_t size = channels * plane;
  // pixels of one plane of the image's gradient receive from anywhere in it, so a plane has one owner, and its sums one
  // order: whole images where there are enough of them, else the planes, apart from the rows of the flow's gradient
  if (grad_image != nullptr && batch < threads) {
    share(batch * channels, batch * size, threads, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const int64_t b = i / channels;
        const Warp<T> warp{image + i * plane, flow + 2 * b * plane, 1, height, width, 0, height, zeros};
        kernels.warp_backward(warp, grad_out + i * plane, grad_image + i * plane, nullptr);
      }
    });
    grad_image = nullptr;
    if (grad_flow == nullptr) return;
  }
  const int rows = grad_image == nullptr ? height : 1;
  share(batch * rows, batch * size, threads, [&](int64_t begin, int64_t end) {
    for_rows(begin, end, rows, [&](int64_t b, int64_t first, int64_t count) {
      const int y = rows == 1 ? 0 : static_cast<int>(first);
      const int stop = rows == 1 ? height : y + static_cast<int>(count);
      const Warp<T> warp{image + b * size, flow + 2 * b * plane, channels, height, width, y, stop, zeros};
      kernels.warp_backward(warp, grad_out + b * size, grad_image == nullptr ? nullptr : grad_image + b * size,
                            grad_flow == nullptr ? nullptr : grad_flow + 2 * b * plane);
    });
  });
}

template <class T>
void flow_loss(const T* prediction, const T* target, const T* frames, T* grad, T* loss, int64_t images, int channels,
               int height, int width, double data_weight, double smooth_weight, int threads, const char* isa) {
  const Kernels<T>& kernels = choose<T>(isa);
  const int64_t plane = static_cast<int64_t>(height) * width;
  // summed in the order of the images, whatever thread did which
  std::vector<double> losses(images);
  share(images, images * plane, threads, [&](int64_t begin, int64_t end) {
    std::vector<T> scratch(flow_loss_scratch(width));
    for (int64_t i = begin; i < end; ++i) {
      const int64_t at = 2 * i * plane;
      const FlowLoss<T> image{
          prediction + at, target + at, frames + i * channels * plane, channels,
          height,          width,       static_cast<T>(data_weight),   static_cast<T>(smooth_weight),
          scratch.data()};
      losses[i] = kernels.flow_loss(image, grad == nullptr ? nullptr : grad + at);
    }
  });
  *loss = static_cast<T>(std::accumulate(losses.begin(), losses.end(), 0.0));
}

template <class T>
void modulate_forward(const T* context, const T* gamma, const T* beta, T* out, int64_t batch, int64_t channels,
                      int64_t area, int64_t out_stride, int threads, const char* isa) {
  const Kernels<T>& kernels = choose<T>(isa);
  share(batch * channels, batch * channels * area, threads, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      kernels.modulate_forward({context + i * area, gamma[i], beta[i], area},
                               out + i / channels * out_stride + i % channels * area);
    }
  });
}

template <class T>
void modulate_backward(const T* context, const T* gamma, const T* grad_out, T* grad_context, T* grad_gamma,
                       T* grad_beta, int64_t batch, int64_t channels, int64_t area, int64_t grad_stride, int threads,
                       const char* isa) {
  const Kernels<T>& kernels = choose<T>(isa);
  share(batch * channels, batch * channels * area, threads, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      kernels.modulate_backward({context + i * area, gamma[i], T(0), area},
                                grad_out + i / channels * grad_stride + i % channels * area, grad_context + i * area,
                                grad_gamma + i, grad_beta + i);
    }
  });
}

#define AVFAST_FUSED(T)                                                                                                \
  template void gates_forward<T>(const T*, const T*, T*, T*, int64_t, int64_t, int, const char*);                      \
  template void gates_backward<T>(const T*, const T*, const T*, const T*, T*, T*, int64_t, int64_t, int, const char*); \
  template void warp_forward<T>(const T*, const T*, T*, int64_t, int, int, int, bool, int, const char*);               \
  template void warp_backward<T>(const T*, const T*, const T*, T*, T*, int64_t, int, int, int, bool, int,              \
                                 const char*);                                                                         \
  template void flow_loss<T>(const T*, const T*, const T*, T*, T*, int64_t, int, int, int, double, double, int,        \
                             const char*);                                                                             \
  template void modulate_forward<T>(const T*, const T*, const T*, T*, int64_t, int64_t, int64_t, int64_t, int,         \
                                    const char*);                                                                      \
  template void modulate_backward<T>(const T*, const T*, const T*, T*, T*, T*, int64_t, int64_t, int64_t, int64_t,     \
                                     int, const char*);
AVFAST_FUSED(float)
AVFAST_FUSED(double)

}  // namespace avfast::fused
