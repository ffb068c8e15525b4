// The fused ops in double, for gradient checks: the same loops over registers of one double.
#define AVFAST_ISA fp64
#define AVFAST_DOUBLE
#include "kernels.cpp"
