// Linear maps between pixel grids, one axis at a time, and the sizes of a pyramid; the CPU's and the GPU's engine use
// them.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

#ifdef __CUDACC__
#define AVFAST_BOTH __host__ __device__
#else
#define AVFAST_BOTH
#endif

namespace avfast {

// One axis of a linear map between two grids: the source pixels, at most three, of one target pixel.
struct Tap {
  int index[3];
  float weight[3];
};

// The source pixels of pixel `i` in an area average from `from` to `to` pixels, where `to` is at least half of `from`.
AVFAST_BOTH inline Tap area_tap(int i, int from, int to) {
  // in units of 1/to of a source pixel everything is an integer
  const int64_t begin = static_cast<int64_t>(i) * from;
  const int64_t end = begin + from;
  Tap tap{};
  for (int k = 0; k < 3; ++k) {
    const int64_t source = begin / to + k;
    const int64_t first = source * to > begin ? source * to : begin;
    const int64_t last = (source + 1) * to < end ? (source + 1) * to : end;
    tap.index[k] = static_cast<int>(source < from ? source : from - 1);
    tap.weight[k] = static_cast<float>(last > first ? last - first : 0) / static_cast<float>(from);
  }
  return tap;
}

// The source pixels of pixel `i` in a bilinear interpolation at every `ratio` of `from` pixels. Pixel centres are at
// half integers, and the border is repeated.
AVFAST_BOTH inline Tap linear_tap(int i, int from, float ratio) {
  const float centre = (static_cast<float>(i) + 0.5f) * ratio - 0.5f;
  const float inside = centre > 0.0f ? centre : 0.0f;
  const float last = static_cast<float>(from - 1);
  const float position = inside < last ? inside : last;
  const int index = static_cast<int>(position);
  const float weight = position - static_cast<float>(index);
  return {{index, index + 1 < from ? index + 1 : from - 1, index}, {1.0f - weight, weight, 0.0f}};
}

inline std::vector<Tap> area_taps(int from, int to) {
  std::vector<Tap> taps(to);
  for (int i = 0; i < to; ++i) taps[i] = area_tap(i, from, to);
  return taps;
}

inline std::vector<Tap> linear_taps(int from, int to, float ratio) {
  std::vector<Tap> taps(to);
  for (int i = 0; i < to; ++i) taps[i] = linear_tap(i, from, ratio);
  return taps;
}

// The pyramid ends before the shorter side falls below this many pixels.
constexpr int kMinSide = 16;

// Computes the size of the next coarser pyramid level, `step` times as large; returns false where there is none.
inline bool coarser(float step, int height, int width, int* coarse_height, int* coarse_width) {
  const auto scaled = [step](int n) { return static_cast<int>(std::floor(n * static_cast<double>(step) + 0.5)); };
  *coarse_height = scaled(height);
  *coarse_width = scaled(width);
  return std::min(*coarse_height, *coarse_width) >= kMinSide && *coarse_height < height && *coarse_width < width;
}

// The weights of a Gaussian over three standard deviations each way; their sum is 1.
inline std::vector<float> gaussian(float sigma) {
  const int radius = static_cast<int>(std::ceil(3.0 * sigma));
  std::vector<double> weights(2 * radius + 1);
  double sum = 0.0;
  for (int i = -radius; i <= radius; ++i) {
    sum += weights[i + radius] = std::exp(-0.5 * i * i / (static_cast<double>(sigma) * sigma));
  }
  std::vector<float> kernel;
  for (const double weight : weights) kernel.push_back(static_cast<float>(weight / sum));
  return kernel;
}

}  // namespace avfast
