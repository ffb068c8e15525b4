// the inner loops of the fused ops, one table of them per instruction set. All tensors are contiguous.
#pragma once

#include <cstdint>

namespace avfast::fused {

// elements of a ConvLSTM state. The four gates of an element lie `area` values apart, in the order i, f, o, g.
template <class T>
struct Gates {
  const T* gates;
  const T* cell;
  int64_t area;
  int64_t count;
};

// one image and the flow on its grid; rows begin .. end - 1 of what comes out.
template <class T>
struct Warp {
  const T* image;  // [channels, height, width]
  const T* flow;   // [2, height, width], pixels, x then y
  int channels, height, width;
  int begin, end;
  bool zeros;  // zeros around the image, else its edge pixels repeated
};

// a predicted and a true flow and the true frame they belong to; see kernels/loss.py.
template <class T>
struct FlowLoss {
  const T* prediction;  // [2, height, width]
  const T* target;      // [2, height, width]
  const T* frame;       // [channels, height, width]
  int channels, height, width;
  T data_weight, smooth_weight;  // of a squared error, and of an absolute difference
  T* scratch;                    // flow_loss_scratch(width) values
};

constexpr int64_t flow_loss_scratch(int64_t width) { return 7 * (width + 1); }

// one channel of a feature map: out = gamma in + beta.
template <class T>
struct Modulate {
  const T* in;
  T gamma, beta;
  int64_t count;
};

// to[a] = sum over k of matrix[a][k] from[k], vectors of `count` values; `add`: added to what is there.
template <class T>
struct Combination {
  const T* matrix;  // [outputs, inputs]
  int outputs, inputs;
  const T* const* from;
  T* const* to;
  int64_t count;
  bool add;
};

constexpr int kMostCombined = 6;  // inputs

template <class T>
struct Kernels {
  void (*gates_forward)(const Gates<T>&, T* hidden, T* new_cell);
  // grad_gates is laid out as the gates
  void (*gates_backward)(const Gates<T>&, const T* grad_hidden, const T* grad_new_cell, T* grad_gates, T* grad_cell);
  void (*warp_forward)(const Warp<T>&, T* out);
  // grad_out [channels, height, width]; grad_image is added to, grad_flow written; either may be null
  void (*warp_backward)(const Warp<T>&, const T* grad_out, T* grad_image, T* grad_flow);
  // returns the loss; its gradient by the prediction is written where `grad` is not null
  double (*flow_loss)(const FlowLoss<T>&, T* grad);
  void (*modulate_forward)(const Modulate<T>&, T* out);
  // grad_in, and the sums grad_gamma and grad_beta
  void (*modulate_backward)(const Modulate<T>&, const T* grad_out, T* grad_in, T* grad_gamma, T* grad_beta);
  void (*combine)(const Combination<T>&);
};

}  // namespace avfast::fused

namespace avfast::avx512 {
extern const fused::Kernels<float> kFused;
}
namespace avfast::avx2 {
extern const fused::Kernels<float> kFused;
}
namespace avfast::baseline {
extern const fused::Kernels<float> kFused;
}
