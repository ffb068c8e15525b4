// Random inputs through the fused ops, built with AddressSanitizer and UBSan: fuzz_fused COUNT SEED
//
// Tensors end where their memory ends, so that an access past them is seen. Flows hold NaN, infinite, huge and ordinary
// values; where image and flow are finite, the results have to be finite.
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <limits>
#include <random>
#include <vector>

#include "../../csrc/fused/ops.h"

using namespace avfast::fused;

namespace {

std::mt19937 engine;

int pick(int low, int high) { return std::uniform_int_distribution<int>(low, high)(engine); }
double real(double low, double high) { return std::uniform_real_distribution<double>(low, high)(engine); }

template <class T>
std::vector<T> random_values(int64_t size) {
  std::vector<T> values(size);
  for (T& v : values) v = static_cast<T>(real(-2, 2));
  return values;
}

// Puts unusual values into a flow, except for kind 0; returns whether all values are finite.
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

// Returns the name of a wrong result, or null.
template <class T>
const char* warp() {
  const int batch = pick(1, 3), channels = pick(1, 3), height = pick(1, 40);
  const int width = pick(0, 9) == 0 ? pick(1, 200) : pick(1, 40);
  const int64_t plane = static_cast<int64_t>(height) * width;
  const std::vector<T> image = random_values<T>(batch * channels * plane),
                       grad = random_values<T>(batch * channels * plane);
  std::vector<T> flow = random_values<T>(2 * batch * plane);
  for (T& v : flow) v *= 10;
  const bool finite = spoil(flow, pick(0, 2));
  std::vector<T> out(image.size()), grad_image(image.size()), grad_flow(flow.size());
  const bool zeros = pick(0, 1);
  const int threads = pick(1, 4);
  ops<T>().warp_forward(image.data(), flow.data(), out.data(), batch, channels, height, width, zeros, threads);
  ops<T>().warp_backward(image.data(), flow.data(), grad.data(), pick(0, 3) ? grad_image.data() : nullptr,
                         pick(0, 3) ? grad_flow.data() : nullptr, batch, channels, height, width, zeros, threads);
  if (!finite) return nullptr;
  return !all_finite(out)          ? "warp"
         : !all_finite(grad_image) ? "grad_image"
         : !all_finite(grad_flow)  ? "grad_flow"
                                   : nullptr;
}

template <class T>
const char* gates() {
  const int64_t rows = pick(1, 5), area = pick(1, 300);
  std::vector<T> gates = random_values<T>(4 * rows * area);
  const std::vector<T> cell = random_values<T>(rows * area), grad = random_values<T>(rows * area);
  for (T& v : gates) v *= static_cast<T>(pick(0, 9) == 0 ? 1e30 : 1);
  std::vector<T> hidden(cell.size()), new_cell(cell.size()), grad_gates(gates.size()), grad_cell(cell.size());
  ops<T>().gates_forward(gates.data(), cell.data(), hidden.data(), new_cell.data(), rows, area, pick(1, 4));
  ops<T>().gates_backward(gates.data(), cell.data(), grad.data(), grad.data(), grad_gates.data(), grad_cell.data(),
                          rows, area, pick(1, 4));
  return all_finite(hidden) && all_finite(new_cell) && all_finite(grad_gates) && all_finite(grad_cell) ? nullptr
                                                                                                       : "gates";
}

template <class T>
const char* loss() {
  const int images = pick(1, 4), channels = pick(1, 3), height = pick(1, 30), width = pick(1, 70);
  const int64_t plane = static_cast<int64_t>(height) * width;
  const std::vector<T> prediction = random_values<T>(2 * images * plane), target = random_values<T>(2 * images * plane);
  const std::vector<T> frames = random_values<T>(images * channels * plane);
  std::vector<T> grad(prediction.size());
  T value = 0;
  ops<T>().flow_loss(prediction.data(), target.data(), frames.data(), pick(0, 3) ? grad.data() : nullptr, &value,
                     images, channels, height, width, 0.5, 0.1, pick(1, 4));
  return std::isfinite(value) && all_finite(grad) ? nullptr : "loss";
}

template <class T>
const char* modulate() {
  const int64_t batch = pick(1, 3), channels = pick(1, 4), area = pick(1, 300), before = pick(0, 3);
  const int64_t size = batch * channels * area, stride = (2 * before + channels) * area;
  const std::vector<T> context = random_values<T>(size), gamma = random_values<T>(batch * channels);
  const std::vector<T> features = random_values<T>(2 * batch * before * area);
  const T* const first_channels[] = {features.data(), features.data() + batch * before * area};
  const int64_t before_channels[] = {before, before};
  std::vector<T> out(batch * stride), grad_context(size), grad_gamma(gamma.size()), grad_beta(gamma.size());
  ops<T>().modulate_forward({first_channels, 2}, context.data(), gamma.data(), gamma.data(), out.data(),
                            {before_channels, 2}, batch, channels, area, pick(1, 4));
  ops<T>().modulate_backward(context.data(), gamma.data(), out.data() + 2 * before * area, grad_context.data(),
                             grad_gamma.data(), grad_beta.data(), batch, channels, area, stride, pick(1, 4));
  return all_finite(out) && all_finite(grad_context) && all_finite(grad_gamma) ? nullptr : "modulate";
}

AxisSizes axis(bool once) {
  const int size = pick(1, 20), pixels = pick(1, 6), step = once ? pixels : pick(1, pixels);
  // where every pixel is taken once the tiles cover the map; otherwise they may leave out pixels, or reach beyond it
  const int tiles = once ? (size + step - 1) / step : pick(1, 5);
  return {size, tiles, pixels, pick(1, 6), step};
}

template <class T>
const char* tiles() {
  const bool once = pick(0, 1);
  const std::vector<T> matrix = random_values<T>(36);
  const int64_t batch = pick(1, 4), channels = pick(1, 150);
  const int stride = once ? 1 : pick(1, 2);
  const int padding = once ? 0 : pick(0, 3);
  const AxisSizes rows = axis(once), columns = axis(once);
  const int64_t product_stride = batch * rows.tiles * columns.tiles * stride * stride * channels;
  const std::vector<T> map = random_values<T>(batch * rows.size * columns.size * channels);
  std::vector<T> products(rows.products * columns.products * product_stride), back(map.size());
  ops<T>().gather_tiles(map.data(), matrix.data(), matrix.data(), products.data(), batch, channels, product_stride,
                        stride, padding, rows, columns, pick(1, 4));
  ops<T>().scatter_tiles(products.data(), matrix.data(), matrix.data(), back.data(), batch, channels, product_stride,
                         stride, padding, rows, columns, pick(1, 4));
  return all_finite(products) && all_finite(back) ? nullptr : "tiles";
}

template <class T>
const char* one(int op) {
  // half of all are warps, the op that computes addresses from data
  return op == 0 ? gates<T>() : op == 1 ? loss<T>() : op == 2 ? modulate<T>() : op == 3 ? tiles<T>() : warp<T>();
}

}  // namespace

int main(int argc, char** argv) {
  const long count = argc > 1 ? std::atol(argv[1]) : 1000;
  engine.seed(argc > 2 ? static_cast<unsigned>(std::atol(argv[2])) : 0);
  const std::vector<const char*> sets = avfast::instruction_sets();
  // `count` warps, and as many inputs for the other ops
  for (long n = 0; n < 2 * count; ++n) {
    const char* isa = sets[pick(0, static_cast<int>(sets.size()) - 1)];
    setenv("AVFAST_ISA", isa, 1);
    const int op = n % 2 ? 4 : pick(0, 3);
    const char* wrong = pick(0, 3) == 0 ? one<double>(op) : one<float>(op);
    if (wrong != nullptr) {
      std::printf("input %ld, %s: %s is not finite\n", n, isa, wrong);
      return 1;
    }
  }
  std::printf("%ld inputs\n", count);
}
