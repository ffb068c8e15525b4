"""How a convolution's maps are cut into Winograd tiles, and put together again.

Along an axis the pixels lie in as many phases as the stride, and each phase meets r = kernel / stride taps at stride 1:
m outputs take m + r - 1 products where the direct sum takes m r. Over both axes, in tiles of m x m outputs, that is
N = (m + r - 1)^2 matrix products between all M tiles and S = stride^2 phases of all channels: 25 products for a 3x3
map and a 3x3 kernel where the sum has 81, 40 % of them with padding; 2.25 to 2.8 times fewer than the sum's for a 4x4
kernel of stride 2. C++ cuts maps into tiles and adds tiles up to maps (csrc/fused).

Shape legend: C channels, N products, M tiles, S phases as above."""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from .. import native
from .transforms import Transforms, best_tile, winograd_transforms


class Geometry(NamedTuple):
    """Sizes of a convolution, also where it runs backwards: its inputs' height and width; kernel, stride and padding of
    both axes. The kernel is a multiple of the stride."""

    height: int
    width: int
    kernel: int
    stride: int
    padding: int

    @property
    def taps(self) -> int:
        """Of the kernel, per phase and axis."""
        return self.kernel // self.stride

    def output_size(self, size: int) -> int:
        """Outputs along an axis of `size` inputs."""
        return (size + 2 * self.padding - self.kernel) // self.stride + 1

    def axes(self) -> list[tuple[Transforms, int, int]]:
        """Of the rows and of the columns: (transforms, outputs per tile, tiles)."""
        tiles = [best_tile(self.output_size(n), self.taps) for n in (self.height, self.width)]
        return [(winograd_transforms(size, self.taps), size, count) for size, count in tiles]


class Axis(NamedTuple):
    """An axis of a map, cut into tiles."""

    matrix: Tensor
    """(products of a tile, pixels that a tile takes)."""
    size: int
    """Of the map."""
    tiles: int
    step: int
    """From tile to tile."""

    def sizes(self) -> tuple[int, int, int, int, int]:
        """AxisSizes of csrc/fused/ops.h."""
        products, pixels = self.matrix.shape
        return self.size, self.tiles, pixels, products, self.step


class TileGrid(NamedTuple):
    """How the input maps or the output maps of a convolution are cut into tiles: the arguments of the C++ functions."""

    rows: Axis
    columns: Axis
    stride: int
    padding: int

    @property
    def tiles(self) -> int:
        """Tiles of one map."""
        return self.rows.tiles * self.columns.tiles

    def gather(self, *maps: Tensor) -> Tensor:
        """Cut channels-last batches (B,C,H,W), one after the other, into products (N,M,S*C)."""
        count = len(self.rows.matrix) * len(self.columns.matrix)
        values = self.stride**2 * maps[0].shape[1]
        tiles = self.tiles * sum(map(len, maps))
        # no power of two: the products of one tile would share one set of a cache
        product_stride = -(-tiles * values // 1024) * 1024 + 64
        memory = maps[0].new_empty((count, product_stride))
        products = memory.as_strided((count, tiles, values), (product_stride, values, 1))
        first = 0
        for x in maps:
            last = first + len(x) * self.tiles
            self._call("gather_tiles", {"map": x}, {"products": products[:, first:last]}, x, product_stride)
            first = last
        return products

    def scatter(self, products: Tensor, out: Tensor) -> None:
        """Add products (N,B*tiles,S*C) up to channels-last maps (B,C,H,W): the adjoint of `gather`."""
        self._call("scatter_tiles", {"products": products}, {"map": out}, out, products.stride(0))

    def _call(
        self, name: str, given: dict[str, Tensor], taken: dict[str, Tensor | None], maps: Tensor, product_stride: int
    ) -> None:
        inputs = {**given, "rows": self.rows.matrix, "columns": self.columns.matrix}
        sizes = {"batch": maps.shape[0], "channels": maps.shape[1], "product_stride": product_stride}
        axes = {"row_sizes": self.rows.sizes(), "column_sizes": self.columns.sizes()}
        native.call(name, maps.dtype, inputs, taken, **sizes, stride=self.stride, padding=self.padding, **axes)


# outside inference mode, whoever asks first: tensors made in inference mode could not serve training later
@cache
@torch.inference_mode(False)
def tile_grids(geometry: Geometry, dtype: torch.dtype) -> tuple[TileGrid, TileGrid]:
    """The tiles of the convolution's inputs and of its outputs."""
    inputs, outputs = [], []
    for size, (transforms, step, tiles) in zip(geometry[:2], geometry.axes(), strict=True):
        inputs.append(Axis(transforms.input_transform.to(dtype).contiguous(), size, tiles, step))
        to_outputs = transforms.output_transform.T.to(dtype).contiguous()
        outputs.append(Axis(to_outputs, geometry.output_size(size), tiles, step))
    return TileGrid(inputs[0], inputs[1], geometry.stride, geometry.padding), TileGrid(outputs[0], outputs[1], 1, 0)


@cache
@torch.inference_mode(False)
def _tap_transform(geometry: Geometry, dtype: torch.dtype) -> Tensor:
    """(N*S, kernel^2): from the kernel's taps, row by row, to the weight of every product and phase."""
    rows, columns = (transforms.filter_transform for transforms, _, _ in geometry.axes())
    phases = torch.eye(geometry.stride, dtype=torch.float64)
    # tap stride i + p belongs to phase p
    weights = torch.einsum("ai,bj,px,qy->abpqixjy", rows, columns, phases, phases)
    return weights.reshape(-1, geometry.kernel**2).to(dtype)


def transform_weight(weight: Tensor, geometry: Geometry) -> Tensor:
    """(O,C,kernel,kernel) -> (N,S*C,O)."""
    by_tap = weight.permute(2, 3, 1, 0).reshape(geometry.kernel**2, -1)
    values = geometry.stride**2 * weight.shape[1]
    return (_tap_transform(geometry, weight.dtype) @ by_tap).view(-1, values, weight.shape[0])
