#include "tvl1.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdlib>
#include <memory>
#include <mutex>
#include <new>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "isa.h"
#include "resample.h"
#include "threads.h"
#include "tvl1_kernels.h"
#include "tvl1_pixel.h"

namespace avfast::tvl1 {
namespace {

// border around the texels: bicubic taps reach 3 past a point that may lie 2 outside the image.
constexpr int kTexelMargin = 5;
// rows of one pair are shared out only from this many pixels on; below, waiting for each other costs more.
constexpr int64_t kTeamArea = 160 * 120;
constexpr int kTeamRows = 32;
// a level that is no larger stays in a core's level 2 cache, and is iterated over as a whole.
constexpr int64_t kCacheBytes = 512 << 10;
// of larger ones so many iterations follow each other through the rows, while these are in a cache: of 1 to 10 the best
// from 320 x 240 to 1280 x 720, where it is 1.07 to 1.18 times as fast as 1.
constexpr int kDepth = 8;

int64_t round_up(int64_t n, int64_t unit) { return (n + unit - 1) / unit * unit; }

// floats on a cache line of their own, all finite. A thread keeps the memory of its last buffers for its next: fresh
// memory costs page faults, for a 64 x 64 pair a tenth of all time.
class Buffer {
 public:
  explicit Buffer(int64_t size) : size_(round_up(size + 1, 64 / sizeof(float))), data_(take(size_)) {}
  Buffer(Buffer&& other) noexcept : size_(other.size_), data_(std::move(other.data_)) {}
  ~Buffer() {
    if (data_ && kept().floats + size_ <= kMostKept) {
      kept().floats += size_;
      kept().buffers.emplace_back(size_, std::move(data_));
    }
  }
  float* get() const { return data_.get(); }

 private:
  struct Free {
    void operator()(float* p) const { std::free(p); }
  };
  using Memory = std::unique_ptr<float, Free>;
  struct Kept {
    int64_t floats = 0;
    std::vector<std::pair<int64_t, Memory>> buffers;
  };
  static constexpr int64_t kMostKept = 4 << 20;

  static Kept& kept() {
    thread_local Kept buffers;
    return buffers;
  }
  static Memory take(int64_t size) {
    auto& buffers = kept().buffers;
    const auto same = std::find_if(buffers.begin(), buffers.end(), [&](const auto& b) { return b.first == size; });
    if (same != buffers.end()) {
      Memory memory = std::move(same->second);
      buffers.erase(same);
      kept().floats -= size;
      return memory;
    }
    Memory memory(static_cast<float*>(std::aligned_alloc(64, size * sizeof(float))));
    if (!memory) throw std::bad_alloc();
    std::fill_n(memory.get(), size, 0.0f);
    return memory;
  }

  int64_t size_;
  Memory data_;
};

struct Size {
  int height, width;
  int64_t stride() const { return round_up(width, kMaxLanes); }
};

// one thread's place in a team, and the memory that is its own.
struct Member {
  Team& team;
  int rank;
  float* scratch;

  // this member's share of `rows` rows.
  int begin(int rows) const { return static_cast<int>(static_cast<int64_t>(rows) * rank / team.size()); }
  int end(int rows) const { return static_cast<int>(static_cast<int64_t>(rows) * (rank + 1) / team.size()); }
};

int64_t scratch_size(Size size) { return 5 * (size.width + 2 * kMaxLanes); }

// solves pairs of one size, one at a time; owns all the memory that takes. Every public call is made by all members of
// a team at once.
class Workspace {
 public:
  Workspace(Size size, const Params& params, const Kernels& kernels)
      : params_(params),
        kernels_(kernels),
        levels_(make_levels(size, params)),
        fields_(params.solver == Solver::kZach && params.scheme == Scheme::kAvfast ? kBar1 : kFields),
        texels_((size.width + 2 * kTexelMargin) * static_cast<int64_t>(kTexelChannels) *
                (size.height + 2 * kTexelMargin)),
        coarse_(levels_.size() > 1 ? 2 * levels_[1].size.stride() * levels_[1].size.height : 0),
        // one row of room above the image and one below it
        state_((size.height + 2) * row_stride_of(size) + kMaxLanes) {
    if (params.presmooth > 0.0f) {
      kernel_ = gaussian(params.presmooth);
      smoothed_.emplace_back(size.stride() * size.height + kMaxLanes);
    }
    for (const Level& level : levels_) {
      const int64_t area = level.size.stride() * level.size.height + kMaxLanes;
      a_.emplace_back(area);
      b_.emplace_back(area);
    }
  }

