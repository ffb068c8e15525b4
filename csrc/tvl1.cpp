#include "tvl1.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstddef>
#include <functional>
#include <memory>
#include <system_error>
#include <thread>
#include <vector>

#include "tvl1_pixel.h"

// the row loops are compiled once per instruction set and chosen when the library is loaded.
// with contraction off (setup.py) all of them give the same bits.
#ifndef AVFAST_CLONES
#if defined(__x86_64__) && defined(__gnu_linux__) && !defined(__clang__) && defined(__GNUC__) && __GNUC__ >= 12
#define AVFAST_CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define AVFAST_CLONES
#endif
#endif

// the rows a loop reads and writes never overlap: tells the vectoriser so.
#if defined(__GNUC__) && !defined(__clang__)
#define AVFAST_IVDEP _Pragma("GCC ivdep")
#else
#define AVFAST_IVDEP
#endif

namespace avfast::tvl1 {
namespace {

// floats in the widest register. Rows have this much room before column 0, and at least as much as the median reads
// past the last column, so that blocks of lanes need no tail.
constexpr int kLanes = 16;
// the pyramid ends before the shorter side falls below this many pixels.
constexpr int kMinSide = 16;

struct Size {
  int height, width;
};

std::vector<Size> pyramid_sizes(Size size) {
  std::vector<Size> sizes{size};
  for (;;) {
    size = {(size.height + 1) / 2, (size.width + 1) / 2};
    if (std::min(size.height, size.width) < kMinSide) return sizes;
    sizes.push_back(size);
  }
}

// a field with one row of room above row 0.
class Plane {
 public:
  explicit Plane(Size largest) : data_(stride_for(largest) * (largest.height + 1) + kLanes) { resize(largest); }

  void resize(Size size) {
    size_ = size;
    stride_ = stride_for(size);
  }
  void zero() { std::fill(data_.begin(), data_.end(), 0.0f); }
  Size size() const { return size_; }
  float* row(int y) { return data_.data() + stride_ * (y + 1) + kLanes; }
  const float* row(int y) const { return data_.data() + stride_ * (y + 1) + kLanes; }

 private:
  static ptrdiff_t stride_for(Size size) {
    return kLanes + (size.width + 2 + kLanes - 1) / kLanes * static_cast<ptrdiff_t>(kLanes);
  }

  std::vector<float> data_;
  Size size_{};
  ptrdiff_t stride_ = 0;
};

// an image beside its two derivatives, so that the three share the addresses and weights of a warp. Borders are
// repeated by as much as the bicubic taps reach over them.
class Texels {
 public:
  static constexpr int kChannels = 4;  // image, d/dx, d/dy, nothing

  explicit Texels(Size largest) : data_(stride_for(largest) * (largest.height + 3)) { resize(largest); }

  void resize(Size size) { stride_ = stride_for(size); }
  float* at(int y, int x) { return data_.data() + stride_ * (y + 1) + (x + 1) * kChannels; }
  const float* at(int y, int x) const { return data_.data() + stride_ * (y + 1) + (x + 1) * kChannels; }
  ptrdiff_t stride() const { return stride_; }

 private:
  static ptrdiff_t stride_for(Size size) { return (size.width + 3) * static_cast<ptrdiff_t>(kChannels); }

