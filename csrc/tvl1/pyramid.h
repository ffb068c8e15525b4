// The pyramid: sizes of its levels, and both images of a pair at every level.
#pragma once

#include <algorithm>
#include <cstdint>
#include <utility>
#include <vector>

#include "buffer.h"
#include "kernels.h"
#include "params.h"
#include "resample.h"
#include "team.h"

namespace avfast::tvl1 {

struct Size {
  int height, width;
  int64_t stride() const { return round_up(width, kMaxLanes); }
};

// Floats of scratch memory that a thread needs for images of that size: five rows, for the median.
inline int64_t scratch_size(Size size) { return 5 * (size.width + 2 * kMaxLanes); }

struct Level {
  Size size;
  // from the next finer level to this one, and back
  std::vector<Tap> shrink_x, shrink_y, grow_x, grow_y;
  float grow_u1, grow_u2;
};

inline std::vector<Level> make_levels(Size size, const Params& params) {
  std::vector<Level> levels(1);
  levels[0].size = size;
  while (static_cast<int>(levels.size()) < params.scales) {
    const Size fine = levels.back().size;
    Level level;
    Size& coarse = level.size;
    if (!coarser(params.scale_step, fine.height, fine.width, &coarse.height, &coarse.width)) break;
    const float ratio_x = static_cast<float>(coarse.width) / static_cast<float>(fine.width);
    const float ratio_y = static_cast<float>(coarse.height) / static_cast<float>(fine.height);
    if (params.scheme == Scheme::kOpenCV) {
      // sampled at the step asked for, not at the ratio of the rounded sizes
      level.shrink_x = linear_taps(fine.width, coarse.width, 1.0f / params.scale_step);
      level.shrink_y = linear_taps(fine.height, coarse.height, 1.0f / params.scale_step);
      level.grow_u1 = level.grow_u2 = 1.0f / params.scale_step;
    } else {
      level.shrink_x = area_taps(fine.width, coarse.width);
      level.shrink_y = area_taps(fine.height, coarse.height);
      level.grow_u1 = 1.0f / ratio_x;
      level.grow_u2 = 1.0f / ratio_y;
    }
    level.grow_x = linear_taps(coarse.width, fine.width, ratio_x);
    level.grow_y = linear_taps(coarse.height, fine.height, ratio_y);
    levels.push_back(std::move(level));
  }
  return levels;
}

// Writes one row of a resampled image to scratch + size.stride(): first the sum of the rows under it, then along the
// row.
inline void resample_row(const float* image, Size size, const Tap& tap_y, const std::vector<Tap>& taps_x,
                         float* scratch) {
  const float* rows[3];
  for (int k = 0; k < 3; ++k) rows[k] = image + tap_y.index[k] * size.stride();
  const auto [w0, w1, w2] = tap_y.weight;
  for (int x = 0; x < size.width; ++x) scratch[x] = w0 * rows[0][x] + w1 * rows[1][x] + w2 * rows[2][x];
  float* out = scratch + size.stride();
  for (const Tap& t : taps_x) {
    *out++ = t.weight[0] * scratch[t.index[0]] + t.weight[1] * scratch[t.index[1]] + t.weight[2] * scratch[t.index[2]];
  }
}

// The calls of fill() are made by all members of a team at once.
class Pyramid {
 public:
  // `levels` has to outlive the pyramid.
  Pyramid(const std::vector<Level>& levels, float presmooth) : levels_(levels) {
    const Size size = levels[0].size;
    if (presmooth > 0.0f) {
      kernel_ = gaussian(presmooth);
      smoothed_.emplace_back(size.stride() * size.height + kMaxLanes);
    }
    for (const Level& level : levels) {
      const int64_t area = level.size.stride() * level.size.height + kMaxLanes;
      a_.emplace_back(area);
      b_.emplace_back(area);
    }
  }

  // The images a and b [height, width] at a level, each row size.stride() floats after the one before.
  const float* a(int level) const { return a_[level].get(); }
  const float* b(int level) const { return b_[level].get(); }

  template <class Grey>
  void fill(const Grey* a, const Grey* b, Member me) {
    fill_levels(a, a_, me);
    fill_levels(b, b_, me);
    me.team.barrier();
  }

 private:
  template <class Grey>
  void fill_levels(const Grey* image, const std::vector<Buffer>& levels, Member me) {
    const Size size = levels_[0].size;
    if (kernel_.empty()) {
      for (int y = me.begin(size.height); y < me.end(size.height); ++y) {
        std::copy_n(image + static_cast<int64_t>(y) * size.width, size.width, levels[0].get() + y * size.stride());
      }
    } else {
      smooth(image, levels[0].get(), me);
    }
    for (size_t i = 1; i < levels_.size(); ++i) {
      me.team.barrier();
      const Size fine = levels_[i - 1].size;
      const Size coarse = levels_[i].size;
      for (int y = me.begin(coarse.height); y < me.end(coarse.height); ++y) {
        resample_row(levels[i - 1].get(), fine, levels_[i].shrink_y[y], levels_[i].shrink_x, me.scratch);
        std::copy_n(me.scratch + fine.stride(), coarse.width, levels[i].get() + y * coarse.stride());
      }
    }
  }

  // Separable Gaussian; the border is repeated.
  template <class Grey>
  void smooth(const Grey* image, float* out, Member me) {
    const Size size = levels_[0].size;
    const int radius = static_cast<int>(kernel_.size()) / 2;
    float* along = smoothed_[0].get();
    for (int y = me.begin(size.height); y < me.end(size.height); ++y) {
      // the row as floats; scratch has room for the largest radius, 30, on both sides of it
      float* from = me.scratch + radius;
      std::copy_n(image + static_cast<int64_t>(y) * size.width, size.width, from);
      std::fill_n(me.scratch, radius, from[0]);
      std::fill_n(from + size.width, radius, from[size.width - 1]);
      float* to = along + y * size.stride();
      std::fill_n(to, size.width, 0.0f);
      for (int k = -radius; k <= radius; ++k) {
        for (int x = 0; x < size.width; ++x) to[x] += kernel_[k + radius] * from[x + k];
      }
    }
    me.team.barrier();
    for (int y = me.begin(size.height); y < me.end(size.height); ++y) {
      float* to = out + y * size.stride();
      std::fill_n(to, size.width, 0.0f);
      for (int k = -radius; k <= radius; ++k) {
        const float* from = along + std::clamp(y + k, 0, size.height - 1) * size.stride();
        for (int x = 0; x < size.width; ++x) to[x] += kernel_[k + radius] * from[x];
      }
    }
    // the next image uses the same memory
    me.team.barrier();
  }

  const std::vector<Level>& levels_;
  std::vector<float> kernel_;
  std::vector<Buffer> smoothed_, a_, b_;
};

}  // namespace avfast::tvl1
