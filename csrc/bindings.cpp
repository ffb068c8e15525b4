// the Python module avfast._C, and the only file that knows pybind11. Pointers come as integers; shapes, types,
// contiguity, devices and lifetimes are the caller's to check (avfast/kernels/tvl1.py). The instruction set is the
// environment's to choose.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <cstdint>
#include <cstdlib>
#include <string>
#include <utility>
#include <vector>

#include "fused.h"
#include "isa.h"
#include "tvl1.h"
#ifdef AVFAST_WITH_CUDA
#include "tvl1_cuda.h"
#endif

namespace py = pybind11;

namespace avfast {
#ifdef AVFAST_WITH_CUDA
constexpr bool kWithCuda = true;
std::vector<std::string> cuda_devices();  // cuda_info.cu
#else
constexpr bool kWithCuda = false;
std::vector<std::string> cuda_devices() { return {}; }
#endif

// calls run(T{}) with the element type that the caller's tensors have.
template <class Run>
void with_type(bool fp64, const Run& run) {
  fp64 ? run(double{}) : run(float{});
}
template <class T>
T* as(T, uintptr_t address) {
  return reinterpret_cast<T*>(address);
}
}  // namespace avfast

PYBIND11_MODULE(_C, m) {
  using avfast::as;
  using avfast::tvl1::Params;
  m.doc() = "Native parts of avfast. Private: use avfast.flow and avfast.kernels.";
  m.attr("with_cuda") = avfast::kWithCuda;
  m.def("cuda_devices", &avfast::cuda_devices, py::call_guard<py::gil_scoped_release>(),
        "Name and compute capability of every CUDA device the built-in runtime sees; empty without a driver.");
  m.def(
      "has_environment",
      [](const char* name) {
        const char* value = std::getenv(name);
        return value != nullptr && *value != '\0';
      },
      "Whether a variable of the environment has a value, in a tenth of the 1 us that os.environ takes.");
  m.def("instruction_sets", &avfast::instruction_sets,
        "Instruction sets that the CPU code was built for and this CPU has, best first.");

  py::class_<Params>(m, "TVL1Params", "Parameters of the engine, checked by avfast.flow.TVL1Params.")
      .def(py::init([](bool chambolle_pock, bool opencv, float tau, float lambda, float theta, float scale_step,
                       int scales, int warps, int coarse_warps, int outer_iterations, int iterations, float epsilon,
                       int median, float presmooth) {
             return Params{chambolle_pock ? avfast::tvl1::Solver::kChambollePock : avfast::tvl1::Solver::kZach,
                           opencv ? avfast::tvl1::Scheme::kOpenCV : avfast::tvl1::Scheme::kAvfast,
                           tau,
                           lambda,
                           theta,
                           scale_step,
                           scales,
                           warps,
                           coarse_warps,
                           outer_iterations,
                           iterations,
                           epsilon,
                           median,
                           presmooth};
           }),
           py::kw_only(), py::arg("chambolle_pock"), py::arg("opencv"), py::arg("tau"), py::arg("lambda_"),
           py::arg("theta"), py::arg("scale_step"), py::arg("scales"), py::arg("warps"), py::arg("coarse_warps"),
           py::arg("outer_iterations"), py::arg("iterations"), py::arg("epsilon"), py::arg("median"),
           py::arg("presmooth"));

  m.def(
      "tvl1_flow",
      [](uintptr_t a, uintptr_t b, uintptr_t flow, int64_t pairs, int height, int width, const Params& params,
         int threads, bool bytes) {
        const auto run = [&](auto grey) {
          avfast::tvl1::flow(as(grey, a), as(grey, b), as(float{}, flow), pairs, height, width, params, threads,
                             nullptr);
        };
        bytes ? run(uint8_t{}) : run(float{});
      },
      py::call_guard<py::gil_scoped_release>(), py::arg("a"), py::arg("b"), py::arg("flow"), py::arg("pairs"),
      py::arg("height"), py::arg("width"), py::arg("params"), py::arg("threads"), py::arg("bytes") = false,
      "Addresses of float32 or (bytes) uint8 a, b [pairs, height, width] (0..255) -> writes float32 flow [pairs, 2, "
      "height, width].");

  // the fused ops: fused.h says what each address holds
  m.def(
      "gates_forward",
      [](uintptr_t gates, uintptr_t cell, uintptr_t hidden, uintptr_t new_cell, int64_t rows, int64_t area, bool fp64,
         int threads) {
        avfast::with_type(fp64, [&](auto t) {
          avfast::fused::gates_forward(as(t, gates), as(t, cell), as(t, hidden), as(t, new_cell), rows, area, threads,
                                       nullptr);
        });
      },
      py::call_guard<py::gil_scoped_release>());
  m.def(
      "gates_backward",
      [](uintptr_t gates, uintptr_t cell, uintptr_t grad_hidden, uintptr_t grad_new_cell, uintptr_t grad_gates,
         uintptr_t grad_cell, int64_t rows, int64_t area, bool fp64, int threads) {
        avfast::with_type(fp64, [&](auto t) {
          avfast::fused::gates_backward(as(t, gates), as(t, cell), as(t, grad_hidden), as(t, grad_new_cell),
                                        as(t, grad_gates), as(t, grad_cell), rows, area, threads, nullptr);
        });
      },
      py::call_guard<py::gil_scoped_release>());
  m.def(
      "warp_forward",
      [](uintptr_t image, uintptr_t flow, uintptr_t out, int64_t batch, int channels, int height, int width, bool zeros,
         bool fp64, int threads) {
        avfast::with_type(fp64, [&](auto t) {
          avfast::fused::warp_forward(as(t, image), as(t, flow), as(t, out), batch, channels, height, width, zeros,
                                      threads, nullptr);
        });
      },
      py::call_guard<py::gil_scoped_release>());
  m.def(
      "warp_backward",
      [](uintptr_t image, uintptr_t flow, uintptr_t grad_out, uintptr_t grad_image, uintptr_t grad_flow, int64_t batch,
         int channels, int height, int width, bool zeros, bool fp64, int threads) {
        avfast::with_type(fp64, [&](auto t) {
          avfast::fused::warp_backward(as(t, image), as(t, flow), as(t, grad_out), as(t, grad_image), as(t, grad_flow),
                                       batch, channels, height, width, zeros, threads, nullptr);
        });
      },
      py::call_guard<py::gil_scoped_release>());
  m.def(
      "flow_loss",
      [](uintptr_t prediction, uintptr_t target, uintptr_t frames, uintptr_t grad, uintptr_t loss, int64_t images,
         int channels, int height, int width, double data_weight, double smooth_weight, bool fp64, int threads) {
        avfast::with_type(fp64, [&](auto t) {
          avfast::fused::flow_loss(as(t, prediction), as(t, target), as(t, frames), as(t, grad), as(t, loss), images,
                                   channels, height, width, data_weight, smooth_weight, threads, nullptr);
        });
      },
      py::call_guard<py::gil_scoped_release>());
  // a feature: its address and its channels
  using Features = std::vector<std::pair<uintptr_t, int64_t>>;
  m.def(
      "modulate_forward",
      [](uintptr_t context, uintptr_t gamma, uintptr_t beta, uintptr_t out, int64_t batch, int64_t channels,
         int64_t area, int64_t out_stride, const Features& before, bool fp64, int threads) {
        avfast::with_type(fp64, [&](auto t) {
          std::vector<avfast::fused::Feature<decltype(t)>> features;
          for (const auto& [address, count] : before) features.push_back({as(t, address), count});
          avfast::fused::modulate_forward(as(t, context), as(t, gamma), as(t, beta), as(t, out), batch, channels, area,
                                          out_stride, features, threads, nullptr);
        });
      },
      py::call_guard<py::gil_scoped_release>());
  m.def(
      "modulate_backward",
      [](uintptr_t context, uintptr_t gamma, uintptr_t grad_out, uintptr_t grad_context, uintptr_t grad_gamma,
         uintptr_t grad_beta, int64_t batch, int64_t channels, int64_t area, int64_t grad_stride, bool fp64,
         int threads) {
        avfast::with_type(fp64, [&](auto t) {
          avfast::fused::modulate_backward(as(t, context), as(t, gamma), as(t, grad_out), as(t, grad_context),
                                           as(t, grad_gamma), as(t, grad_beta), batch, channels, area, grad_stride,
                                           threads, nullptr);
        });
      },
      py::call_guard<py::gil_scoped_release>());
  // of an axis: size, tiles, taken, products, step
  using Sizes = std::array<int, 5>;
  const auto tiles = [](auto t, uintptr_t rows, uintptr_t columns, int64_t batch, int64_t channels, int64_t apart,
                        int stride, int pad, const Sizes& h, const Sizes& w) {
    using T = decltype(t);
    return avfast::fused::Tiles<T>{batch,
                                   channels,
                                   stride,
                                   pad,
                                   apart,
                                   {h[0], h[1], h[2], h[3], h[4], as(t, rows)},
                                   {w[0], w[1], w[2], w[3], w[4], as(t, columns)}};
  };
  m.def(
      "gather_tiles",
      [tiles](uintptr_t map, uintptr_t rows, uintptr_t columns, uintptr_t products, int64_t batch, int64_t channels,
              int64_t apart, int stride, int pad, const Sizes& h, const Sizes& w, bool fp64, int threads) {
        avfast::with_type(fp64, [&](auto t) {
          avfast::fused::gather_tiles(tiles(t, rows, columns, batch, channels, apart, stride, pad, h, w), as(t, map),
                                      as(t, products), threads, nullptr);
        });
      },
      py::call_guard<py::gil_scoped_release>());
  m.def(
      "scatter_tiles",
      [tiles](uintptr_t products, uintptr_t rows, uintptr_t columns, uintptr_t map, int64_t batch, int64_t channels,
              int64_t apart, int stride, int pad, const Sizes& h, const Sizes& w, bool fp64, int threads) {
        avfast::with_type(fp64, [&](auto t) {
          avfast::fused::scatter_tiles(tiles(t, rows, columns, batch, channels, apart, stride, pad, h, w),
                                       as(t, products), as(t, map), threads, nullptr);
        });
      },
      py::call_guard<py::gil_scoped_release>());

#ifdef AVFAST_WITH_CUDA
  m.def("tvl1_cuda_scratch", &avfast::tvl1::cuda_scratch, py::arg("pairs"), py::arg("height"), py::arg("width"),
        py::arg("params"), "float32 values of scratch memory that tvl1_flow_cuda needs.");
  m.def(
      "tvl1_flow_cuda",
      [](uintptr_t a, uintptr_t b, uintptr_t flow, int64_t pairs, int height, int width, const Params& params,
         uintptr_t scratch, uintptr_t stream) {
        avfast::tvl1::flow_cuda(reinterpret_cast<const float*>(a), reinterpret_cast<const float*>(b),
                                reinterpret_cast<float*>(flow), pairs, height, width, params,
                                reinterpret_cast<float*>(scratch), reinterpret_cast<void*>(stream));
      },
      py::call_guard<py::gil_scoped_release>(), py::arg("a"), py::arg("b"), py::arg("flow"), py::arg("pairs"),
      py::arg("height"), py::arg("width"), py::arg("params"), py::arg("scratch"), py::arg("stream"),
      "As tvl1_flow, with addresses on the current CUDA device; queued on the stream.");
#endif
}