  std::vector<float> data_;
  ptrdiff_t stride_ = 0;
};

// one axis of the area average from `from` to `to` pixels: the at most three source pixels under each target pixel.
struct AreaTap {
  int index[3];
  float weight[3];
};

std::vector<AreaTap> area_taps(int from, int to) {
  std::vector<AreaTap> taps(to);
  for (int i = 0; i < to; ++i) {
    // in units of 1/to of a source pixel everything is an integer
    const int64_t begin = static_cast<int64_t>(i) * from;
    const int64_t end = begin + from;
    for (int k = 0; k < 3; ++k) {
      const int64_t source = begin / to + k;
      const int64_t overlap = std::min(end, (source + 1) * to) - std::max(begin, source * to);
      taps[i].index[k] = static_cast<int>(std::min<int64_t>(source, from - 1));
      taps[i].weight[k] = static_cast<float>(std::max<int64_t>(overlap, 0)) / static_cast<float>(from);
    }
  }
  return taps;
}

// one axis of bilinear enlargement, pixel centres at half integers.
struct LinearTap {
  int index[2];
  float weight;
};

std::vector<LinearTap> linear_taps(int from, int to) {
  std::vector<LinearTap> taps(to);
  const float ratio = static_cast<float>(from) / static_cast<float>(to);
  for (int i = 0; i < to; ++i) {
    const float centre = (static_cast<float>(i) + 0.5f) * ratio - 0.5f;
    const float position = clamp(centre, 0.0f, static_cast<float>(from - 1));
    const int index = static_cast<int>(position);
    taps[i] = {{index, std::min(index + 1, from - 1)}, position - static_cast<float>(index)};
  }
  return taps;
}

std::vector<float> gaussian(float sigma) {
  const int radius = static_cast<int>(std::ceil(3.0 * sigma));
  std::vector<double> weights(2 * radius + 1);
  double sum = 0.0;
  for (int i = -radius; i <= radius; ++i) {
    sum += weights[i + radius] = std::exp(-0.5 * i * i / (static_cast<double>(sigma) * sigma));
  }
  std::vector<float> kernel(weights.size());
  std::transform(weights.begin(), weights.end(), kernel.begin(),
                 [sum](double w) { return static_cast<float>(w / sum); });
  return kernel;
}

struct DataRow {
  float *ix, *iy, *rho_c, *inv_grad;
};

struct FlowRow {
  float *u1, *u2;
};

// the dual of one row; q12 and q22 also of the row above, which the backward difference needs.
struct DualRow {
  float *q11, *q12, *q21, *q22;
  const float *q12_above, *q22_above;
};

AVFAST_CLONES void linearise_row(const Texels& source, Size size, int y, const float* target, FlowRow flow,
                                 DataRow out) {
  const float max_x = static_cast<float>(size.width - 1);
  const float max_y = static_cast<float>(size.height - 1);
  for (int x = 0; x < size.width; ++x) {
    const float u1 = flow.u1[x];
    const float u2 = flow.u2[x];
    const float px = static_cast<float>(x) + u1;
    const float py = static_cast<float>(y) + u2;
    const float cx = clamp(px, 0.0f, max_x);
    const float cy = clamp(py, 0.0f, max_y);
    const int x0 = static_cast<int>(cx);
    const int y0 = static_cast<int>(cy);
    const CubicWeights wx = cubic_weights(cx - static_cast<float>(x0));
    const CubicWeights wy = cubic_weights(cy - static_cast<float>(y0));

    constexpr int kChannels = Texels::kChannels;
    float value[kChannels] = {};
    for (int j = 0; j < 4; ++j) {
      const float* t = source.at(y0 - 1 + j, x0 - 1);
      for (int c = 0; c < kChannels; ++c) {
        value[c] += wy.w[j] * (wx.w[0] * t[c] + wx.w[1] * t[c + kChannels] + wx.w[2] * t[c + 2 * kChannels] +
                               wx.w[3] * t[c + 3 * kChannels]);
      }
    }
    const float inside = px == cx && py == cy ? 1.0f : 0.0f;
    const DataTerm d = linearise(value[0], value[1], value[2], target[x], u1, u2, inside);
    out.ix[x] = d.ix;
    out.iy[x] = d.iy;
    out.rho_c[x] = d.rho_c;
    out.inv_grad[x] = d.inv_grad;
  }
}

AVFAST_CLONES void zach_primal_row(int width, DataRow d, DualRow q, FlowRow flow, float limit) {
  AVFAST_IVDEP
  for (int x = 0; x < width; ++x) {
    const float div1 = q.q11[x] - q.q11[x - 1] + (q.q12[x] - q.q12_above[x]);
    const float div2 = q.q21[x] - q.q21[x - 1] + (q.q22[x] - q.q22_above[x]);
    zach_primal(flow.u1[x], flow.u2[x], {d.ix[x], d.iy[x], d.rho_c[x], d.inv_grad[x]}, div1, div2, limit);
  }
}

AVFAST_CLONES void zach_dual_row(int width, FlowRow flow, FlowRow below, DualRow q, float tau, float tau_over_theta) {
  AVFAST_IVDEP
  for (int x = 0; x < width; ++x) {
    zach_dual(q.q11[x], q.q12[x], flow.u1[x + 1] - flow.u1[x], below.u1[x] - flow.u1[x], tau, tau_over_theta);
    zach_dual(q.q21[x], q.q22[x], flow.u2[x + 1] - flow.u2[x], below.u2[x] - flow.u2[x], tau, tau_over_theta);
  }
}

AVFAST_CLONES void chambolle_pock_primal_row(int width, DataRow d, DualRow q, FlowRow flow, FlowRow bar, float limit) {
  AVFAST_IVDEP
  for (int x = 0; x < width; ++x) {
    const float div1 = q.q11[x] - q.q11[x - 1] + (q.q12[x] - q.q12_above[x]);
    const float div2 = q.q21[x] - q.q21[x - 1] + (q.q22[x] - q.q22_above[x]);
    chambolle_pock_primal(flow.u1[x], flow.u2[x], bar.u1[x], bar.u2[x], {d.ix[x], d.iy[x], d.rho_c[x], d.inv_grad[x]},
                          div1, div2, limit);
  }
}

AVFAST_CLONES void chambolle_pock_dual_row(int width, FlowRow bar, FlowRow below, DualRow q, float inv_tau) {
  AVFAST_IVDEP
  for (int x = 0; x < width; ++x) {
    chambolle_pock_dual(q.q11[x], q.q12[x], bar.u1[x + 1] - bar.u1[x], below.u1[x] - bar.u1[x], inv_tau);
    chambolle_pock_dual(q.q21[x], q.q22[x], bar.u2[x + 1] - bar.u2[x], below.u2[x] - bar.u2[x], inv_tau);
  }
}

// moves the smaller of two blocks of lanes to `a` and the larger to `b`.
AVFAST_HD void sort_lanes(float* a, float* b) {
  for (int l = 0; l < kLanes; ++l) {
    const float low = a[l] < b[l] ? a[l] : b[l];
    const float high = a[l] < b[l] ? b[l] : a[l];
    a[l] = low;
    b[l] = high;
  }
}

// pixel `sample` of the kSide x kSide neighbourhoods of a block of lanes.
template <int kSide>
AVFAST_HD void load_sample(const float* const* rows, int x, int sample, float* lanes) {
  const float* from = rows[sample / kSide] + x + sample % kSide - kSide / 2;
  for (int l = 0; l < kLanes; ++l) lanes[l] = from[l];
}

// median of kSide x kSide pixels by forgetful selection: of n/2 + 2 values the smallest and the largest cannot be the
// median of n, so both are dropped and the next value is taken in, until three are left. No branch depends on the data.
template <int kSide>
AVFAST_HD void median_block(const float* const* rows, int x, float* out) {
  constexpr int kCount = kSide * kSide;
  constexpr int kLast = kCount / 2 + 1;
  float held[kLast + 1][kLanes];
  for (int k = 0; k <= kLast; ++k) load_sample<kSide>(rows, x, k, held[k]);
  for (int first = 0;; ++first) {
    for (int k = first + 1; k <= kLast; ++k) sort_lanes(held[first], held[k]);
    for (int k = first + 1; k < kLast; ++k) sort_lanes(held[k], held[kLast]);
    const int next = kLast + 1 + first;
    if (next == kCount) break;
    load_sample<kSide>(rows, x, next, held[kLast]);
  }
  for (int l = 0; l < kLanes; ++l) out[x + l] = held[kCount / 2][l];
}

// `rows` are readable for side / 2 pixels before column 0 and for a block of lanes past the last column.
AVFAST_CLONES void median_row(const float* const* rows, int side, int width, float* out) {
  if (side == 3) {
    for (int x = 0; x < width; x += kLanes) median_block<3>(rows, x, out);
  } else {
    for (int x = 0; x < width; x += kLanes) median_block<5>(rows, x, out);
  }
}

// solves pairs of one size, one at a time; owns all the memory that takes.
class Workspace {
 public:
  Workspace(Size size, const Params& params)
      : params_(params),
        sizes_(pyramid_sizes(size)),
        texels_(size),
        u_{Plane(size), Plane(size)},
        // filtered or enlarged flow; while Chambolle-Pock iterates, its extrapolated flow
        spare_{Plane(size), Plane(size)},
        q_{Plane(size), Plane(size), Plane(size), Plane(size)},
        data_{Plane(size), Plane(size), Plane(size), Plane(size)} {
    if (params.presmooth > 0.0f) {
      kernel_ = gaussian(params.presmooth);
      smoothing_rows_.resize(static_cast<size_t>(size.height) * size.width);
    }
    for (const Size& s : sizes_) {
      a_.emplace_back(static_cast<size_t>(s.height) * s.width);
      b_.emplace_back(static_cast<size_t>(s.height) * s.width);
    }
    for (size_t i = 0; i + 1 < sizes_.size(); ++i) {
      shrink_x_.push_back(area_taps(sizes_[i].width, sizes_[i + 1].width));
      shrink_y_.push_back(area_taps(sizes_[i].height, sizes_[i + 1].height));
      grow_x_.push_back(linear_taps(sizes_[i + 1].width, sizes_[i].width));
      grow_y_.push_back(linear_taps(sizes_[i + 1].height, sizes_[i].height));
    }
  }

