// The fused ops, compiled once per instruction set (setup.py) and once for double (fp64.cpp). See simd.h for what must
// not be used here.
#include "ops.h"

#ifdef AVFAST_DOUBLE
#include "double.h"
#else
#include "../common/simd.h"
namespace avfast::AVFAST_ISA {
using Wide = Vec2;
}
#endif

#define AVFAST_LOOPS
#define AVFAST_OP(name, ...)
#include "ops.def"
#undef AVFAST_OP
#undef AVFAST_LOOPS

namespace avfast::AVFAST_ISA {

extern const fused::Ops<Vec::Scalar> kOps = {
#define AVFAST_OP(name, ...) name,
#include "ops.def"
#undef AVFAST_OP
};

}  // namespace avfast::AVFAST_ISA
