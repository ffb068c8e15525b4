#include "fused.h"

#include <algorithm>
#include <cmath>
#include <numeric>
#include <type_traits>
#include <vector>

#include "isa.h"
#include "threads.h"

namespace avfast::fused {
namespace {

// one double as a register: the loops in the precision that gradient checks want.
struct Double {
  using Scalar = double;
  static constexpr int kWidth = 1;
  using Raw = double __attribute__((vector_size(sizeof(double))));
  using Int = int64_t __attribute__((vector_size(sizeof(int64_t))));
  Raw raw;

  Double() = default;
  Double(Raw r) : raw(r) {}
  explicit Double(double x) : raw{x} {}
  static Double load_first(const double* from, int count) { return Double(count == 0 ? 0.0 : *from); }
  static Double iota() { return Double(0.0); }
  static bool all(Int mask) { return mask[0]; }
  void store_first(double* to, int) const { *to = raw[0]; }
};

Double operator+(Double a, Double b) { return a.raw + b.raw; }
Double operator-(Double a, Double b) { return a.raw - b.raw; }
Double operator*(Double a, Double b) { return a.raw * b.raw; }
Double multiply_add(Double a, Double b, Double c) { return a * b + c; }
Double reciprocal(Double a) { return Double(1.0 / a.raw[0]); }
Double exp(Double a) { return Double(std::exp(a.raw[0])); }
// b where a is NaN, as in simd.h
Double min(Double a, Double b) { return a.raw[0] < b.raw[0] ? a : b; }
Double max(Double a, Double b) { return a.raw[0] > b.raw[0] ? a : b; }
Double where(Double::Int mask, Double a, Double b) { return mask[0] ? a : b; }
Double next_lanes(Double, double last) { return Double(last); }
Double previous_lanes(Double, double first) { return Double(first); }
Double::Int floor_int(Double a) { return Double::Int{static_cast<int64_t>(std::floor(a.raw[0]))}; }

}  // namespace
}  // namespace avfast::fused

#include "fused_loops.h"