  // a, b [height, width] -> flow [2, height, width]
  template <class Grey>
  void solve(const Grey* a, const Grey* b, float* flow, Member me) {
    me.team.barrier();
    fill_pyramid(a, a_, me);
    fill_pyramid(b, b_, me);
    me.team.barrier();
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
  struct Level {
    Size size;
    // from the next finer level to this one, and back
    std::vector<Tap> shrink_x, shrink_y, grow_x, grow_y;
    float grow_u1, grow_u2;
  };

  static std::vector<Level> make_levels(Size size, const Params& params) {
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

  // ---- images ----

  template <class Grey>
  void fill_pyramid(const Grey* image, std::vector<Buffer>& pyramid, Member me) {
    const Size size = levels_[0].size;
    if (kernel_.empty()) {
      for (int y = me.begin(size.height); y < me.end(size.height); ++y) {
        std::copy_n(image + static_cast<int64_t>(y) * size.width, size.width, pyramid[0].get() + y * size.stride());
      }
    } else {
      smooth(image, pyramid[0].get(), me);
    }
    for (size_t i = 1; i < levels_.size(); ++i) {
      me.team.barrier();
      const Size fine = levels_[i - 1].size;
      const Size coarse = levels_[i].size;
      for (int y = me.begin(coarse.height); y < me.end(coarse.height); ++y) {
        resample_row(pyramid[i - 1].get(), fine, levels_[i].shrink_y[y], levels_[i].shrink_x, me.scratch);
        std::copy_n(me.scratch + fine.stride(), coarse.width, pyramid[i].get() + y * coarse.stride());
      }
    }
  }

  // one row of a resampled image, into scratch + size.stride(): the rows under it first, then along the row.
  static void resample_row(const float* image, Size size, const Tap& tap_y, const std::vector<Tap>& taps_x,
                           float* scratch) {
    const float* rows[3];
    for (int k = 0; k < 3; ++k) rows[k] = image + tap_y.index[k] * size.stride();
    const auto [w0, w1, w2] = tap_y.weight;
    for (int x = 0; x < size.width; ++x) scratch[x] = w0 * rows[0][x] + w1 * rows[1][x] + w2 * rows[2][x];
    float* out = scratch + size.stride();
    for (const Tap& t : taps_x) {
      *out++ =
          t.weight[0] * scratch[t.index[0]] + t.weight[1] * scratch[t.index[1]] + t.weight[2] * scratch[t.index[2]];
    }
  }

  // a row as floats, in scratch where it is not.
  static const float* as_floats(const float* row, int, float*) { return row; }
  static const float* as_floats(const uint8_t* row, int width, float* scratch) {
    std::copy_n(row, width, scratch);
    return scratch;
  }

  // separable Gaussian, borders repeated.
  template <class Grey>
  void smooth(const Grey* image, float* out, Member me) {
    const Size size = levels_[0].size;
    const int radius = static_cast<int>(kernel_.size()) / 2;
    float* along = smoothed_[0].get();
    for (int y = me.begin(size.height); y < me.end(size.height); ++y) {
      const float* from = as_floats(image + static_cast<int64_t>(y) * size.width, size.width, me.scratch);
      float* to = along + y * size.stride();
      const auto at_border = [&](int x) {
        float sum = 0.0f;
        for (int k = -radius; k <= radius; ++k) sum += kernel_[k + radius] * from[std::clamp(x + k, 0, size.width - 1)];
        to[x] = sum;
      };
      const int inner = std::min(radius, size.width);
      const int end = std::max(size.width - radius, inner);
      for (int x = 0; x < inner; ++x) at_border(x);
      for (int x = end; x < size.width; ++x) at_border(x);
      std::fill(to + inner, to + end, 0.0f);
      for (int k = -radius; k <= radius; ++k) {
        for (int x = inner; x < end; ++x) to[x] += kernel_[k + radius] * from[x + k];
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

  // image and central differences; at the border, half the one-sided difference. Around it the border is repeated, or
  // all is 0.
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
  // room before pixel 0 of a field is the room past the last pixel of the field before.
  static int64_t field_stride(Size size) { return size.stride() + kMaxLanes; }
  int64_t row_stride_of(Size size) const { return fields_ * field_stride(size); }
  // pixel 0 of field 0 of row y, -1 <= y <= height
  float* level_row(Size size, int y) { return state_.get() + (y + 1) * row_stride_of(size) + kMaxLanes; }
  static float* row(float* level_row, Size size, int field) { return level_row + field * field_stride(size); }

  // keeps the flow of a level while its memory is laid out anew for the next finer one.
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

  // the first guess of the flow: zero, or the flow of the next coarser level, its values grown with the image. Duals of
  // zero, also in the row above the image.
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
    fill_texels(b_[level].get(), size, me);
    me.team.barrier();
  }

  void solve_level(int level, Member me) {
    const Size size = levels_[level].size;
    const bool median_first = params_.scheme == Scheme::kOpenCV;
    const float* texels = texels_.get() + kTexelMargin * (texel_stride(size) + kTexelChannels);
    const float* target = a_[level].get();
    const int warps = params_.warps_of(level, static_cast<int>(levels_.size()));
    for (int warp = 0; warp < warps; ++warp) {
      for (int y = me.begin(size.height); y < me.end(size.height); ++y) {
        kernels_.linearise_row({texels, texel_stride(size), target + y * size.stride(), level_row(size, y),
                                field_stride(size), y, size.width, size.height, median_first ? 2.0f : 0.0f,
                                !median_first});
      }
      bool moving = true;
      for (int outer = 0; moving && outer < params_.outer_iterations; ++outer) {
        if (median_first) filter_flow(size, me);
        moving = params_.epsilon > 0.0f ? iterate_until_still(size, me) : iterate(size, me);
      }
      if (!median_first) filter_flow(size, me);
    }
  }

  static int steps(Size size) { return size.height + kDualLag; }
  // steps begin .. end - 1 of an iteration.
  void step(Size size, int begin, int end, float* change) {
    const Iterate r{
        level_row(size, begin), row_stride_of(size), field_stride(size), size.width, size.height, begin, end, change};
    if (params_.solver == Solver::kZach) {
      kernels_.zach(r, {params_.lambda * params_.theta, params_.tau, params_.tau / params_.theta});
    } else {
      kernels_.chambolle_pock(r, {params_.lambda * params_.tau, 1.0f / params_.tau});
    }
  }

  // all iterations, in sweeps of several at a time: iteration k + 1 does step y - kDualLag right after iteration k has
  // done step y, while the rows are still in the cache. The sweeps are dealt out to the members of the team, each a few
  // rows behind the one before. Returns true.
  bool iterate(Size size, Member me) {
    const bool fits = row_stride_of(size) * size.height * static_cast<int64_t>(sizeof(float)) <= kCacheBytes;
    const int share = (params_.iterations + me.team.size() - 1) / me.team.size();
    const int depth = fits && me.team.size() == 1 ? 1 : std::min(kDepth, share);
    if (depth == 1 && me.team.size() == 1) {
      for (int i = 0; i < params_.iterations; ++i) step(size, 0, steps(size), nullptr);
      return true;
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
          me.team.wait_for(before, theirs + std::min(front + depth * kDualLag + 1, fronts));
        }
        for (int k = 0; k < count; ++k) {
          const int y = front - k * kDualLag;
          if (y >= 0 && y < steps(size)) step(size, y, y + 1, nullptr);
        }
        if (me.team.size() > 1) me.team.publish(me.rank, mine + front + 1);
      }
    }
    me.team.barrier();
    return true;
  }

  // iterations until the flow is still; returns whether it moved to the end. Teams of one only.
  bool iterate_until_still(Size size, Member me) {
    const double limit = static_cast<double>(params_.epsilon) * params_.epsilon * size.height * size.width;
    for (int i = 0; i < params_.iterations; ++i) {
      double total = 0.0;
      for (int y = 0; y < steps(size); ++y) {
        step(size, y, y + 1, me.scratch);
        if (y < size.height) {
          // fixed partial sums: the same for every instruction set
          double sums[4] = {};
          for (int x = 0; x < size.width; ++x) sums[x % 4] += static_cast<double>(me.scratch[x]);
          total += (sums[0] + sums[1]) + (sums[2] + sums[3]);
        }
      }
      if (!(total > limit)) return false;
    }
    return true;
  }

  // where a filtered row waits: in the place of the extrapolated flow, or of the data term, both made anew after it.
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
  const int fields_;
  std::vector<float> kernel_;
  std::vector<Buffer> smoothed_, a_, b_;
  Buffer texels_, coarse_, state_;
};

}  // namespace

template <class Grey>
void flow(const Grey* a, const Grey* b, float* flow, int64_t pairs, int height, int width, const Params& params,
          int threads, const char* isa) {
  const Kernels& kernels = choose_isa(isa, AVFAST_TABLES(kTvl1));
  if (pairs == 0 || height == 0 || width == 0) return;
  const Size size{height, width};
  const int64_t area = static_cast<int64_t>(height) * width;
  const bool divisible = params.epsilon <= 0.0f && area >= kTeamArea;
  const int64_t most = divisible ? pairs * std::max(1, height / kTeamRows) : pairs;
  const int workers = static_cast<int>(std::clamp<int64_t>(threads, 1, most));

  std::vector<std::unique_ptr<Workspace>> workspaces;
  for (int64_t i = 0; i < std::min<int64_t>(workers, pairs); ++i) {
    workspaces.push_back(std::make_unique<Workspace>(size, params, kernels));
  }
  std::vector<Buffer> scratch;
  std::vector<std::unique_ptr<Team>> singles;
  for (int i = 0; i < workers; ++i) {
    scratch.emplace_back(scratch_size(size));
    singles.push_back(std::make_unique<Team>(1));
  }
  const auto solve = [&](int64_t pair, Workspace& workspace, Member me) {
    workspace.solve(a + pair * area, b + pair * area, flow + pair * 2 * area, me);
  };

  // whole pairs as long as there is one for every thread; what is left over is solved by teams
  std::atomic<int64_t> next{0};
  std::vector<std::unique_ptr<Team>> teams;
  std::once_flag made;
  run_threads(workers, [&](int rank, int total) {
    const int64_t left = divisible ? pairs % total : 0;
    const int64_t whole = pairs - left;
    for (int64_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < whole;) {
      solve(i, *workspaces[rank], {*singles[rank], 0, scratch[rank].get()});
    }
    if (left == 0) return;
    const int members = static_cast<int>(total / left);
    const int team = rank / members;
    if (team >= left) return;
    std::call_once(made, [&] {
      for (int64_t i = 0; i < left; ++i) teams.push_back(std::make_unique<Team>(members));
    });
    // the workspace of the team's first member; of all there are where no whole pair was solved
    Workspace& workspace = *workspaces[whole > 0 ? team * members : team];
    solve(whole + team, workspace, {*teams[team], rank % members, scratch[rank].get()});
  });
}

template void flow(const float*, const float*, float*, int64_t, int, int, const Params&, int, const char*);
template void flow(const uint8_t*, const uint8_t*, float*, int64_t, int, int, const Params&, int, const char*);

}  // namespace avfast::tvl1
