"""Values that depend on a shape alone are built once."""

import copy
import pickle

import pytest
import torch

from shared.library import KeptByShape


class Grid:
    def __init__(self):
        self.built = []

    def points(self, sizes, device="cpu"):
        self.built.append(tuple(map(tuple, sizes)))
        return [torch.arange(height * width, device=device).float() for height, width in sizes]

    def like(self, maps):
        return self.points([each.shape[-2:] for each in maps])


@pytest.fixture
def grid():
    grid = Grid()
    grid.points = KeptByShape(grid.points, count=2)
    return grid


def test_values_that_depend_on_a_shape_are_built_once(grid):
    first, second = grid.points([(2, 3), (1, 1)]), grid.points([torch.Size([2, 3]), [1, 1]])
    assert all(a is b for a, b in zip(first, second, strict=True))
    grid.points([(2, 3), (1, 1)], device="meta")
    assert grid.built == 2 * [((2, 3), (1, 1))]


def test_a_tensor_counts_by_its_shape_type_and_device(grid):
    like = KeptByShape(grid.like)
    like([torch.zeros(1, 4, 2, 3)])
    like([torch.ones(1, 4, 2, 3)])
    assert len(like._kept) == 1
    like([torch.ones(1, 4, 3, 2)])
    like([torch.ones(1, 4, 2, 3, dtype=torch.bfloat16)])
    assert len(like._kept) == 3


def test_the_last_sizes_are_kept(grid):
    for size in ((1, 1), (2, 2), (1, 1), (3, 3), (1, 1), (2, 2)):
        grid.points([size])
    assert grid.built == [((1, 1),), ((2, 2),), ((3, 3),), ((2, 2),)]


def test_a_grid_that_was_written_into_is_rebuilt(grid):
    grid.points([(2, 2)])[0][1:] += 5  # through a view
    assert grid.points([(2, 2)])[0].tolist() == [0, 1, 2, 3]
    grid.points([(2, 2)]).clear()
    assert len(grid.points([(2, 2)])) == 1


def test_values_built_in_inference_mode_are_not_kept_for_training(grid):
    with torch.inference_mode():
        grid.points([(2, 2)])
    weight = torch.ones(4, requires_grad=True)
    (weight * grid.points([(2, 2)])[0]).sum().backward()
    assert weight.grad.tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda grid: pickle.loads(pickle.dumps(grid))])
def test_a_copy_builds_its_own(grid, copied):
    grid.points([(2, 2)])
    other = copied(grid)
    assert other.points([(2, 2)])[0] is not grid.points([(2, 2)])[0]
    assert other.built == 2 * [((2, 2),)]
    assert grid.built == [((2, 2),)]