namespace avfast::fused {
namespace {

// a thread that looks out for work costs some 8 us, one that has to be woken up to 50; so many elements take 10 to 20.
constexpr int64_t kGrain = 1 << 13;

template <class T>
const Kernels<T>& choose(const char* isa) {
  if constexpr (std::is_same_v<T, double>) {
    static constexpr Kernels<double> kTable = kernels<Double, Double>();
    return kTable;
  } else {
    return choose_isa(isa, AVFAST_TABLES(kFused));
  }
}

// body(begin, end) over 0 .. count - 1 in equal parts; `work` elements in all decide how many threads are worth it.
template <class Body>
void share(int64_t count, int64_t work, int threads, const Body& body) {
  const int64_t most = std::min<int64_t>({threads, count, work / kGrain});
  const int workers = static_cast<int>(std::max<int64_t>(most, 1));
  if (workers == 1) return body(0, count);
  run_threads(workers, [&](int rank, int total) { body(count * rank / total, count * (rank + 1) / total); });
}

// body(row, first, count) over the elements begin .. end - 1 of [rows, area], row by row.
template <class Body>
void for_rows(int64_t begin, int64_t end, int64_t area, const Body& body) {
  while (begin < end) {
    const int64_t row = begin / area;
    const int64_t stop = std::min(end, (row + 1) * area);
    body(row, begin - row * area, stop - begin);
    begin = stop;
  }
}

}  // namespace

template <class T>
void gates_forward(const T* gates, const T* cell, T* hidden, T* new_cell, int64_t rows, int64_t area, int threads,
                   const char* isa) {
  const Kernels<T>& kernels = choose<T>(isa);
  share(rows * area, rows * area, threads, [&](int64_t begin, int64_t end) {
    for_rows(begin, end, area, [&](int64_t row, int64_t first, int64_t count) {
      const int64_t at = row * area + first;
      kernels.gates_forward({gates + 4 * row * area + first, cell + at, area, count}, hidden + at, new_cell + at);
    });
  });
}

template <class T>
void gates_backward(const T* gates, const T* cell, const T* grad_hidden, const T* grad_new_cell, T* grad_gates,
                    T* grad_cell, int64_t rows, int64_t area, int threads, const char* isa) {
  const Kernels<T>& kernels = choose<T>(isa);
  share(rows * area, rows * area, threads, [&](int64_t begin, int64_t end) {
    for_rows(begin, end, area, [&](int64_t row, int64_t first, int64_t count) {
      const int64_t at = row * area + first;
      const int64_t gate = 4 * row * area + first;
      kernels.gates_backward({gates + gate, cell + at, area, count}, grad_hidden + at, grad_new_cell + at,
                             grad_gates + gate, grad_cell + at);
    });
  });
}

template <class T>
void warp_forward(const T* image, const T* flow, T* out, int64_t batch, int channels, int height, int width, bool zeros,
                  int threads, const char* isa) {
  const Kernels<T>& kernels = choose<T>(isa);
  const int64_t plane = static_cast<int64_t>(height) * width;
  const int64_t size = channels * plane;
  share(batch * height, batch * size, threads, [&](int64_t begin, int64_t end) {
    for_rows(begin, end, height, [&](int64_t b, int64_t first, int64_t count) {
      const int y = static_cast<int>(first);
      const Warp<T> warp{
          image + b * size, flow + 2 * b * plane, channels, height, width, y, y + static_cast<int>(count), zeros};
      kernels.warp_forward(warp, out + b * size);
    });
  });
}

template <class T>
void warp_backward(const T* image, const T* flow, const T* grad_out, T* grad_image, T* grad_flow, int64_t batch,
                   int channels, int height, int width, bool zeros, int threads, const char* isa) {
  const Kernels<T>& kernels = choose<T>(isa);
  const int64_t plane = static_cast<int64_t>(height) * width;
  const int64_t size = channels * plane;
  // pixels of one plane of the image's gradient receive from anywhere in it, so a plane has one owner, and its sums one
  // order: whole images where there are enough of them, else the planes, apart from the rows of the flow's gradient
  if (grad_image != nullptr && batch < threads) {
    share(batch * channels, batch * size, threads, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const int64_t b = i / channels;
        const Warp<T> warp{image + i * plane, flow + 2 * b * plane, 1, height, width, 0, height, zeros};
        std::fill_n(grad_image + i * plane, plane, T(0));
        kernels.warp_backward(warp, grad_out + i * plane, grad_image + i * plane, nullptr);
      }
    });
    grad_image = nullptr;
    if (grad_flow == nullptr) return;
  }
  const int rows = grad_image == nullptr ? height : 1;
  share(batch * rows, batch * size, threads, [&](int64_t begin, int64_t end) {
    for_rows(begin, end, rows, [&](int64_t b, int64_t first, int64_t count) {
      const int y = rows == 1 ? 0 : static_cast<int>(first);
      const int stop = rows == 1 ? height : y + static_cast<int>(count);
      const Warp<T> warp{image + b * size, flow + 2 * b * plane, channels, height, width, y, stop, zeros};
      if (grad_image != nullptr) std::fill_n(grad_image + b * size, size, T(0));
      kernels.warp_backward(warp, grad_out + b * size, grad_image == nullptr ? nullptr : grad_image + b * size,
                            grad_flow == nullptr ? nullptr : grad_flow + 2 * b * plane);
    });
  });
}

template <class T>
void flow_loss(const T* prediction, const T* target, const T* frames, T* grad, T* loss, int64_t images, int channels,
               int height, int width, double data_weight, double smooth_weight, int threads, const char* isa) {
  const Kernels<T>& kernels = choose<T>(isa);
  const int64_t plane = static_cast<int64_t>(height) * width;
  // summed in the order of the images, whatever thread did which
  std::vector<double> losses(images);
  share(images, images * plane, threads, [&](int64_t begin, int64_t end) {
    std::vector<T> scratch(flow_loss_scratch(width));
    for (int64_t i = begin; i < end; ++i) {
      const int64_t at = 2 * i * plane;
      const FlowLoss<T> image{
          prediction + at, target + at, frames + i * channels * plane, channels,
          height,          width,       static_cast<T>(data_weight),   static_cast<T>(smooth_weight),
          scratch.data()};
      losses[i] = kernels.flow_loss(image, grad == nullptr ? nullptr : grad + at);
    }
  });
  *loss = static_cast<T>(std::accumulate(losses.begin(), losses.end(), 0.0));
}

