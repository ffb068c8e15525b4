// the Python module avfast._C, and the only file that knows pybind11. Pointers come as integers; shapes, types,
// contiguity and lifetimes are the caller's to check (avfast/flow.py).
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "tvl1.h"

namespace py = pybind11;

namespace avfast {
#ifdef AVFAST_WITH_CUDA
constexpr bool kWithCuda = true;
std::vector<std::string> cuda_devices();  // cuda_info.cu
#else
constexpr bool kWithCuda = false;
std::vector<std::string> cuda_devices() { return {}; }
#endif
}  // namespace avfast

PYBIND11_MODULE(_C, m) {
  m.doc() = "Native parts of avfast. Private: use avfast.flow and avfast.kernels.";
  m.attr("with_cuda") = avfast::kWithCuda;
  m.def("cuda_devices", &avfast::cuda_devices, py::call_guard<py::gil_scoped_release>(),
        "Name and compute capability of every CUDA device the built-in runtime sees; empty without a driver.");

  m.def(
      "instruction_sets",
      [] {
        const char* names[3];
        const int count = avfast::tvl1::instruction_sets(names);
        return std::vector<std::string>(names, names + count);
      },
      "Instruction sets that the CPU code was built for and this CPU has, best first.");

  m.def(
      "tvl1_flow",
      [](uintptr_t a, uintptr_t b, uintptr_t flow, int64_t pairs, int height, int width, bool chambolle_pock,
         bool opencv, float tau, float lambda, float theta, float scale_step, int scales, int warps,
         int outer_iterations, int iterations, float epsilon, int median, float presmooth, int threads,
         const std::optional<std::string>& isa) {
        avfast::tvl1::Params params;
        params.solver = chambolle_pock ? avfast::tvl1::Solver::kChambollePock : avfast::tvl1::Solver::kZach;
        params.scheme = opencv ? avfast::tvl1::Scheme::kOpenCV : avfast::tvl1::Scheme::kAvfast;
        params.tau = tau;
        params.lambda = lambda;
        params.theta = theta;
        params.scale_step = scale_step;
        params.scales = scales;
        params.warps = warps;
        params.outer_iterations = outer_iterations;
        params.iterations = iterations;
        params.epsilon = epsilon;
        params.median = median;
        params.presmooth = presmooth;
        avfast::tvl1::flow(reinterpret_cast<const float*>(a), reinterpret_cast<const float*>(b),
                           reinterpret_cast<float*>(flow), pairs, height, width, params, threads,
                           isa ? isa->c_str() : nullptr);
      },
      py::call_guard<py::gil_scoped_release>(), py::arg("a"), py::arg("b"), py::arg("flow"), py::arg("pairs"),
      py::arg("height"), py::arg("width"), py::kw_only(), py::arg("chambolle_pock"), py::arg("opencv"), py::arg("tau"),
      py::arg("lambda_"), py::arg("theta"), py::arg("scale_step"), py::arg("scales"), py::arg("warps"),
      py::arg("outer_iterations"), py::arg("iterations"), py::arg("epsilon"), py::arg("median"), py::arg("presmooth"),
      py::arg("threads"), py::arg("isa"),
      "Addresses of float32 a, b [pairs, height, width] (0..255) -> writes float32 flow [pairs, 2, height, width].");
}
