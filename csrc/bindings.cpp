// the Python module avfast._C, and the only file that knows pybind11. Pointers come as integers; shapes, types,
// contiguity, devices and lifetimes are the caller's to check (avfast/kernels/tvl1.py).
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

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
}  // namespace avfast

PYBIND11_MODULE(_C, m) {
  using avfast::tvl1::Params;
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

  py::class_<Params>(m, "TVL1Params", "Parameters of the engine, checked by avfast.flow.TVL1Params.")
      .def(py::init([](bool chambolle_pock, bool opencv, float tau, float lambda, float theta, float scale_step,
                       int scales, int warps, int outer_iterations, int iterations, float epsilon, int median,
                       float presmooth) {
             return Params{chambolle_pock ? avfast::tvl1::Solver::kChambollePock : avfast::tvl1::Solver::kZach,
                           opencv ? avfast::tvl1::Scheme::kOpenCV : avfast::tvl1::Scheme::kAvfast,
                           tau,
                           lambda,
                           theta,
                           scale_step,
                           scales,
                           warps,
                           outer_iterations,
                           iterations,
                           epsilon,
                           median,
                           presmooth};
           }),
           py::kw_only(), py::arg("chambolle_pock"), py::arg("opencv"), py::arg("tau"), py::arg("lambda_"),
           py::arg("theta"), py::arg("scale_step"), py::arg("scales"), py::arg("warps"), py::arg("outer_iterations"),
           py::arg("iterations"), py::arg("epsilon"), py::arg("median"), py::arg("presmooth"));

  m.def(
      "tvl1_flow",
      [](uintptr_t a, uintptr_t b, uintptr_t flow, int64_t pairs, int height, int width, const Params& params,
         int threads, const std::optional<std::string>& isa) {
        avfast::tvl1::flow(reinterpret_cast<const float*>(a), reinterpret_cast<const float*>(b),
                           reinterpret_cast<float*>(flow), pairs, height, width, params, threads,
                           isa ? isa->c_str() : nullptr);
      },
      py::call_guard<py::gil_scoped_release>(), py::arg("a"), py::arg("b"), py::arg("flow"), py::arg("pairs"),
      py::arg("height"), py::arg("width"), py::arg("params"), py::arg("threads"), py::arg("isa"),
      "Addresses of float32 a, b [pairs, height, width] (0..255) -> writes float32 flow [pairs, 2, height, width].");

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