  // a, b [height, width] -> flow [2, height, width]
  void solve(const float* a, const float* b, float* flow) {
    fill_pyramid(a, a_);
    fill_pyramid(b, b_);
    const int coarsest = static_cast<int>(sizes_.size()) - 1;
    for (int level = coarsest; level >= 0; --level) {
      if (level == coarsest) {
        for (Plane& u : u_) {
          u.resize(sizes_[level]);
          u.zero();
        }
      } else {
        enlarge_flow(level);
      }
      solve_level(level);
    }
    const Size size = sizes_[0];
    for (int c = 0; c < 2; ++c) {
      for (int y = 0; y < size.height; ++y, flow += size.width) std::copy_n(u_[c].row(y), size.width, flow);
    }
  }

 private:
  void fill_pyramid(const float* image, std::vector<std::vector<float>>& pyramid) {
    if (kernel_.empty()) {
      std::copy_n(image, pyramid[0].size(), pyramid[0].data());
    } else {
      smooth(image, pyramid[0].data());
    }
    for (size_t i = 0; i + 1 < sizes_.size(); ++i) {
      shrink(pyramid[i].data(), sizes_[i].width, shrink_x_[i], shrink_y_[i], pyramid[i + 1].data());
    }
  }

  // separable Gaussian, borders repeated.
  void smooth(const float* image, float* out) {
    const auto [height, width] = sizes_[0];
    const int radius = static_cast<int>(kernel_.size()) / 2;
    for (int y = 0; y < height; ++y) {
      for (int x = 0; x < width; ++x) {
        float sum = 0.0f;
        for (int k = -radius; k <= radius; ++k) {
          sum += kernel_[k + radius] * image[static_cast<ptrdiff_t>(y) * width + std::clamp(x + k, 0, width - 1)];
        }
        smoothing_rows_[static_cast<ptrdiff_t>(y) * width + x] = sum;
      }
    }
    for (int y = 0; y < height; ++y) {
      for (int x = 0; x < width; ++x) {
        float sum = 0.0f;
        for (int k = -radius; k <= radius; ++k) {
          sum += kernel_[k + radius] *
                 smoothing_rows_[static_cast<ptrdiff_t>(std::clamp(y + k, 0, height - 1)) * width + x];
        }
        out[static_cast<ptrdiff_t>(y) * width + x] = sum;
      }
    }
  }

