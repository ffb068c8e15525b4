// The solver for pairs of one size.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "buffer.h"
#include "kernels.h"
#include "params.h"
#include "pixel.h"
#include "pyramid.h"
#include "team.h"

namespace avfast::tvl1 {

// Border around the texels, in pixels: bicubic taps reach 3 past a point that may lie 2 outside the image.
constexpr int kTexelMargin = 5;
// A level of at most this size stays in a core's level 2 cache; an iteration then goes over the whole level at once.
constexpr int64_t kCacheBytes = 512 << 10;
// On a larger level so many iterations follow each other through the rows, while these are in a cache. 8 was the best
// of 1 to 10 for images of 320 x 240 to 1280 x 720, where it is 1.07 to 1.18 times as fast as 1.
constexpr int kDepth = 8;

// Solves pairs of one size, one at a time, and owns the memory for that. solve() is called by all members of a team at
// once.
class Workspace {
 public:
  Workspace(Size size, const Params& params, const Kernels& kernels)
      : params_(params),
        kernels_(kernels),
        levels_(make_levels(size, params)),
        images_(levels_, params.presmooth),
        fields_(params.solver == Solver::kZach && params.scheme == Scheme::kAvfast ? kBar1 : kFields),
        texels_((size.width + 2 * kTexelMargin) * static_cast<int64_t>(kTexelChannels) *
                (size.height + 2 * kTexelMargin)),
        coarse_(levels_.size() > 1 ? 2 * levels_[1].size.stride() * levels_[1].size.height : 0),
        // one row of room above the image and one below it
        state_((size.height + 2) * row_stride_of(size) + kMaxLanes) {}

  // a, b [height, width] -> flow [2, height, width]
  template <class Grey>
  void solve(const Grey* a, const Grey* b, float* flow, Member me) {
    me.team.barrier();
    images_.fill(a, b, me);
    const int coarsest = static_cast<int>(levels_.size()) - 1;
    for (int level = coarsest; level >= 0; --level) {
      if (level < coarsest) save_flow(level + 1, me);
      set_up_level(level, level == coarsest, me);
      solve_level(level, me);
    }
    const Size size = levels_[0].size;
    for (int c = 0; c < 2; ++c) {
      for (int y = me.begin(size.height); y < me.end(size.height); ++y) {
        std::copy_n(row(level_row(size, y), size, kU1 + c), size.width,
                    flow + (static_cast<int64_t>(c) * size.height + y) * size.width);
      }
    }
  }

 private:
  // Texels are the image and its central differences; at the border, half the one-sided difference. Around the image
  // the border is repeated, or all is 0.
  void fill_texels(const float* image, Size size, Member me) {
    const bool repeat = params_.scheme == Scheme::kAvfast;
    const int64_t stride = texel_stride(size);
    const int total = size.height + 2 * kTexelMargin;
    for (int i = me.begin(total); i < me.end(total); ++i) {
      const int y = i - kTexelMargin;
      float* texel = texels_.get() + i * stride;
      if (!repeat && (y < 0 || y >= size.height)) {
        std::fill_n(texel, stride, 0.0f);
        continue;
      }
      const int yc = std::clamp(y, 0, size.height - 1);
      const float* row = image + yc * size.stride();
      const float* above = image + std::max(yc - 1, 0) * size.stride();
      const float* below = image + std::min(yc + 1, size.height - 1) * size.stride();
      const auto put = [&](int x, int xc, int left, int right) {
        float* t = texel + (x + kTexelMargin) * kTexelChannels;
        t[0] = row[xc];
        t[1] = 0.5f * (row[right] - row[left]);
        t[2] = 0.5f * (below[xc] - above[xc]);
        t[3] = 0.0f;
      };
      const int last = size.width - 1;
      for (int x = 1; x < last; ++x) put(x, x, x - 1, x + 1);
      put(0, 0, 0, std::min(1, last));
      if (last > 0) put(last, last, last - 1, last);
      for (int k = 1; k <= kTexelMargin; ++k) {
        float* left = texel + (kTexelMargin - k) * kTexelChannels;
        float* right = texel + (kTexelMargin + last + k) * kTexelChannels;
        for (int c = 0; c < kTexelChannels; ++c) {
          left[c] = repeat ? texel[kTexelMargin * kTexelChannels + c] : 0.0f;
          right[c] = repeat ? texel[(kTexelMargin + last) * kTexelChannels + c] : 0.0f;
        }
      }
    }
  }

