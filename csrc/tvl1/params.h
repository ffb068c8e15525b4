// The struct of the parameters that params.def lists.
#pragma once

namespace avfast::tvl1 {

enum class Solver { kZach, kChambollePock };
enum class Scheme { kAvfast, kOpenCV };

// Their names in Python, in the order of the values.
constexpr const char* kSolverNames[] = {"zach", "chambolle-pock"};
constexpr const char* kSchemeNames[] = {"avfast", "opencv"};

struct Params {
#define AVFAST_PARAM(type, name, value, needed) type name = value;
#include "params.def"
#undef AVFAST_PARAM

  // Linearisations of level number `level` of `levels`, of which 0 is the finest.
  int warps_of(int level, int levels) const {
    return coarse_warps > 0 && (level > 0 || levels == 1) ? coarse_warps : warps;
  }
};

}  // namespace avfast::tvl1