  static void shrink(const float* in, int in_width, const std::vector<AreaTap>& taps_x,
                     const std::vector<AreaTap>& taps_y, float* out) {
    for (const AreaTap& ty : taps_y) {
      for (const AreaTap& tx : taps_x) {
        float rows[3];
        for (int j = 0; j < 3; ++j) {
          const float* row = in + static_cast<ptrdiff_t>(ty.index[j]) * in_width;
          rows[j] = tx.weight[0] * row[tx.index[0]] + tx.weight[1] * row[tx.index[1]] + tx.weight[2] * row[tx.index[2]];
        }
        *out++ = ty.weight[0] * rows[0] + ty.weight[1] * rows[1] + ty.weight[2] * rows[2];
      }
    }
  }

  // the flow of level + 1 becomes the first guess of `level`; its values grow with the image.
  void enlarge_flow(int level) {
    const Size from = sizes_[level + 1];
    const Size to = sizes_[level];
    const float scale[2] = {static_cast<float>(to.width) / static_cast<float>(from.width),
                            static_cast<float>(to.height) / static_cast<float>(from.height)};
    for (int c = 0; c < 2; ++c) {
      spare_[c].resize(to);
      for (int y = 0; y < to.height; ++y) {
        const LinearTap& ty = grow_y_[level][y];
        const float* top = u_[c].row(ty.index[0]);
        const float* bottom = u_[c].row(ty.index[1]);
        float* out = spare_[c].row(y);
        for (int x = 0; x < to.width; ++x) {
          const LinearTap& tx = grow_x_[level][x];
          const float t = top[tx.index[0]] + tx.weight * (top[tx.index[1]] - top[tx.index[0]]);
          const float b = bottom[tx.index[0]] + tx.weight * (bottom[tx.index[1]] - bottom[tx.index[0]]);
          out[x] = scale[c] * (t + ty.weight * (b - t));
        }
      }
      std::swap(u_[c], spare_[c]);
    }
  }

