"""Winograd's minimal filtering F(m, r): m outputs of a filter of r taps from m + r - 1 products.

The transforms are constructed by the Toom-Cook method: polynomials are evaluated at some points and at infinity.
Source: Winograd 1980; for convolutions Lavin and Gray, CVPR 2016."""

from __future__ import annotations

from fractions import Fraction
from math import prod
from typing import NamedTuple

import torch
from torch import Tensor

_POINTS = [Fraction(p) for p in (0, 1, -1, 2, -2)]


class Transforms(NamedTuple):
    """The three linear maps in float64: outputs = output_transform @ ((filter_transform @ filter) * (input_transform @
    inputs)), n = m + r - 1 products."""

    filter_transform: Tensor
    """G (n, r)."""
    input_transform: Tensor
    """B^T (n, n), of the n inputs that m outputs depend on."""
    output_transform: Tensor
    """A^T (m, n)."""


def winograd_transforms(outputs: int, taps: int) -> Transforms:
    """The transforms of F(outputs, taps), computed with fractions and then rounded to float64."""
    points = _POINTS[: outputs + taps - 2]
    filter_rows, input_rows = [], []
    for point in points:
        others = [p for p in points if p != point]
        scale = prod((point - other for other in others), start=Fraction(1))
        filter_rows.append([point**i / scale for i in range(taps)])
        input_rows.append([*_polynomial(others), Fraction(0)])
    # the point at infinity
    filter_rows.append([Fraction(0)] * (taps - 1) + [Fraction(1)])
    input_rows.append(_polynomial(points))
    output_rows = [[point**i for point in points] + [Fraction(i == outputs - 1)] for i in range(outputs)]
    return Transforms(_float64(filter_rows), _float64(input_rows), _float64(output_rows))


def best_tile(length: int, taps: int) -> tuple[int, int]:
    """(outputs per tile, tiles) that give `length` outputs from the fewest products. Of equals it is the smallest tile,
    which has the smallest rounding error."""
    sizes = range(2, len(_POINTS) + 3 - taps)
    size = min(sizes, key=lambda m: -(-length // m) * (m + taps - 1))
    return size, -(-length // size)


def _float64(rows: list[list[Fraction]]) -> Tensor:
    return torch.tensor([[float(x) for x in row] for row in rows], dtype=torch.float64)


def _polynomial(roots: list[Fraction]) -> list[Fraction]:
    """Coefficients, constant first, of the polynomial with these roots and leading coefficient 1."""
    polynomial = [Fraction(1)]
    for root in roots:
        shifted = [Fraction(0), *polynomial]
        polynomial = [a - root * b for a, b in zip(shifted, [*polynomial, Fraction(0)], strict=True)]
    return polynomial