  // ---- the fields of one level ----

  static int64_t texel_stride(Size size) {
    return (size.width + 2 * kTexelMargin) * static_cast<int64_t>(kTexelChannels);
  }
  // The room before pixel 0 of a field is the room past the last pixel of the field before.
  static int64_t field_stride(Size size) { return size.stride() + kMaxLanes; }
  int64_t row_stride_of(Size size) const { return fields_ * field_stride(size); }
  // Pixel 0 of field 0 of row y, -1 <= y <= height.
  float* level_row(Size size, int y) { return state_.get() + (y + 1) * row_stride_of(size) + kMaxLanes; }
  static float* row(float* level_row, Size size, int field) { return level_row + field * field_stride(size); }

  // Saves the flow of a level; its memory is then laid out anew for the next finer level.
  void save_flow(int level, Member me) {
    const Size size = levels_[level].size;
    const int64_t area = size.stride() * size.height;
    for (int c = 0; c < 2; ++c) {
      for (int y = me.begin(size.height); y < me.end(size.height); ++y) {
        std::copy_n(row(level_row(size, y), size, kU1 + c), size.width, coarse_.get() + c * area + y * size.stride());
      }
    }
    me.team.barrier();
  }

  // The first guess of the flow: zero, or the flow of the next coarser level, whose values grow with the image. Duals
  // are zero, also in the row above the image.
  void set_up_level(int level, bool coarsest, Member me) {
    const Size size = levels_[level].size;
    for (int y = me.begin(size.height + 1) - 1; y < me.end(size.height + 1) - 1; ++y) {
      std::fill_n(level_row(size, y) - kMaxLanes, row_stride_of(size), 0.0f);
      if (coarsest || y < 0) continue;
      const Level& from = levels_[level + 1];
      const int64_t area = from.size.stride() * from.size.height;
      for (int c = 0; c < 2; ++c) {
        const float grow = c == 0 ? from.grow_u1 : from.grow_u2;
        resample_row(coarse_.get() + c * area, from.size, from.grow_y[y], from.grow_x, me.scratch);
        const float* in = me.scratch + from.size.stride();
        float* out = row(level_row(size, y), size, kU1 + c);
        for (int x = 0; x < size.width; ++x) out[x] = grow * in[x];
      }
    }
    fill_texels(images_.b(level), size, me);
    me.team.barrier();
  }

  void solve_level(int level, Member me) {
    const Size size = levels_[level].size;
    const bool median_first = params_.scheme == Scheme::kOpenCV;
    const float* texels = texels_.get() + kTexelMargin * (texel_stride(size) + kTexelChannels);
    const float* target = images_.a(level);
    const int warps = params_.warps_of(level, static_cast<int>(levels_.size()));
    for (int warp = 0; warp < warps; ++warp) {
      for (int y = me.begin(size.height); y < me.end(size.height); ++y) {
        kernels_.linearise_row({texels, texel_stride(size), target + y * size.stride(), level_row(size, y),
                                field_stride(size), y, size.width, size.height, median_first ? 2.0f : 0.0f,
                                !median_first});
      }
      bool converged = false;
      for (int outer = 0; !converged && outer < params_.outer_iterations; ++outer) {
        if (median_first) filter_flow(size, me);
        if (params_.epsilon > 0.0f) {
          converged = iterate_until_converged(size, me);
        } else {
          iterate(size, me);
        }
      }
      if (!median_first) filter_flow(size, me);
    }
  }

  static int steps(Size size) { return size.height + kDualLag; }
  // Steps begin .. end - 1 of an iteration (kernels.h).
  void step(Size size, int begin, int end, float* change) {
    const Iterate r{
        level_row(size, begin), row_stride_of(size), field_stride(size), size.width, size.height, begin, end, change};
    if (params_.solver == Solver::kZach) {
      kernels_.zach(r, Zach::of(params_));
    } else {
      kernels_.chambolle_pock(r, ChambollePock::of(params_));
    }
  }