  void solve_level(int level) {
    size_ = sizes_[level];
    fill_texels(b_[level].data());
    for (Plane& plane : spare_) plane.resize(size_);
    for (Plane& plane : data_) plane.resize(size_);
    for (Plane& plane : q_) {
      plane.resize(size_);
      plane.zero();
    }
    for (int warp = 0; warp < params_.warps; ++warp) {
      const float* target = a_[level].data();
      for (int y = 0; y < size_.height; ++y, target += size_.width) {
        linearise_row(texels_, size_, y, target, flow_row(u_, y), data_row(y));
      }
      for (int i = 0; i < params_.iterations; ++i) iterate();
      if (params_.median > 1) filter_flow();
    }
  }

  // image and central differences; at the border, half the one-sided difference.
  void fill_texels(const float* image) {
    const auto [height, width] = size_;
    texels_.resize(size_);
    for (int y = -1; y < height + 2; ++y) {
      const int yc = std::clamp(y, 0, height - 1);
      const float* row = image + static_cast<ptrdiff_t>(yc) * width;
      const float* above = image + static_cast<ptrdiff_t>(std::max(yc - 1, 0)) * width;
      const float* below = image + static_cast<ptrdiff_t>(std::min(yc + 1, height - 1)) * width;
      for (int x = -1; x < width + 2; ++x) {
        const int xc = std::clamp(x, 0, width - 1);
        float* texel = texels_.at(y, x);
        texel[0] = row[xc];
        texel[1] = 0.5f * (row[std::min(xc + 1, width - 1)] - row[std::max(xc - 1, 0)]);
        texel[2] = 0.5f * (below[xc] - above[xc]);
        texel[3] = 0.0f;
      }
    }
  }

  // one iteration in one sweep: the dual of a row can follow as soon as the primal of the row below is done.
  void iterate() {
    const int last = size_.height - 1;
    for (int y = 0; y <= last; ++y) {
      primal_row(y);
      if (y > 0) dual_row(y - 1, y);
    }
    dual_row(last, last);
  }

