// Squared error and edge-aware smoothness of a predicted flow (ops.def, kernels/loss.py).
#pragma once

#include "loops.h"

namespace avfast::AVFAST_ISA {
namespace {

// One image: its predicted and true flow [2, height, width] and the true frame [channels, height, width].
struct FlowLossImage {
  const T* prediction;
  const T* target;
  const T* frame;
  int channels, height, width;
  T data_weight, smooth_weight;
};

// Rows of scratch memory, of width + 1 values each.
constexpr int kFlowLossRows = 7;

// The values to the right of the register `here` of a row at x; 0 for the row's last pixel, whose difference has no
// weight. Loading them would read the last pixels one by one, which took a third of the time at 48 pixels.
AVFAST_LOOP Vec to_the_right(const T* at, Vec here, int64_t x, int width) {
  return next_lanes(here, x + Vec::kWidth < width ? at[Vec::kWidth] : T(0));
}

// Returns the loss of an image; writes its gradient by the prediction where `grad` is not null. Row by row: the
// derivative of an absolute difference is written to scratch, with an edge weight of 0 in the last column and row. The
// gradient is then the difference of two neighbouring derivatives; left of the first column and above the first row
// they are 0.
double image_loss(const FlowLossImage& given, T* scratch, T* grad) {
  // a copy: the compiler must assume that a store changes what a reference shows
  const FlowLossImage p = given;
  const int64_t plane = static_cast<int64_t>(p.height) * p.width;
  const int64_t stride = p.width + 1;
  T* const edge_x = scratch;
  T* const edge_y = edge_x + stride;
  T* const along = edge_y + stride;  // one element before the first pixel: 0
  T* const down[2][2] = {{along + stride, along + 2 * stride},
                         {along + 3 * stride, along + 4 * stride}};  // [parity of the row][component]
  along[0] = T(0);
  for (int x = 0; x < p.width; ++x) down[1][0][x] = down[1][1][x] = T(0);
  const Vec per_channel(T(1) / static_cast<T>(p.channels));
  double sum = 0.0;
  for (int y = 0; y < p.height; ++y) {
    const int64_t row = static_cast<int64_t>(y) * p.width;
    const bool last_row = y == p.height - 1;
    const int64_t below = last_row ? 0 : p.width;
    for_lanes<Vec>(
        p.width, AVFAST_LANES(x, n) {
          Vec change_x(0), change_y(0);
          for (int c = 0; c < p.channels; ++c) {
            const T* at = p.frame + c * plane + row + x;
            const Vec here = Vec::load_first(at, n);
            change_x = change_x + absolute(to_the_right(at, here, x, p.width) - here);
            change_y = change_y + absolute(Vec::load_first(at + below, n) - here);
          }
          exp(Vec(0) - change_x * per_channel).store_first(edge_x + x, n);
          exp(Vec(0) - change_y * per_channel).store_first(edge_y + x, n);
        });
    edge_x[p.width - 1] = T(0);
    if (last_row) set_zero(edge_y, p.width);
    for (int component = 0; component < 2; ++component) {
      T* const here_down = down[y % 2][component];
      T* const above_down = down[1 - y % 2][component];
      Vec data(0), smooth(0);
      for_lanes<Vec>(
          p.width, AVFAST_LANES(x, n) {
            const int64_t at = component * plane + row + x;
            const Vec u = Vec::load_first(p.prediction + at, n);
            const Vec error = u - Vec::load_first(p.target + at, n);
            const Vec dx = to_the_right(p.prediction + at, u, x, p.width) - u;
            const Vec dy = Vec::load_first(p.prediction + at + below, n) - u;
            const Vec wx = Vec::load_first(edge_x + x, n);
            const Vec wy = Vec::load_first(edge_y + x, n);
            data = data + error * error;
            smooth = smooth + absolute(dx) * wx + absolute(dy) * wy;
            if (grad != nullptr) {
              (sign(dx) * wx).store_first(along + 1 + x, n);
              (sign(dy) * wy).store_first(here_down + x, n);
            }
          });
      sum += static_cast<double>(p.data_weight) * total(data) + static_cast<double>(p.smooth_weight) * total(smooth);
      if (grad == nullptr) continue;
      for_lanes<Vec>(
          p.width, AVFAST_LANES(x, n) {
            const int64_t at = component * plane + row + x;
            const Vec error = Vec::load_first(p.prediction + at, n) - Vec::load_first(p.target + at, n);
            const Vec flat = Vec::load_first(along + x, n) - Vec::load_first(along + 1 + x, n) +
                             Vec::load_first(above_down + x, n) - Vec::load_first(here_down + x, n);
            (Vec(2) * Vec(p.data_weight) * error + Vec(p.smooth_weight) * flat).store_first(grad + at, n);
          });
    }
  }
  return sum;
}

void flow_loss(const T* prediction, const T* target, const T* frames, T* grad, T* loss, int64_t images, int channels,
               int height, int width, double data_weight, double smooth_weight, int threads) {
  const int64_t plane = static_cast<int64_t>(height) * width;
  // summed below in the order of the images, whichever thread made which
  Array<double> losses(images);
  share(images, images * plane, threads, [&](int64_t begin, int64_t end) {
    Array<T> scratch(kFlowLossRows * (width + int64_t{1}));
    for (int64_t i = begin; i < end; ++i) {
      const int64_t at = 2 * i * plane;
      const FlowLossImage image{
          prediction + at, target + at, frames + i * channels * plane, channels,
          height,          width,       static_cast<T>(data_weight),   static_cast<T>(smooth_weight)};
      losses[i] = image_loss(image, scratch.data(), grad == nullptr ? nullptr : grad + at);
    }
  });
  double sum = 0.0;
  for (int64_t i = 0; i < images; ++i) sum += losses[i];
  *loss = static_cast<T>(sum);
}

}  // namespace
}  // namespace avfast::AVFAST_ISA