  // All iterations, in sweeps of several at a time: iteration k + 1 does step y - kDualLag right after iteration k has
  // done step y, while the rows are still in the cache. The members of the team take turns with the sweeps; each sweep
  // runs a few rows behind the one before.
  void iterate(Size size, Member me) {
    const bool fits = row_stride_of(size) * size.height * static_cast<int64_t>(sizeof(float)) <= kCacheBytes;
    const int share = (params_.iterations + me.team.size() - 1) / me.team.size();
    const int depth = fits && me.team.size() == 1 ? 1 : std::min(kDepth, share);
    if (depth == 1 && me.team.size() == 1) {
      for (int i = 0; i < params_.iterations; ++i) step(size, 0, steps(size), nullptr);
      return;
    }
    const int sweeps = (params_.iterations + depth - 1) / depth;
    const int fronts = steps(size) + (depth - 1) * kDualLag;  // all of the first iteration, then of the last
    me.team.reset_progress(me.rank);
    me.team.barrier();
    for (int sweep = me.rank; sweep < sweeps; sweep += me.team.size()) {
      const int count = std::min(depth, params_.iterations - sweep * depth);
      const int64_t mine = static_cast<int64_t>(sweep / me.team.size()) * fronts;
      const int before = (sweep - 1) % me.team.size();
      const int64_t theirs = static_cast<int64_t>((sweep - 1) / me.team.size()) * fronts;
      for (int front = 0; front < fronts; ++front) {
        if (me.team.size() > 1 && sweep > 0) {
          me.team.wait_for_progress(before, theirs + std::min(front + depth * kDualLag + 1, fronts));
        }
        for (int k = 0; k < count; ++k) {
          const int y = front - k * kDualLag;
          if (y >= 0 && y < steps(size)) step(size, y, y + 1, nullptr);
        }
        if (me.team.size() > 1) me.team.publish_progress(me.rank, mine + front + 1);
      }
    }
    me.team.barrier();
  }

  // Iterations until one changes the flow by no more than epsilon; returns whether that happened. For teams of one.
  bool iterate_until_converged(Size size, Member me) {
    const double limit = static_cast<double>(params_.epsilon) * params_.epsilon * size.height * size.width;
    for (int i = 0; i < params_.iterations; ++i) {
      double total = 0.0;
      for (int y = 0; y < steps(size); ++y) {
        step(size, y, y + 1, me.scratch);
        if (y < size.height) {
          // four partial sums in a fixed order: the same for every instruction set
          double sums[4] = {};
          for (int x = 0; x < size.width; ++x) sums[x % 4] += static_cast<double>(me.scratch[x]);
          total += (sums[0] + sums[1]) + (sums[2] + sums[3]);
        }
      }
      if (!(total > limit)) return true;
    }
    return false;
  }

  // A filtered row is kept in the memory of the extrapolated flow, or of the data term; both are made anew after it.
  float* filtered_row(Size size, int y, int c) {
    return row(level_row(size, y), size, (fields_ == kFields ? kBar1 : kIx) + c);
  }

  void filter_flow(Size size, Member me) {
    const int side = params_.median;
    if (side == 1) return;
    const int reach = side / 2;
    for (int y = me.begin(size.height); y < me.end(size.height); ++y) {
      for (int c = 0; c < 2; ++c) {
        float* u = row(level_row(size, y), size, kU1 + c);
        for (int k = 1; k <= reach; ++k) {
          u[-k] = u[0];
          u[size.width - 1 + k] = u[size.width - 1];
        }
      }
    }
    me.team.barrier();
    for (int y = me.begin(size.height); y < me.end(size.height); ++y) {
      for (int c = 0; c < 2; ++c) {
        const float* rows[5];
        for (int j = 0; j < side; ++j) {
          rows[j] = row(level_row(size, std::clamp(y + j - reach, 0, size.height - 1)), size, kU1 + c);
        }
        kernels_.median_row({rows, me.scratch, filtered_row(size, y, c), side, size.width});
      }
    }
    me.team.barrier();
    for (int y = me.begin(size.height); y < me.end(size.height); ++y) {
      for (int c = 0; c < 2; ++c) {
        std::copy_n(filtered_row(size, y, c), size.width, row(level_row(size, y), size, kU1 + c));
      }
    }
    me.team.barrier();
  }

  const Params params_;
  const Kernels& kernels_;
  const std::vector<Level> levels_;  // finest first
  Pyramid images_;
  const int fields_;
  Buffer texels_, coarse_, state_;
};

}  // namespace avfast::tvl1
