// random inputs through the fused ops, built with AddressSanitizer and UBSan: fuzz_fused COUNT SEED
//
// tensors end where their memory ends, so that an access past them is seen. Flows hold NaN, infinite, huge and ordinary
// values; where image and flow are finite, what comes out has to be.
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <limits>
#include <random>
#include <vector>

#include "../../csrc/fused.h"
#include "../../csrc/isa.h"

using namespace avfast::fused;

namespace {

std::mt19937 engine;

int pick(int low, int high) { return std::uniform_int_distribution<int>(low, high)(engine); }
double real(double low, double high) { return std::uniform_real_distribution<double>(low, high)(engine); }

template <class T>
std::vector<T> ordinary(int64_t size) {
  std::vector<T> values(size);
  for (T& v : values) v = static_cast<T>(real(-2, 2));
  return values;
}

// a flow of a kind; returns whether all of it is finite.
template <class T>
bool spoil(std::vector<T>& flow, int kind) {
  bool finite = true;
  for (T& v : flow) {
    if (kind == 0 || pick(0, 3) != 0) continue;
    switch (pick(0, 6)) {
      case 0:
        v = std::numeric_limits<T>::quiet_NaN();
        break;
      case 1:
        v = std::numeric_limits<T>::infinity();
        break;
      case 2:
        v = -std::numeric_limits<T>::infinity();
        break;
      case 3:
        v = static_cast<T>(1e30);
        break;
      case 4:
        v = static_cast<T>(-1e30);
        break;
      case 5:
        v = static_cast<T>(real(-1e10, 1e10));
        break;
      default:
        v = static_cast<T>(pick(-70, 70));
    }
    finite = finite && std::isfinite(v);
  }
  return finite;
}

template <class T>
bool all_finite(const std::vector<T>& values) {
  for (const T v : values) {
    if (!std::isfinite(v)) return false;
  }
  return true;
}

// returns what came out wrong, or null.
template <class T>
const char* warp(const char* isa) {
  const int batch = pick(1, 3), channels = pick(1, 3), height = pick(1, 40);
  const int width = pick(0, 9) == 0 ? pick(1, 200) : pick(1, 40);
  const int64_t plane = static_cast<int64_t>(height) * width;
  const std::vector<T> image = ordinary<T>(batch * channels * plane), grad = ordinary<T>(batch * channels * plane);
  std::vector<T> flow = ordinary<T>(2 * batch * plane);
  for (T& v : flow) v *= 10;
  const bool finite = spoil(flow, pick(0, 2));
  std::vector<T> out(image.size()), grad_image(image.size()), grad_flow(flow.size());
  const bool zeros = pick(0, 1);
  const int threads = pick(1, 4);
  warp_forward(image.data(), flow.data(), out.data(), batch, channels, height, width, zeros, threads, isa);
  warp_backward(image.data(), flow.data(), grad.data(), pick(0, 3) ? grad_image.data() : nullptr,
                pick(0, 3) ? grad_flow.data() : nullptr, batch, channels, height, width, zeros, threads, isa);
  if (!finite) return nullptr;
  return !all_finite(out)          ? "warp"
         : !all_finite(grad_image) ? "grad_image"
         : !all_finite(grad_flow)  ? "grad_flow"
                                   : nullptr;
}

template <class T>
const char* gates(const char* isa) {
  const int64_t rows = pick(1, 5), area = pick(1, 300);
  std::vector<T> gates = ordinary<T>(4 * rows * area);
  const std::vector<T> cell = ordinary<T>(rows * area), grad = ordinary<T>(rows * area);
  for (T& v : gates) v *= static_cast<T>(pick(0, 9) == 0 ? 1e30 : 1);
  std::vector<T> hidden(cell.size()), new_cell(cell.size()), grad_gates(gates.size()), grad_cell(cell.size());
  gates_forward(gates.data(), cell.data(), hidden.data(), new_cell.data(), rows, area, pick(1, 4), isa);
  gates_backward(gates.data(), cell.data(), grad.data(), grad.data(), grad_gates.data(), grad_cell.data(), rows, area,
                 pick(1, 4), isa);
  return all_finite(hidden) && all_finite(new_cell) && all_finite(grad_gates) && all_finite(grad_cell) ? nullptr
                                                                                                       : "gates";
}

template <class T>
const char* loss(const char* isa) {
  const int images = pick(1, 4), channels = pick(1, 3), height = pick(1, 30), width = pick(1, 70);
  const int64_t plane = static_cast<int64_t>(height) * width;
  const std::vector<T> prediction = ordinary<T>(2 * images * plane), target = ordinary<T>(2 * images * plane);
  const std::vector<T> frames = ordinary<T>(images * channels * plane);
  std::vector<T> grad(prediction.size());
  T value = 0;
  flow_loss(prediction.data(), target.data(), frames.data(), pick(0, 3) ? grad.data() : nullptr, &value, images,
            channels, height, width, 0.5, 0.1, pick(1, 4), isa);
  return std::isfinite(value) && all_finite(grad) ? nullptr : "loss";
}

template <class T>
const char* modulate(const char* isa) {
  const int64_t batch = pick(1, 3), channels = pick(1, 4), area = pick(1, 300), before = pick(0, 3);
  const int64_t size = batch * channels * area, stride = (before + channels) * area;
  const std::vector<T> context = ordinary<T>(size), gamma = ordinary<T>(batch * channels);
  const std::vector<T> feature = ordinary<T>(batch * before * area);
  std::vector<T> out(batch * stride), grad_context(size), grad_gamma(gamma.size()), grad_beta(gamma.size());
  modulate_forward(context.data(), gamma.data(), gamma.data(), out.data(), batch, channels, area, stride,
                   {{feature.data(), before}}, pick(1, 4), isa);
  modulate_backward(context.data(), gamma.data(), out.data() + before * area, grad_context.data(), grad_gamma.data(),
                    grad_beta.data(), batch, channels, area, stride, pick(1, 4), isa);
  return all_finite(out) && all_finite(grad_context) && all_finite(grad_gamma) ? nullptr : "modulate";
}

template <class T>
Axis<T> axis(bool once, const std::vector<T>& matrix) {
  const int size = pick(1, 20), taken = pick(1, 6), step = once ? taken : pick(1, taken);
  // where every pixel is taken once the tiles cover the map, else they may leave some out, or take some beyond
  const int tiles = once ? (size + step - 1) / step : pick(1, 5);
  return {size, tiles, taken, pick(1, 6), step, matrix.data()};
}

template <class T>
const char* tiles(const char* isa) {
  const bool once = pick(0, 1);
  const std::vector<T> matrix = ordinary<T>(36);
  const int64_t batch = pick(1, 4), channels = pick(1, 150);
  const int stride = once ? 1 : pick(1, 2);
  Tiles<T> cut{batch, channels, stride, once ? 0 : pick(0, 3), 0, axis(once, matrix), axis(once, matrix)};
  const int64_t phases = static_cast<int64_t>(stride) * stride;
  cut.apart = batch * cut.rows.tiles * cut.columns.tiles * phases * channels;
  const std::vector<T> map = ordinary<T>(batch * cut.rows.size * cut.columns.size * channels);
  std::vector<T> products(cut.rows.products * cut.columns.products * cut.apart), back(map.size());
  gather_tiles(cut, map.data(), products.data(), pick(1, 4), isa);
  scatter_tiles(cut, products.data(), back.data(), pick(1, 4), isa);
  return all_finite(products) && all_finite(back) ? nullptr : "tiles";
}

template <class T>
const char* one(int op, const char* isa) {
  // half of all are warps, the op that computes addresses from data
  return op == 0   ? gates<T>(isa)
         : op == 1 ? loss<T>(isa)
         : op == 2 ? modulate<T>(isa)
         : op == 3 ? tiles<T>(isa)
                   : warp<T>(isa);
}

}  // namespace

int main(int argc, char** argv) {
  const long count = argc > 1 ? std::atol(argv[1]) : 1000;
  engine.seed(argc > 2 ? static_cast<unsigned>(std::atol(argv[2])) : 0);
  const std::vector<const char*> sets = avfast::instruction_sets();
  // `count` warps, and the others on the way
  for (long n = 0; n < 2 * count; ++n) {
    const char* isa = sets[pick(0, static_cast<int>(sets.size()) - 1)];
    const int op = n % 2 ? 4 : pick(0, 3);
    const char* wrong = pick(0, 3) == 0 ? one<double>(op, isa) : one<float>(op, isa);
    if (wrong != nullptr) {
      std::printf("input %ld, %s: %s is not finite\n", n, isa, wrong);
      return 1;
    }
  }
  std::printf("%ld inputs\n", count);
}
