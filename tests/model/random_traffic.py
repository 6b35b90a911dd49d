"""Requests that arrive at a World at random, prefill in chunks, and leave at any time."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

from world import World

SHORTEST = 176  # tokens of a prompt
MOST_REQUESTS = 4


class Arrivals(NamedTuple):
    """The arguments of World.step that traffic decides, and who may decode."""

    prefill: dict[str, int]
    chunk: dict[str, int]
    gone: list[str]
    complete: list[str]  # requests whose prompt was complete before this step


@dataclass
class RandomTraffic:
    rng: random.Random
    longest: int  # tokens of a prompt
    least_free: int  # blocks with which a request may come
    leaving: float  # share of the requests that leave in a step
    arriving: float  # share of the steps with a new request
    _numbers: Iterator[int] = field(default_factory=itertools.count)

    def step(self, world: World) -> Arrivals:
        """Of the next step. Some chunks are as short and as long as they can be."""
        rng = self.rng
        gone = [r for r in world.books if rng.random() < self.leaving]
        staying = [r for r in world.books if r not in gone]
        prefill, chunk = {}, {}
        for request_id in staying:
            books = world.books[request_id]
            if (rest := books.prompt_tokens - books.num_computed) > 0:
                chunk[request_id] = rng.choice([1, rest, rng.randint(1, rest)])
        has_room = len(staying) < MOST_REQUESTS and len(world.free) > self.least_free
        if has_room and rng.random() < self.arriving:
            new, length = f"request-{next(self._numbers)}", rng.randint(SHORTEST, self.longest)
            prefill[new] = length
            chunk[new] = rng.choice([1, length, length - 1, rng.randint(1, length)])
        return Arrivals(prefill, chunk, gone, [r for r in staying if r not in chunk])
