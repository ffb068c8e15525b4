// the fused ops on the CPU: raw pointers to contiguous tensors of float or double, shared out over threads. Their
// definitions: kernels/reference.py. Sums have one order, whatever the number of threads. `isa`: see isa.h; double has
// one path only.
#pragma once

#include <cstdint>
#include <vector>

namespace avfast::fused {

// ConvLSTM state update. gates [rows, 4, area], cell, hidden, new_cell [rows, area]; nothing overlaps.
template <class T>
void gates_forward(const T* gates, const T* cell, T* hidden, T* new_cell, int64_t rows, int64_t area, int threads,
                   const char* isa);
template <class T>
void gates_backward(const T* gates, const T* cell, const T* grad_hidden, const T* grad_new_cell, T* grad_gates,
                    T* grad_cell, int64_t rows, int64_t area, int threads, const char* isa);

// out(p) = image(p + flow(p)). image, out [batch, channels, height, width], flow [batch, 2, height, width];
// height * width < 2^31; nothing overlaps.
template <class T>
void warp_forward(const T* image, const T* flow, T* out, int64_t batch, int channels, int height, int width, bool zeros,
                  int threads, const char* isa);
// grad_image, grad_flow: shaped as image and flow, or null where not wanted.
template <class T>
void warp_backward(const T* image, const T* flow, const T* grad_out, T* grad_image, T* grad_flow, int64_t batch,
                   int channels, int height, int width, bool zeros, int threads, const char* isa);

// data_weight times the squared error of the flow plus smooth_weight times its edge-weighted absolute differences, over
// all images. prediction, target, grad [images, 2, height, width], frames [images, channels, height, width]; grad
// receives the gradient by the prediction, where not null. loss: one value.
template <class T>
void flow_loss(const T* prediction, const T* target, const T* frames, T* grad, T* loss, int64_t images, int channels,
               int height, int width, double data_weight, double smooth_weight, int threads, const char* isa);

// a feature map [batch, channels, area].
template <class T>
struct Feature {
  const T* values;
  int64_t channels;
};

// gamma context + beta per channel, behind copies of the features `before`. context [batch, channels, area], gamma,
// beta [batch, channels]; out [batch, channels of all, area], one image `out_stride` values after the other.
template <class T>
void modulate_forward(const T* context, const T* gamma, const T* beta, T* out, int64_t batch, int64_t channels,
                      int64_t area, int64_t out_stride, const std::vector<Feature<T>>& before, int threads,
                      const char* isa);
// grad_out [batch, channels, area], one image `grad_stride` values after the other.
template <class T>
void modulate_backward(const T* context, const T* gamma, const T* grad_out, T* grad_context, T* grad_gamma,
                       T* grad_beta, int64_t batch, int64_t channels, int64_t area, int64_t grad_stride, int threads,
                       const char* isa);

// how a map [batch, height, width, channels] is cut into tiles, along both axes alike. Pixels lie in stride * stride
// phases; tile t takes `taken` pixels of every phase, pixel i of phase f being stride * (step * t + i) + f - pad on the
// map, or 0 outside of it, and makes `products` values of them by a matrix [products, taken]; both are at most
// kMostCombined (fused_kernels.h). Where taken <= step the tiles take every pixel once.
template <class T>
struct Axis {
  int size, tiles, taken, products, step;
  const T* matrix;
};
template <class T>
struct Tiles {
  int64_t batch, channels;
  int stride, pad;
  int64_t apart;  // from product to product of a tile, in values
  Axis<T> rows, columns;
};

// products [rows.products, columns.products, batch, rows.tiles, columns.tiles, stride, stride, channels] of a map, the
// first two axes `apart`.
template <class T>
void gather_tiles(const Tiles<T>& tiles, const T* map, T* products, int threads, const char* isa);
// the adjoint: a map in which every pixel is the sum over the tiles that take it.
template <class T>
void scatter_tiles(const Tiles<T>& tiles, const T* products, T* map, int threads, const char* isa);

}  // namespace avfast::fused
