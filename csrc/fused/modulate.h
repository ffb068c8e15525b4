// Affine of a context feature, written behind the features before it (ops.def, kernels/modulate.py).
#pragma once

#include "loops.h"

namespace avfast::AVFAST_ISA {
namespace {

void scale_and_shift(const T* in, T gamma, T beta, int64_t count, T* out) {
  for_lanes<Vec>(
      count, AVFAST_LANES(x, n) { (Vec(gamma) * Vec::load_first(in + x, n) + Vec(beta)).store_first(out + x, n); });
}

void scale_gradients(const T* in, T gamma, int64_t count, const T* grad_out, T* grad_in, T* grad_gamma, T* grad_beta) {
  Vec by_gamma(0), by_beta(0);
  for_lanes<Vec>(
      count, AVFAST_LANES(x, n) {
        const Vec g = Vec::load_first(grad_out + x, n);
        by_gamma = by_gamma + g * Vec::load_first(in + x, n);
        by_beta = by_beta + g;
        (Vec(gamma) * g).store_first(grad_in + x, n);
      });
  *grad_gamma = static_cast<T>(total(by_gamma));
  *grad_beta = static_cast<T>(total(by_beta));
}

void modulate_forward(List<const T*> before, const T* context, const T* gamma, const T* beta, T* out,
                      List<int64_t> before_channels, int64_t batch, int64_t channels, int64_t area, int threads) {
  int64_t all = channels;
  for (int64_t i = 0; i < before.size; ++i) all += before_channels.data[i];
  share(batch * all, batch * all * area, threads, [&](int64_t begin, int64_t end) {
    for_rows(begin, end, all, [&](int64_t image, int64_t first, int64_t count) {
      T* to = out + image * all * area;
      // channels first .. first + count - 1 of the output, feature by feature; `base` is a feature's first channel
      int64_t base = 0;
      for (int64_t i = 0; i < before.size; base += before_channels.data[i++]) {
        const int64_t size = before_channels.data[i];
        const int64_t from = larger(first - base, 0), until = smaller(first + count - base, size);
        if (from < until) {
          copy(before.data[i] + (image * size + from) * area, (until - from) * area, to + (base + from) * area);
        }
      }
      for (int64_t c = larger(first - base, 0); c < first + count - base; ++c) {
        const int64_t at = image * channels + c;
        scale_and_shift(context + at * area, gamma[at], beta[at], area, to + (base + c) * area);
      }
    });
  });
}

void modulate_backward(const T* context, const T* gamma, const T* grad_out, T* grad_context, T* grad_gamma,
                       T* grad_beta, int64_t batch, int64_t channels, int64_t area, int64_t grad_stride, int threads) {
  share(batch * channels, batch * channels * area, threads, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      scale_gradients(context + i * area, gamma[i], area, grad_out + i / channels * grad_stride + i % channels * area,
                      grad_context + i * area, grad_gamma + i, grad_beta + i);
    }
  });
}

}  // namespace
}  // namespace avfast::AVFAST_ISA
