// Tiles of channels-last maps for convolutions by minimal filtering (ops.def, kernels/winograd).
#pragma once

#include "loops.h"

namespace avfast::AVFAST_ISA {
namespace {

constexpr int kMaxPixels = fused::kMaxTilePixels;
// Channels that are transformed at a time: what a tile holds between its two axes stays in the level 1 cache.
constexpr int64_t kChannels = 64;

// ---- products of a matrix and vectors ----

// to[a] = sum over k of matrix[a][k] from[k], vectors of `count` values; kAdd: added to what is there.
template <int kInputs, bool kAdd>
void combine_inputs(const T* matrix, int outputs, const T* const* from, T* const* to, int64_t count) {
  for_lanes<Wide>(
      count, AVFAST_LANES(x, n) {
        Wide values[kInputs];
        for (int k = 0; k < kInputs; ++k) values[k] = Wide::load_first(from[k] + x, n);
        const T* factor = matrix;
        for (int a = 0; a < outputs; ++a, factor += kInputs) {
          Wide sum = Wide(factor[0]) * values[0];
          for (int k = 1; k < kInputs; ++k) sum = multiply_add(Wide(factor[k]), values[k], sum);
          if (kAdd) sum = sum + Wide::load_first(to[a] + x, n);
          sum.store_first(to[a] + x, n);
        }
      });
}

// matrix [outputs, inputs], 1 <= inputs <= kMaxPixels. The loop is compiled for every number of inputs.
template <int kInputs = 1>
void combine(const T* matrix, int outputs, int inputs, const T* const* from, T* const* to, int64_t count, bool add) {
  if (inputs == kInputs) {
    add ? combine_inputs<kInputs, true>(matrix, outputs, from, to, count)
        : combine_inputs<kInputs, false>(matrix, outputs, from, to, count);
  } else if constexpr (kInputs < kMaxPixels) {
    combine<kInputs + 1>(matrix, outputs, inputs, from, to, count, add);
  }
}

// ---- where the pixels and products of a tile are ----

struct Tiling {
  AxisSizes rows, columns;
  int64_t channels;
  int stride, padding;
  int64_t product_stride;  // values from one product of a tile to the next

  int64_t row_values() const { return columns.size * channels; }
  int64_t image_values() const { return rows.size * row_values(); }
};

// One tile of one phase of one image, for channels from `channel` on. Pixels outside the map are read from and written
// to `outside`.
struct Tile {
  T* map;
  T* products;
  int64_t product_stride, columns;
  int64_t row_offset[kMaxPixels], column_offset[kMaxPixels];  // in values; below 0 outside the map
  int64_t channel;
  T* outside;

