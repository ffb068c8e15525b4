// The table of the fused ops that ops.def declares; there is one per instruction set, and one for double.
#pragma once

#include <cstdint>
#include <type_traits>

#include "../common/isa.h"

namespace avfast::fused {

template <class Element>
struct List {
  const Element* data;
  int64_t size;
};

// How one axis of a map is cut into tiles. The axis' pixels lie in `stride` phases: pixel i of phase f in tile t is
// pixel stride * (step * t + i) + f - padding of the map, or 0 outside of it. A tile takes `pixels` pixels of every
// phase and makes `products` values of them; both are at most kMaxTilePixels. Where pixels <= step no tiles overlap.
struct AxisSizes {
  int size, tiles, pixels, products, step;
};
constexpr int kMaxTilePixels = 6;

template <class T>
struct Ops {
#define AVFAST_OP(name, ...) void (*name)(__VA_ARGS__);
#include "ops.def"
#undef AVFAST_OP
};

}  // namespace avfast::fused

namespace avfast::avx512 {
extern const fused::Ops<float> kOps;
}
namespace avfast::avx2 {
extern const fused::Ops<float> kOps;
}
namespace avfast::baseline {
extern const fused::Ops<float> kOps;
}
namespace avfast::fp64 {
extern const fused::Ops<double> kOps;
}

namespace avfast::fused {

// The ops for float on this CPU (isa.h), or for double.
template <class T>
const Ops<T>& ops() {
  if constexpr (std::is_same_v<T, double>) {
    return fp64::kOps;
  } else {
    return choose_isa(AVFAST_TABLES(kOps));
  }
}

}  // namespace avfast::fused