  void primal_row(int y) {
    const FlowRow flow = flow_row(u_, y);
    const int width = size_.width;
    if (params_.solver == Solver::kZach) {
      zach_primal_row(width, data_row(y), dual_row_of(y), flow, params_.lambda * params_.theta);
      repeat_last(flow);
    } else {
      const FlowRow bar = flow_row(spare_, y);
      chambolle_pock_primal_row(width, data_row(y), dual_row_of(y), flow, bar, params_.lambda * params_.tau);
      repeat_last(bar);
    }
  }

  // `below` is y + 1, or y itself at the lower border, where the forward difference is 0.
  void dual_row(int y, int below) {
    const int width = size_.width;
    if (params_.solver == Solver::kZach) {
      zach_dual_row(width, flow_row(u_, y), flow_row(u_, below), dual_row_of(y), params_.tau,
                    params_.tau / params_.theta);
    } else {
      chambolle_pock_dual_row(width, flow_row(spare_, y), flow_row(spare_, below), dual_row_of(y), 1.0f / params_.tau);
    }
  }

  // makes the forward difference 0 in the last column.
  void repeat_last(FlowRow row) const {
    row.u1[size_.width] = row.u1[size_.width - 1];
    row.u2[size_.width] = row.u2[size_.width - 1];
  }

  void filter_flow() {
    const int side = params_.median;
    const int reach = side / 2;
    for (int c = 0; c < 2; ++c) {
      for (int y = 0; y < size_.height; ++y) {
        float* row = u_[c].row(y);
        for (int k = 1; k <= reach; ++k) {
          row[-k] = row[0];
          row[size_.width - 1 + k] = row[size_.width - 1];
        }
      }
      for (int y = 0; y < size_.height; ++y) {
        const float* rows[5];
        for (int j = 0; j < side; ++j) rows[j] = u_[c].row(std::clamp(y + j - reach, 0, size_.height - 1));
        median_row(rows, side, size_.width, spare_[c].row(y));
      }
      std::swap(u_[c], spare_[c]);
    }
  }

  static FlowRow flow_row(Plane (&planes)[2], int y) { return {planes[0].row(y), planes[1].row(y)}; }
  DataRow data_row(int y) { return {data_[0].row(y), data_[1].row(y), data_[2].row(y), data_[3].row(y)}; }
  DualRow dual_row_of(int y) {
    return {q_[0].row(y), q_[1].row(y), q_[2].row(y), q_[3].row(y), q_[1].row(y - 1), q_[3].row(y - 1)};
  }

  const Params params_;
  const std::vector<Size> sizes_;  // finest first
  std::vector<std::vector<AreaTap>> shrink_x_, shrink_y_;
  std::vector<std::vector<LinearTap>> grow_x_, grow_y_;
  std::vector<float> kernel_, smoothing_rows_;
  std::vector<std::vector<float>> a_, b_;
  Size size_{};
  Texels texels_;
  Plane u_[2], spare_[2], q_[4], data_[4];
};

}  // namespace

void flow(const float* a, const float* b, float* flow, int64_t pairs, int height, int width, const Params& params,
          int threads) {
  if (pairs == 0 || height == 0 || width == 0) return;
  const int workers = static_cast<int>(std::clamp<int64_t>(threads, 1, pairs));
  std::vector<std::unique_ptr<Workspace>> workspaces;
  for (int i = 0; i < workers; ++i) workspaces.push_back(std::make_unique<Workspace>(Size{height, width}, params));

  const ptrdiff_t area = static_cast<ptrdiff_t>(height) * width;
  std::atomic<int64_t> next{0};
  const auto work = [&](Workspace& workspace) {
    for (int64_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < pairs;) {
      workspace.solve(a + i * area, b + i * area, flow + i * 2 * area);
    }
  };
  // threads live for one call only: nothing is left that a fork could lose.
  std::vector<std::thread> pool;
  pool.reserve(workers - 1);
  for (int i = 1; i < workers; ++i) {
    try {
      pool.emplace_back(work, std::ref(*workspaces[i]));
    } catch (const std::system_error&) {
      break;  // no more threads to be had: those there are do all the work
    }
  }
  work(*workspaces[0]);
  for (std::thread& thread : pool) thread.join();
}

}  // namespace avfast::tvl1
