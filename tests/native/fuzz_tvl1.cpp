// Random inputs through the CPU's engine of TV-L1, built with AddressSanitizer and UBSan: fuzz_tvl1 COUNT SEED
//
// Images end where their memory ends, so that a read past them is seen. Finite images must give a finite flow. NaN,
// infinite and huge values, which avfast.tvl1_flow refuses, must only do no harm.
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <limits>
#include <memory>
#include <random>
#include <vector>

#include "../../csrc/common/isa.h"
#include "../../csrc/tvl1/flow.h"

using namespace avfast::tvl1;

namespace {

std::mt19937 engine;

int pick(int low, int high) { return std::uniform_int_distribution<int>(low, high)(engine); }
float real(float low, float high) { return std::uniform_real_distribution<float>(low, high)(engine); }

// Fills an image with values of a kind; returns whether the engine has to accept them.
bool fill(float* image, int64_t size, int kind) {
  const float level = real(0, 255);
  for (int64_t i = 0; i < size; ++i) {
    switch (kind) {
      case 0:
        image[i] = real(0, 255);
        break;
      case 1:
        image[i] = level;
        break;
      case 2:
        image[i] = 0;
        break;
      case 3:
        image[i] = pick(0, 9) == 0 ? 255.0f : 0.0f;
        break;
      case 4:
        image[i] = pick(0, 20) == 0 ? std::numeric_limits<float>::quiet_NaN() : level;
        break;
      case 5:
        image[i] = pick(0, 20) == 0 ? std::numeric_limits<float>::infinity() : level;
        break;
      default:
        image[i] = real(-1, 1) * std::numeric_limits<float>::max();
        break;
    }
  }
  return kind < 4;
}

}  // namespace

int main(int argc, char** argv) {
  const long count = argc > 1 ? std::atol(argv[1]) : 1000;
  engine.seed(argc > 2 ? static_cast<unsigned>(std::atol(argv[2])) : 0);
  const std::vector<const char*> sets = avfast::instruction_sets();
  for (long n = 0; n < count; ++n) {
    // mostly small, some long and thin, a few large enough to be shared out by rows
    const bool large = pick(0, 40) == 0;
    const int height = large ? pick(100, 200) : pick(1, 70);
    const int width = large ? pick(192, 200) : pick(0, 9) == 0 ? pick(1, 200) : pick(1, 70);
    const int64_t pairs = pick(1, 3);
    Params params;
    params.solver = pick(0, 1) ? Solver::kZach : Solver::kChambollePock;
    params.scheme = pick(0, 1) ? Scheme::kAvfast : Scheme::kOpenCV;
    params.scale_step = real(0.5f, 0.95f);
    params.scales = pick(1, 6);
    params.warps = pick(1, 2);
    params.coarse_warps = pick(0, 2);
    params.outer_iterations = pick(1, 2);
    params.iterations = pick(1, 5);
    params.epsilon = pick(0, 3) == 0 ? 0.01f : 0.0f;
    params.median = 2 * pick(0, 2) + 1;
    params.presmooth = pick(0, 3) == 0 ? real(0.1f, 3.0f) : 0.0f;
    const int64_t area = static_cast<int64_t>(height) * width;
    const std::unique_ptr<float[]> a(new float[pairs * area]), b(new float[pairs * area]),
        flow_(new float[2 * pairs * area]);
    const bool good = fill(a.get(), pairs * area, pick(0, 6)) & fill(b.get(), pairs * area, pick(0, 6));
    const char* isa = sets[pick(0, static_cast<int>(sets.size()) - 1)];
    setenv("AVFAST_ISA", isa, 1);
    if (good && pick(0, 3) == 0) {
      const std::vector<uint8_t> bytes_a(a.get(), a.get() + pairs * area), bytes_b(b.get(), b.get() + pairs * area);
      flow(bytes_a.data(), bytes_b.data(), flow_.get(), pairs, height, width, params, pick(1, 4));
    } else {
      flow(a.get(), b.get(), flow_.get(), pairs, height, width, params, pick(1, 4));
    }
    for (int64_t i = 0; good && i < 2 * pairs * area; ++i) {
      if (!std::isfinite(flow_[i])) {
        std::printf("input %ld, %dx%d, %s: flow is not finite\n", n, width, height, isa);
        return 1;
      }
    }
  }
  std::printf("%ld inputs\n", count);
}