template <class T>
void modulate_forward(const T* context, const T* gamma, const T* beta, T* out, int64_t batch, int64_t channels,
                      int64_t area, int64_t out_stride, const std::vector<Feature<T>>& before, int threads,
                      const char* isa) {
  const Kernels<T>& kernels = choose<T>(isa);
  int64_t total = channels;
  for (const Feature<T>& feature : before) total += feature.channels;
  share(batch * total, batch * total * area, threads, [&](int64_t begin, int64_t end) {
    for_rows(begin, end, total, [&](int64_t b, int64_t first, int64_t count) {
      T* image = out + b * out_stride;
      // body(from, to) for those of the next `size` channels, which lie from channel `base` on, that are this stretch's
      int64_t base = 0;
      const auto stretch = [&](int64_t size, const auto& body) {
        const int64_t from = std::max<int64_t>(first - base, 0), to = std::min(first + count - base, size);
        if (from < to) body(from, to);
        base += size;
      };
      for (const Feature<T>& feature : before) {
        stretch(feature.channels, [&](int64_t from, int64_t to) {
          std::copy_n(feature.values + (b * feature.channels + from) * area, (to - from) * area,
                      image + (base + from) * area);
        });
      }
      stretch(channels, [&](int64_t from, int64_t to) {
        for (int64_t c = from; c < to; ++c) {
          const int64_t i = b * channels + c;
          kernels.modulate_forward({context + i * area, gamma[i], beta[i], area}, image + (base + c) * area);
        }
      });
    });
  });
}

template <class T>
void modulate_backward(const T* context, const T* gamma, const T* grad_out, T* grad_context, T* grad_gamma,
                       T* grad_beta, int64_t batch, int64_t channels, int64_t area, int64_t grad_stride, int threads,
                       const char* isa) {
  const Kernels<T>& kernels = choose<T>(isa);
  share(batch * channels, batch * channels * area, threads, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      kernels.modulate_backward({context + i * area, gamma[i], T(0), area},
                                grad_out + i / channels * grad_stride + i % channels * area, grad_context + i * area,
                                grad_gamma + i, grad_beta + i);
    }
  });
}

namespace {

// so many channels at a time: what a tile holds between its two axes stays in the level 1 cache.
constexpr int64_t kChannels = 64;

// one tile of one phase of one image, from channel `channel` on: where its pixels and products are. What lies outside
// the map is read from zeros and written nowhere.
template <class T>
struct Tile {
  T* map;
  T* products;
  int64_t apart, columns;
  int64_t row_at[kMostCombined], column_at[kMostCombined];  // offsets of its pixels, below 0 outside the map
  int64_t channel;
  T* outside;

  T* pixel(int i, int j) const {
    return row_at[i] < 0 || column_at[j] < 0 ? outside : map + row_at[i] + column_at[j] + channel;
  }
  T* product(int a, int b) const { return products + (a * columns + b) * apart + channel; }
};

// the offsets of a tile's pixels along one axis, whose pixels lie `step` values apart.
template <class T>
void place(const Tiles<T>& tiles, const Axis<T>& axis, int64_t tile, int phase, int64_t step, int64_t* at) {
  for (int i = 0; i < axis.taken; ++i) {
    const int64_t pixel = tiles.stride * (axis.step * tile + i) + phase - tiles.pad;
    at[i] = pixel < 0 || pixel >= axis.size ? -1 : pixel * step;
  }
}

// body(tile, count of channels) for all tiles of the rows of tiles begin .. end - 1, a row being one of an image.
template <class T, class Body>
void for_tiles(const Tiles<T>& tiles, T* map, T* products, int64_t begin, int64_t end, T* outside, const Body& body) {
  const Axis<T>&rows = tiles.rows, &columns = tiles.columns;
  const int64_t width = columns.size * tiles.channels;
  Tile<T> tile{};
  tile.apart = tiles.apart;
  tile.columns = columns.products;
  tile.outside = outside;
  tile.products = products + begin * columns.tiles * tiles.stride * tiles.stride * tiles.channels;
  for (int64_t i = begin; i < end; ++i) {
    tile.map = map + i / rows.tiles * rows.size * width;
    for (int64_t column = 0; column < columns.tiles; ++column) {
      for (int phase = 0; phase < tiles.stride * tiles.stride; ++phase, tile.products += tiles.channels) {
        place(tiles, rows, i % rows.tiles, phase / tiles.stride, width, tile.row_at);
        place(tiles, columns, column, phase % tiles.stride, tiles.channels, tile.column_at);
        for (tile.channel = 0; tile.channel < tiles.channels; tile.channel += kChannels) {
          body(tile, std::min(kChannels, tiles.channels - tile.channel));
        }
      }
    }
  }
}

// an axis's matrix as [taken, products].
template <class T>
std::vector<T> transposed(const Axis<T>& axis) {
  std::vector<T> matrix(static_cast<size_t>(axis.taken) * axis.products);
  for (int p = 0; p < axis.products; ++p) {
    for (int t = 0; t < axis.taken; ++t) matrix[t * axis.products + p] = axis.matrix[p * axis.taken + t];
  }
  return matrix;
}

}  // namespace

