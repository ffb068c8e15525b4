// The arithmetic of TV-L1 for one pixel, without loops and memory, written once for both engines: F is float under
// nvcc, and a register of floats (simd.h) on the CPU. F needs + - *, min, max, sqrt, reciprocal and where_above.
//
// Contraction is off (setup.py) and every operation is exactly rounded, so that all instruction sets and the GPU give
// the same bits. Less exactness shows in the result: noise of 3e-7 moves 11 % of the flow by more than 1e-3 px where a
// point may leave the image, and a GPU with multiply-adds and its one-instruction roots agreed within 1e-3 px on 35 to
// 100 % of the pixels.
#pragma once

#include "params.h"

#ifdef __CUDACC__
#define AVFAST_HD __device__ __forceinline__
#else
// a function that is not inlined would be compiled for one instruction set and used by all
#define AVFAST_HD inline __attribute__((always_inline))
#endif

namespace avfast::tvl1 {

template <class F>
AVFAST_HD F clamp(F x, F low, F high) {
  return min(max(x, low), high);
}

// The weights of the four taps at -1, 0, 1, 2 for a point `t` in [0, 1) after tap 0: cubic convolution (Keys 1981) with
// a = -0.75, as in OpenCV. The mean end-point error over four Middlebury pairs is 0.273 px with it, 0.291 with a =
// -0.5.
template <class F>
struct CubicWeights {
  F w[4];
};

template <class F>
AVFAST_HD CubicWeights<F> cubic_weights(F t) {
  return {{((F(-0.75f) * t + F(1.5f)) * t - F(0.75f)) * t, (F(1.25f) * t - F(2.25f)) * t * t + F(1.0f),
           ((F(-1.25f) * t + F(1.5f)) * t + F(0.75f)) * t, (F(0.75f) * t - F(0.75f)) * t * t}};
}

// Brightness constancy, linearised at the flow that was used for warping: rho(u) = rho_c + ix u1 + iy u2.
template <class F>
struct DataTerm {
  F ix, iy, rho_c, inv_grad;
};

// `inside` is 0 where the data term is off because the warped point is unknown, else 1. inv_grad is -1/|grad|^2, or 0
// where the gradient vanishes; the step below is then 0 without a branch.
template <class F>
AVFAST_HD DataTerm<F> linearise(F warped, F warped_dx, F warped_dy, F target, F u1, F u2, F inside) {
  const F ix = warped_dx * inside;
  const F iy = warped_dy * inside;
  const F grad = ix * ix + iy * iy;
  const F rho_c = (warped - target) * inside - ix * u1 - iy * u2;
  return {ix, iy, rho_c, where_above(grad, F(1e-9f), F(0.0f) - reciprocal(grad))};
}

// The minimiser over v of limit |rho(v)| + |v - u|^2 / 2, as the multiple of (ix, iy) to add to u: the three-case
// threshold of Zach et al. (2007), Eq. 11, written as a clamp.
template <class F>
AVFAST_HD F threshold_step(const DataTerm<F>& d, F u1, F u2, F limit) {
  const F rho = d.rho_c + d.ix * u1 + d.iy * u2;
  return clamp(rho * d.inv_grad, F(0.0f) - limit, limit);
}

// What one iteration reads and writes of a pixel. The duals are stored scaled, by theta or by the primal step tau, so
// that the primal step can add their divergence without a factor.
template <class F>
struct Flow2 {
  F u1, u2;
};
template <class F>
struct Dual4 {
  F q11, q12, q21, q22;
};

// The dual step in two parts, so that other work can be done while the roots are computed: a step upwards, then the
// division by the norms, which are `norm(root)` of the solver.
template <class F>
struct Ascended {
  F root1, root2;  // first here and in the making: they take longest
  Dual4<F> q;
};

// The two components share one division, which is the slowest instruction here.
template <class F, class Solver>
AVFAST_HD Dual4<F> project(const Solver& solver, const Ascended<F>& a) {
  const F norm1 = solver.norm(a.root1);
  const F norm2 = solver.norm(a.root2);
  const F both = reciprocal(norm1 * norm2);
  const F scale1 = norm2 * both;
  const F scale2 = norm1 * both;
  return {a.q.q11 * scale1, a.q.q12 * scale1, a.q.q21 * scale2, a.q.q22 * scale2};
}

// Zach et al. (2007): v = threshold(u), u = v + theta div p.
struct Zach {
  float limit;           // lambda theta
  float tau;             // tau
  float tau_over_theta;  // tau / theta
  static constexpr bool kExtrapolates = false;

  static Zach of(const Params& p) { return {p.lambda_ * p.theta, p.tau, p.tau / p.theta}; }

  template <class F>
  AVFAST_HD Flow2<F> primal(Flow2<F> u, const DataTerm<F>& d, F div1, F div2) const {
    const F step = threshold_step(d, u.u1, u.u2, F(limit));
    return {u.u1 + step * d.ix + div1, u.u2 + step * d.iy + div2};
  }

  // The field whose gradient drives the dual: the flow itself, or an extrapolated flow that is kept beside it.
  template <class F>
  AVFAST_HD static Flow2<F> driver(Flow2<F> next, Flow2<F>) {
    return next;
  }

  // Chambolle (2004): p = (p + tau/theta grad u) / (1 + tau/theta |grad u|), with q = theta p.
  template <class F>
  AVFAST_HD Ascended<F> ascend(Dual4<F> q, F g11, F g12, F g21, F g22) const {
    return {sqrt(g11 * g11 + g12 * g12),
            sqrt(g21 * g21 + g22 * g22),
            {q.q11 + F(tau) * g11, q.q12 + F(tau) * g12, q.q21 + F(tau) * g21, q.q22 + F(tau) * g22}};
  }

  template <class F>
  AVFAST_HD F norm(F root) const {
    return F(1.0f) + F(tau_over_theta) * root;
  }
};

// Chambolle and Pock (2011), algorithm 1, on the energy itself: u' = prox(u + tau div p), then the projected step of
// the dual at 2 u' - u, with q = tau p and tau sigma = 1/8, the largest product that converges for forward differences.
struct ChambollePock {
  float limit;    // lambda tau
  float inv_tau;  // 1 / tau
  static constexpr bool kExtrapolates = true;

  static ChambollePock of(const Params& p) { return {p.lambda_ * p.tau, 1.0f / p.tau}; }

  template <class F>
  AVFAST_HD Flow2<F> primal(Flow2<F> u, const DataTerm<F>& d, F div1, F div2) const {
    const F w1 = u.u1 + div1;
    const F w2 = u.u2 + div2;
    const F step = threshold_step(d, w1, w2, F(limit));
    return {w1 + step * d.ix, w2 + step * d.iy};
  }

  template <class F>
  AVFAST_HD static Flow2<F> driver(Flow2<F> next, Flow2<F> old) {
    return {next.u1 + (next.u1 - old.u1), next.u2 + (next.u2 - old.u2)};
  }

  template <class F>
  AVFAST_HD Ascended<F> ascend(Dual4<F> q, F g11, F g12, F g21, F g22) const {
    const F x1 = q.q11 + F(0.125f) * g11;
    const F y1 = q.q12 + F(0.125f) * g12;
    const F x2 = q.q21 + F(0.125f) * g21;
    const F y2 = q.q22 + F(0.125f) * g22;
    return {sqrt(x1 * x1 + y1 * y1), sqrt(x2 * x2 + y2 * y2), {x1, y1, x2, y2}};
  }

  template <class F>
  AVFAST_HD F norm(F root) const {
    return max(F(inv_tau) * root, F(1.0f));
  }
};

}  // namespace avfast::tvl1
