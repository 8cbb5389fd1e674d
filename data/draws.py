"""Draws: which row of a dataset a training sample comes from, and the random numbers of that sample."""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from torch.utils.data import Sampler

# Independent sequences of random numbers with the same seed.
AUGMENTATION_STREAM, SHUFFLE_STREAM, RARE_CLASS_STREAM, SOURCE_STREAM = range(4)


def random_generator(seed: int, epoch: int, position: int, stream: int) -> np.random.Generator:
    """A generator that depends only on its arguments; different streams are independent."""
    return np.random.Generator(np.random.Philox(np.random.SeedSequence(seed, spawn_key=(stream, epoch, position))))


class Draw(NamedTuple):
    """
    One training sample: the index type of [`~mfuser.data.augmentation.AugmentedDataset`], yielded by its samplers.

    A draw contains its epoch, since neither persistent workers nor data loaders prepared by Accelerate for several
    processes report a new epoch to the dataset.

    Attributes:
        row (`int`):
            Index of the row in the dataset.
        epoch (`int`):
            Epoch, which seeds the sample's random numbers together with `position` and the dataset's seed.
        position (`int`):
            Position of the sample in the epoch.
        class_id (`int`, *optional*):
            Class of which the crop should hold more than `min_class_pixels` pixels.
        min_class_pixels (`float`, *optional*, defaults to 0):
            See `class_id`.
    """

    row: int
    epoch: int
    position: int
    class_id: int | None = None
    min_class_pixels: float = 0


class DrawSampler(Sampler[Draw]):
    """
    Base class of the samplers. The draw at position k depends only on (seed, epoch, k).

    A resumed run therefore continues with the same draws, and the processes of a distributed run receive disjoint
    parts of one sequence.

    Args:
        num_samples (`int`):
            Number of draws per epoch.
        seed (`int`):
            Non-negative seed.
    """

    def __init__(self, num_samples: int, seed: int):
        self.num_samples = num_samples
        self.seed = seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return self.num_samples

    def __iter__(self) -> Iterator[Draw]:
        epoch = self.epoch
        return (self.draw(epoch, position) for position in range(self.num_samples))

    def draw(self, epoch: int, position: int) -> Draw:
        """The draw at a position. A sampler whose draws depend on each other defines `__iter__` instead."""
        raise NotImplementedError


class ShuffledSampler(DrawSampler):
    """
    Draws every row once per epoch, in a random order that depends only on the seed and the epoch.

    Args:
        num_rows (`int`):
            Number of rows of the dataset.
        seed (`int`, *optional*, defaults to 0):
            Non-negative seed of the order.
    """

    def __init__(self, num_rows: int, seed: int = 0):
        super().__init__(num_rows, seed)

    def __iter__(self) -> Iterator[Draw]:
        epoch = self.epoch
        order = random_generator(self.seed, epoch, 0, SHUFFLE_STREAM).permutation(self.num_samples)
        return (Draw(row, epoch, position) for position, row in enumerate(order.tolist()))