template <class T>
void gather_tiles(const Tiles<T>& tiles, const T* map, T* products, int threads, const char* isa) {
  const Kernels<T>& kernels = choose<T>(isa);
  const Axis<T>&rows = tiles.rows, &columns = tiles.columns;
  const int64_t work = tiles.batch * rows.size * columns.size * tiles.channels;
  share(tiles.batch * rows.tiles, work, threads, [&](int64_t begin, int64_t end) {
    T zeros[kChannels] = {};
    T between[kMostCombined][kMostCombined][kChannels];  // [product along the rows][pixel along the columns]
    const auto transform = [&](const Tile<T>& tile, int64_t count) {
      const T* from[kMostCombined];
      T* to[kMostCombined];
      for (int j = 0; j < columns.taken; ++j) {
        for (int i = 0; i < rows.taken; ++i) from[i] = tile.pixel(i, j);
        for (int a = 0; a < rows.products; ++a) to[a] = between[a][j];
        kernels.combine({rows.matrix, rows.products, rows.taken, from, to, count, false});
      }
      for (int a = 0; a < rows.products; ++a) {
        for (int j = 0; j < columns.taken; ++j) from[j] = between[a][j];
        for (int b = 0; b < columns.products; ++b) to[b] = tile.product(a, b);
        kernels.combine({columns.matrix, columns.products, columns.taken, from, to, count, false});
      }
    };
    for_tiles(tiles, const_cast<T*>(map), products, begin, end, zeros, transform);
  });
}

template <class T>
void scatter_tiles(const Tiles<T>& tiles, const T* products, T* map, int threads, const char* isa) {
  const Kernels<T>& kernels = choose<T>(isa);
  const Axis<T>&rows = tiles.rows, &columns = tiles.columns;
  const int64_t image = static_cast<int64_t>(rows.size) * columns.size * tiles.channels;
  const bool overlap = rows.taken > rows.step || columns.taken > columns.step;
  std::vector<T> row_matrix = transposed(rows), column_matrix = transposed(columns);
  // tiles that overlap are added up by one thread, always in the same order
  const int64_t owned = overlap ? rows.tiles : 1;
  share(tiles.batch * rows.tiles / owned, tiles.batch * image, threads, [&](int64_t begin, int64_t end) {
    if (overlap) std::fill(map + begin * image, map + end * image, T(0));
    T nowhere[kChannels] = {};
    T between[kMostCombined][kMostCombined][kChannels];  // [pixel along the columns][product along the rows]
    const auto transform = [&](const Tile<T>& tile, int64_t count) {
      const T* from[kMostCombined];
      T* to[kMostCombined];
      for (int a = 0; a < rows.products; ++a) {
        for (int b = 0; b < columns.products; ++b) from[b] = tile.product(a, b);
        for (int j = 0; j < columns.taken; ++j) to[j] = between[j][a];
        kernels.combine({column_matrix.data(), columns.taken, columns.products, from, to, count, false});
      }
      for (int j = 0; j < columns.taken; ++j) {
        for (int a = 0; a < rows.products; ++a) from[a] = between[j][a];
        for (int i = 0; i < rows.taken; ++i) to[i] = tile.pixel(i, j);
        kernels.combine({row_matrix.data(), rows.taken, rows.products, from, to, count, overlap});
      }
    };
    for_tiles(tiles, map, const_cast<T*>(products), begin * owned, end * owned, nowhere, transform);
  });
}

#define AVFAST_FUSED(T)                                                                                                \
  template void gates_forward<T>(const T*, const T*, T*, T*, int64_t, int64_t, int, const char*);                      \
  template void gates_backward<T>(const T*, const T*, const T*, const T*, T*, T*, int64_t, int64_t, int, const char*); \
  template void warp_forward<T>(const T*, const T*, T*, int64_t, int, int, int, bool, int, const char*);               \
  template void warp_backward<T>(const T*, const T*, const T*, T*, T*, int64_t, int, int, int, bool, int,              \
                                 const char*);                                                                         \
  template void flow_loss<T>(const T*, const T*, const T*, T*, T*, int64_t, int, int, int, double, double, int,        \
                             const char*);                                                                             \
  template void modulate_forward<T>(const T*, const T*, const T*, T*, int64_t, int64_t, int64_t, int64_t,              \
                                    const std::vector<Feature<T>>&, int, const char*);                                 \
  template void modulate_backward<T>(const T*, const T*, const T*, T*, T*, T*, int64_t, int64_t, int64_t, int64_t,     \
                                     int, const char*);                                                                \
  template void gather_tiles<T>(const Tiles<T>&, const T*, T*, int, const char*);                                      \
  template void scatter_tiles<T>(const Tiles<T>&, const T*, T*, int, const char*);
AVFAST_FUSED(float)
AVFAST_FUSED(double)

}  // namespace avfast::fused