  T* pixel(int i, int j) const {
    return row_offset[i] < 0 || column_offset[j] < 0 ? outside : map + row_offset[i] + column_offset[j] + channel;
  }
  T* product(int a, int b) const { return products + (a * columns + b) * product_stride + channel; }
};

// The offsets of a tile's pixels along one axis, where one pixel is `values` values after the other.
void find_pixels(const Tiling& tiling, const AxisSizes& axis, int64_t tile, int phase, int64_t values,
                 int64_t* offsets) {
  for (int i = 0; i < axis.pixels; ++i) {
    const int64_t pixel = tiling.stride * (axis.step * tile + i) + phase - tiling.padding;
    offsets[i] = pixel < 0 || pixel >= axis.size ? -1 : pixel * values;
  }
}

// Calls body(tile, count of channels) for all tiles of the rows of tiles begin .. end - 1, counted over all images.
template <class Body>
void for_tiles(const Tiling& tiling, T* map, T* products, int64_t begin, int64_t end, T* outside, const Body& body) {
  const AxisSizes &rows = tiling.rows, &columns = tiling.columns;
  const int64_t phases = static_cast<int64_t>(tiling.stride) * tiling.stride;
  Tile tile{};
  tile.product_stride = tiling.product_stride;
  tile.columns = columns.products;
  tile.outside = outside;
  tile.products = products + begin * columns.tiles * phases * tiling.channels;
  for (int64_t i = begin; i < end; ++i) {
    tile.map = map + i / rows.tiles * tiling.image_values();
    for (int64_t column = 0; column < columns.tiles; ++column) {
      for (int phase = 0; phase < phases; ++phase, tile.products += tiling.channels) {
        find_pixels(tiling, rows, i % rows.tiles, phase / tiling.stride, tiling.row_values(), tile.row_offset);
        find_pixels(tiling, columns, column, phase % tiling.stride, tiling.channels, tile.column_offset);
        for (tile.channel = 0; tile.channel < tiling.channels; tile.channel += kChannels) {
          body(tile, smaller(kChannels, tiling.channels - tile.channel));
        }
      }
    }
  }
}

// ---- the ops ----

void gather_tiles(const T* map, const T* rows, const T* columns, T* products, int64_t batch, int64_t channels,
                  int64_t product_stride, int stride, int padding, AxisSizes row_sizes, AxisSizes column_sizes,
                  int threads) {
  const Tiling tiling{row_sizes, column_sizes, channels, stride, padding, product_stride};
  share(batch * row_sizes.tiles, batch * tiling.image_values(), threads, [&](int64_t begin, int64_t end) {
    T zeros[kChannels] = {};
    T between[kMaxPixels][kMaxPixels][kChannels];  // [product of the rows][pixel of the columns]
    const auto transform = [&](const Tile& tile, int64_t count) {
      const T* from[kMaxPixels];
      T* to[kMaxPixels];
      for (int j = 0; j < column_sizes.pixels; ++j) {
        for (int i = 0; i < row_sizes.pixels; ++i) from[i] = tile.pixel(i, j);
        for (int a = 0; a < row_sizes.products; ++a) to[a] = between[a][j];
        combine(rows, row_sizes.products, row_sizes.pixels, from, to, count, false);
      }
      for (int a = 0; a < row_sizes.products; ++a) {
        for (int j = 0; j < column_sizes.pixels; ++j) from[j] = between[a][j];
        for (int b = 0; b < column_sizes.products; ++b) to[b] = tile.product(a, b);
        combine(columns, column_sizes.products, column_sizes.pixels, from, to, count, false);
      }
    };
    for_tiles(tiling, const_cast<T*>(map), products, begin, end, zeros, transform);
  });
}

// A matrix [products, pixels] as [pixels, products].
struct Transposed {
  T values[kMaxPixels * kMaxPixels];

  Transposed(const T* matrix, const AxisSizes& axis) {
    for (int p = 0; p < axis.products; ++p) {
      for (int i = 0; i < axis.pixels; ++i) values[i * axis.products + p] = matrix[p * axis.pixels + i];
    }
  }
};

void scatter_tiles(const T* products, const T* rows, const T* columns, T* map, int64_t batch, int64_t channels,
                   int64_t product_stride, int stride, int padding, AxisSizes row_sizes, AxisSizes column_sizes,
                   int threads) {
  const Tiling tiling{row_sizes, column_sizes, channels, stride, padding, product_stride};
  const int64_t image = tiling.image_values();
  const bool overlap = row_sizes.pixels > row_sizes.step || column_sizes.pixels > column_sizes.step;
  const Transposed row_matrix(rows, row_sizes), column_matrix(columns, column_sizes);
  // overlapping tiles of an image are added up by one thread, always in the same order
  const int64_t owned = overlap ? row_sizes.tiles : 1;
  share(batch * row_sizes.tiles / owned, batch * image, threads, [&](int64_t begin, int64_t end) {
    if (overlap) set_zero(map + begin * image, (end - begin) * image);
    T nowhere[kChannels] = {};
    T between[kMaxPixels][kMaxPixels][kChannels];  // [pixel of the columns][product of the rows]
    const auto transform = [&](const Tile& tile, int64_t count) {
      const T* from[kMaxPixels];
      T* to[kMaxPixels];
      for (int a = 0; a < row_sizes.products; ++a) {
        for (int b = 0; b < column_sizes.products; ++b) from[b] = tile.product(a, b);
        for (int j = 0; j < column_sizes.pixels; ++j) to[j] = between[j][a];
        combine(column_matrix.values, column_sizes.pixels, column_sizes.products, from, to, count, false);
      }
      for (int j = 0; j < column_sizes.pixels; ++j) {
        for (int a = 0; a < row_sizes.products; ++a) from[a] = between[j][a];
        for (int i = 0; i < row_sizes.pixels; ++i) to[i] = tile.pixel(i, j);
        combine(row_matrix.values, row_sizes.pixels, row_sizes.products, from, to, count, overlap);
      }
    };
    for_tiles(tiling, map, const_cast<T*>(products), begin * owned, end * owned, nowhere, transform);
  });
}

}  // namespace
}  // namespace avfast::AVFAST_ISA
