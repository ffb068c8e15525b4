// compiled once per instruction set (setup.py): see simd.h for what must not be used here.
#include "fused_kernels.h"

#include "fused_loops.h"
#include "simd.h"

namespace avfast::AVFAST_ISA {

extern const fused::Kernels<float> kFused = fused::kernels<Vec, Vec2>();

}  // namespace avfast::AVFAST_ISA
