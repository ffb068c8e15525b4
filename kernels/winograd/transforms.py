"""Winograd's minimal filtering: m outputs of a filter of r taps from m + r - 1 products, as Toom and Cook construct it.

Source: Winograd 1980; for convolutions Lavin and Gray, CVPR 2016.
"""

from __future__ import annotations

from fractions import Fraction
from typing import NamedTuple

import torch
from torch import Tensor

_POINTS = [Fraction(p) for p in (0, 1, -1, 2, -2)]


class Filtering(NamedTuple):
    """The three linear maps, in double; outputs = outputs @ ((taps @ filter) * (inputs @ signal)), n products."""

    taps: Tensor
    """(n, r)"""
    inputs: Tensor
    """(n, n): of the n signal values that m outputs depend on."""
    outputs: Tensor
    """(m, n)"""


def minimal_filtering(size: int, taps: int) -> Filtering:
    """F(size, taps), evaluated at the first points and at infinity; exact but for the conversion to double."""
    points = _POINTS[: size + taps - 2]
    of_taps, of_inputs = [], []
    for point in points:
        others = [p for p in points if p != point]
        weight = Fraction(1)
        for other in others:
            weight *= point - other
        of_taps.append([point**i / weight for i in range(taps)])
        of_inputs.append([*_with_roots(others), Fraction(0)])
    of_taps.append([Fraction(0)] * (taps - 1) + [Fraction(1)])
    of_inputs.append(_with_roots(points))
    of_outputs = [[point**i for point in points] + [Fraction(i == size - 1)] for i in range(size)]
    return Filtering(_double(of_taps), _double(of_inputs), _double(of_outputs))


def cheapest_size(length: int, taps: int) -> tuple[int, int]:
    """(size, tiles) that give `length` outputs from the fewest products; of equals the smallest, which errs least."""
    sizes = range(2, len(_POINTS) + 3 - taps)
    size = min(sizes, key=lambda m: -(-length // m) * (m + taps - 1))
    return size, -(-length // size)


def _double(rows: list[list[Fraction]]) -> Tensor:
    return torch.tensor([[float(x) for x in row] for row in rows], dtype=torch.float64)


def _with_roots(roots: list[Fraction]) -> list[Fraction]:
    """Coefficients, constant first, of the polynomial with these roots and leading coefficient 1."""
    polynomial = [Fraction(1)]
    for root in roots:
        shifted = [Fraction(0), *polynomial]
        polynomial = [a - root * b for a, b in zip(shifted, [*polynomial, Fraction(0)], strict=True)]
    return polynomial
