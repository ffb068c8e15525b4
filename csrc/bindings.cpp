// The Python module avfast._C, and the only file that knows pybind11. Functions take their arguments by name. Tensors
// come as addresses: shapes, types, contiguity, devices and lifetimes are the caller's to check. avfast/_C.pyi lists
// what is here.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <sstream>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#include "common/isa.h"
#include "fused/ops.h"
#include "tvl1/flow.h"
#ifdef AVFAST_WITH_CUDA
#include "tvl1/cuda/flow_cuda.h"
#endif

namespace py = pybind11;

namespace avfast {

#ifdef AVFAST_WITH_CUDA
constexpr bool kWithCuda = true;
std::vector<std::string> cuda_devices();  // common/cuda_info.cu
#else
constexpr bool kWithCuda = false;
std::vector<std::string> cuda_devices() { return {}; }
#endif

using Address = uintptr_t;
using WithoutGil = py::call_guard<py::gil_scoped_release>;

// ---- fused ops ----

// How an op's parameter comes from Python: the type that pybind11 converts to, and the value made of it.
template <class Parameter>
struct Argument {
  using Given = Parameter;
  Given given;
  Parameter get() const { return given; }
};
template <class T>
struct Argument<T*> {
  using Given = Address;
  Given given;
  T* get() const { return reinterpret_cast<T*>(given); }
};
template <class Element>
struct Argument<fused::List<Element>> {
  using Given = std::vector<std::conditional_t<std::is_pointer_v<Element>, Address, Element>>;
  const Given& given;
  std::vector<Element> elements = {};
  fused::List<Element> get() {
    for (const auto& value : given) elements.push_back(Argument<Element>{value}.get());
    return {elements.data(), static_cast<int64_t>(elements.size())};
  }
};
template <>
struct Argument<fused::AxisSizes> {
  using Given = std::array<int, 5>;
  Given given;
  fused::AxisSizes get() const { return {given[0], given[1], given[2], given[3], given[4]}; }
};

// The names in a list of parameters: "const T* gates, int threads" -> gates, threads.
std::vector<std::string> parameter_names(const char* parameters) {
  std::vector<std::string> names;
  std::stringstream stream(parameters);
  for (std::string parameter; std::getline(stream, parameter, ',');) {
    names.push_back(parameter.substr(parameter.rfind(' ') + 1));
  }
  return names;
}

template <class... Single, class... Double, size_t... I>
void bind_op(py::module_& m, const char* name, const char* parameters, void (*fused::Ops<float>::*single)(Single...),
             void (*fused::Ops<double>::*double_)(Double...), std::index_sequence<I...>) {
  const std::vector<std::string> names = parameter_names(parameters);
  m.def(
      name,
      [=](const typename Argument<Single>::Given&... given, bool fp64) {
        if (fp64) {
          (fused::ops<double>().*double_)(Argument<Double>{given}.get()...);
        } else {
          (fused::ops<float>().*single)(Argument<Single>{given}.get()...);
        }
      },
      WithoutGil(), py::kw_only(), py::arg(names[I].c_str())..., py::arg("fp64"));
}

// Binds an op under its name, with its parameters and `fp64`, which says whether the addresses are of doubles.
template <class... Single, class... Double>
void bind_op(py::module_& m, const char* name, const char* parameters, void (*fused::Ops<float>::*single)(Single...),
             void (*fused::Ops<double>::*double_)(Double...)) {
  bind_op(m, name, parameters, single, double_, std::index_sequence_for<Single...>());
}

void bind_fused(py::module_& m) {
#define AVFAST_OP(name, ...) bind_op(m, #name, #__VA_ARGS__, &fused::Ops<float>::name, &fused::Ops<double>::name);
#include "fused/ops.def"
#undef AVFAST_OP
}

// ---- TV-L1 ----

using tvl1::Params;

constexpr const auto& names_of(tvl1::Solver) { return tvl1::kSolverNames; }
constexpr const auto& names_of(tvl1::Scheme) { return tvl1::kSchemeNames; }

template <class Value>
py::object to_python(Value value) {
  if constexpr (std::is_enum_v<Value>) {
    return py::str(names_of(value)[static_cast<int>(value)]);
  } else {
    return py::cast(value);
  }
}

template <class Value>
Value from_python(const char* name, py::handle given) {
  try {
    if constexpr (std::is_enum_v<Value>) {
      const auto& names = names_of(Value{});
      const auto text = given.cast<std::string>();
      const auto found = std::find(std::begin(names), std::end(names), text);
      if (found != std::end(names)) return static_cast<Value>(found - std::begin(names));
      throw std::invalid_argument(std::string(name) + " is '" + text + "', which is not known");
    } else {
      return given.cast<Value>();
    }
  } catch (const py::cast_error&) {
    throw std::invalid_argument(std::string(name) + " is " + py::str(given).cast<std::string>() +
                                ", which has the wrong type");
  }
}

// Parameters from keyword arguments: those that are missing have their defaults.
Params make_params(const py::kwargs& fields) {
  Params params;
  size_t known = 0;
#define AVFAST_PARAM(type, name, value, needed)                                                             \
  if (fields.contains(#name)) {                                                                             \
    [[maybe_unused]] const auto x = params.name = from_python<decltype(params.name)>(#name, fields[#name]); \
    if (!(needed)) {                                                                                        \
      throw std::invalid_argument(#name " is " + py::str(fields[#name]).cast<std::string>() +               \
                                  ", expected " #needed " for x = " #name);                                 \
    }                                                                                                       \
    ++known;                                                                                                \
  }
#include "tvl1/params.def"
#undef AVFAST_PARAM
  if (known != fields.size()) {
    throw py::type_error("TVL1Params has no such parameter among " + py::str(py::list(fields)).cast<std::string>());
  }
  return params;
}

void bind_tvl1(py::module_& m) {
  py::class_<Params> params(m, "TVL1Params", "Parameters of TV-L1 (avfast.opticalflow.tvl1.TVL1Params), read-only.");
  params.def(py::init(&make_params));
#define AVFAST_PARAM(type, name, value, needed) \
  params.def_property_readonly(#name, [](const Params& p) { return to_python(p.name); });
#include "tvl1/params.def"
#undef AVFAST_PARAM

  m.def(
      "tvl1_flow",
      [](Address a, Address b, Address flow, int64_t pairs, int height, int width, const Params& params, bool uint8,
         int threads) {
        const auto run = [&](auto grey) {
          using Grey = decltype(grey);
          tvl1::flow(reinterpret_cast<const Grey*>(a), reinterpret_cast<const Grey*>(b), reinterpret_cast<float*>(flow),
                     pairs, height, width, params, threads);
        };
        uint8 ? run(uint8_t{}) : run(float{});
      },
      WithoutGil(), py::kw_only(), py::arg("a"), py::arg("b"), py::arg("flow"), py::arg("pairs"), py::arg("height"),
      py::arg("width"), py::arg("params"), py::arg("uint8"), py::arg("threads"),
      "Grey levels a, b [pairs, height, width], 0..255, float32 or uint8 -> writes float32 flow [pairs, 2, height, "
      "width] in pixels. Addresses of the CPU's memory.");
#ifdef AVFAST_WITH_CUDA
  m.def("tvl1_cuda_scratch", &tvl1::cuda_scratch, py::kw_only(), py::arg("pairs"), py::arg("height"), py::arg("width"),
        py::arg("params"), "float32 values of scratch memory that tvl1_flow_cuda needs.");
  m.def(
      "tvl1_flow_cuda",
      [](Address a, Address b, Address flow, int64_t pairs, int height, int width, const Params& params,
         Address scratch, Address stream) {
        tvl1::flow_cuda(reinterpret_cast<const float*>(a), reinterpret_cast<const float*>(b),
                        reinterpret_cast<float*>(flow), pairs, height, width, params, reinterpret_cast<float*>(scratch),
                        reinterpret_cast<void*>(stream));
      },
      WithoutGil(), py::kw_only(), py::arg("a"), py::arg("b"), py::arg("flow"), py::arg("pairs"), py::arg("height"),
      py::arg("width"), py::arg("params"), py::arg("scratch"), py::arg("stream"),
      "As tvl1_flow for float32, with addresses on the current CUDA device; queued on the stream.");
#endif
}

}  // namespace avfast

PYBIND11_MODULE(_C, m) {
  m.doc() = "Native parts of avfast. Private: use avfast.tvl1_flow and avfast.kernels.";
  m.attr("with_cuda") = avfast::kWithCuda;
  m.def("cuda_devices", &avfast::cuda_devices, avfast::WithoutGil(),
        "Name and compute capability of every CUDA device the built-in runtime sees; empty without a driver.");
  m.def("instruction_sets", &avfast::instruction_sets,
        "Instruction sets that the CPU code was built for and this CPU has, best first.");
  avfast::bind_fused(m);
  avfast::bind_tvl1(m);
}
