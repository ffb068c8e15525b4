// ConvLSTM state update (ops.def, kernels/convlstm.py).
#pragma once

#include "loops.h"

namespace avfast::AVFAST_ISA {
namespace {

// Calls body(begin, count) for stretches of at most 512 elements, which stay in the level 1 cache.
template <class Body>
AVFAST_LOOP void for_stretches(int64_t count, const Body& body) {
  constexpr int64_t kStretch = 512;
  for (int64_t begin = 0; begin < count; begin += kStretch) body(begin, smaller(count - begin, kStretch));
}

struct ActivatedGates {
  Wide i, f, o, g;
};

// Of n elements; the four gates of an element lie `area` values apart.
AVFAST_LOOP ActivatedGates activated(const T* gates, int64_t area, int n) {
  return {sigmoid(Wide::load_first(gates, n)), sigmoid(Wide::load_first(gates + area, n)),
          sigmoid(Wide::load_first(gates + 2 * area, n)), tanh(Wide::load_first(gates + 3 * area, n))};
}

// Two loops per stretch. In one loop the second exponential would wait for the first and the core with it: 3.5 ns per
// element instead of 2.3. The output gate is kept in the memory of the hidden state between the loops.
void update_state(const T* gates, const T* cell, T* hidden, T* new_cell, int64_t area, int64_t total) {
  for_stretches(total, [&](int64_t begin, int64_t count) {
    for_lanes<Wide>(
        count, AVFAST_LANES(x, n) {
          const auto [i, f, o, g] = activated(gates + begin + x, area, n);
          (f * Wide::load_first(cell + begin + x, n) + i * g).store_first(new_cell + begin + x, n);
          o.store_first(hidden + begin + x, n);
        });
    for_lanes<Wide>(
        count, AVFAST_LANES(x, n) {
          const Wide o = Wide::load_first(hidden + begin + x, n);
          (o * tanh(Wide::load_first(new_cell + begin + x, n))).store_first(hidden + begin + x, n);
        });
  });
}

// The activations are computed again: keeping them from the forward pass would cost five values of memory per element,
// and their traffic. Two loops, as above; the activations and the new cell are kept in the memory of the gradients.
void update_gradients(const T* gates, const T* cells, const T* grad_hidden, const T* grad_new_cell, T* grad_gates,
                      T* grad_cells, int64_t area, int64_t total) {
  for_stretches(total, [&](int64_t begin, int64_t count) {
    const T* cell = cells + begin;
    T* to = grad_gates + begin;
    T* to_cell = grad_cells + begin;
    for_lanes<Wide>(
        count, AVFAST_LANES(x, n) {
          const auto [i, f, o, g] = activated(gates + begin + x, area, n);
          i.store_first(to + x, n);
          f.store_first(to + area + x, n);
          o.store_first(to + 2 * area + x, n);
          g.store_first(to + 3 * area + x, n);
          (f * Wide::load_first(cell + x, n) + i * g).store_first(to_cell + x, n);
        });
    for_lanes<Wide>(
        count, AVFAST_LANES(x, n) {
          const Wide i = Wide::load_first(to + x, n);
          const Wide f = Wide::load_first(to + area + x, n);
          const Wide o = Wide::load_first(to + 2 * area + x, n);
          const Wide g = Wide::load_first(to + 3 * area + x, n);
          const Wide out = tanh(Wide::load_first(to_cell + x, n));
          const Wide dh = Wide::load_first(grad_hidden + begin + x, n);
          const Wide dc = Wide::load_first(grad_new_cell + begin + x, n) + dh * o * (Wide(1) - out * out);
          (dc * g * i * (Wide(1) - i)).store_first(to + x, n);
          (dc * Wide::load_first(cell + x, n) * f * (Wide(1) - f)).store_first(to + area + x, n);
          (dh * out * o * (Wide(1) - o)).store_first(to + 2 * area + x, n);
          (dc * i * (Wide(1) - g * g)).store_first(to + 3 * area + x, n);
          (dc * f).store_first(to_cell + x, n);
        });
  });
}

void gates_forward(const T* gates, const T* cell, T* hidden, T* new_cell, int64_t rows, int64_t area, int threads) {
  share(rows * area, rows * area, threads, [&](int64_t begin, int64_t end) {
    for_rows(begin, end, area, [&](int64_t row, int64_t first, int64_t count) {
      const int64_t at = row * area + first;
      update_state(gates + 4 * row * area + first, cell + at, hidden + at, new_cell + at, area, count);
    });
  });
}

void gates_backward(const T* gates, const T* cell, const T* grad_hidden, const T* grad_new_cell, T* grad_gates,
                    T* grad_cell, int64_t rows, int64_t area, int threads) {
  share(rows * area, rows * area, threads, [&](int64_t begin, int64_t end) {
    for_rows(begin, end, area, [&](int64_t row, int64_t first, int64_t count) {
      const int64_t at = row * area + first;
      const int64_t gate = 4 * row * area + first;
      update_gradients(gates + gate, cell + at, grad_hidden + at, grad_new_cell + at, grad_gates + gate, grad_cell + at,
                       area, count);
    });
  });
}

}  // namespace
}  // namespace avfast::AVFAST_ISA
