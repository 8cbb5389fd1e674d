"""Layout of a directed graph in ranks from top to bottom (Sugiyama, Tagawa and Toda, 1981)."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import pairwise

Graph = dict[str, set[str]]

WAYPOINT_WIDTH = 2  # of the empty place that a long arrow keeps in each rank it passes
STRAIGHTNESS = 300.0  # the weight of a waypoint, where other items weigh their width


def components(graph: Graph) -> list[Graph]:
    """The connected parts of a graph, the smallest first."""
    parts: list[Graph] = []
    for node in sorted(graph):
        touched = [part for part in parts if graph[node] & part.keys() or any(node in part[other] for other in part)]
        parts = [part for part in parts if part not in touched]
        parts.append({node: graph[node]})
        for part in touched:
            parts[-1].update(part)
    return sorted(parts, key=lambda part: (len(part), sorted(part)))


@dataclass
class Item:
    """Something with a place in a drawing: a module's box, a group's frame, or the waypoint of a long arrow."""

    width: float
    height: float
    x: float = 0.0  # of its centre
    y: float = 0.0  # of its top

    @property
    def weight(self) -> float:
        """How much it counts when others are placed; that of waypoints keeps long arrows straight."""
        return STRAIGHTNESS if self.width == WAYPOINT_WIDTH else self.width


@dataclass
class Drawing:
    """Items in ranks, and the arrows between them as lists of the items that each passes."""

    items: dict[str, Item]
    arrows: list[list[str]] = field(default_factory=list)
    width: float = 0.0
    height: float = 0.0

    def move(self, x: float, y: float) -> None:
        for item in self.items.values():
            item.x += x
            item.y += y


def ranks_of(graph: Graph) -> dict[str, int]:
    """Ranks, counted from the bottom: directly below the lowest importer, or above the imports if there is none."""
    height: dict[str, int] = {}

    def measure(node: str) -> int:
        if node not in height:
            height[node] = 1 + max(map(measure, graph[node]), default=-1)
        return height[node]

    ranks: dict[str, int] = {}
    for node in sorted(graph, key=measure, reverse=True):  # importers first
        importers = [ranks[other] for other in graph if node in graph[other]]
        ranks[node] = min(importers) - 1 if importers else height[node]
    return ranks


def arrange(items: dict[str, Item], graph: Graph, rank_gap: float, item_gap: float) -> Drawing:
    """
    Places items in ranks from top to bottom (Sugiyama's method).

    Args:
        items (`dict[str, Item]`):
            The items, whose places are set.
        graph (`dict[str, set[str]]`):
            The arrows between them, without cycles.
        rank_gap (`float`):
            Vertical distance between ranks.
        item_gap (`float`):
            Smallest horizontal distance between items of a rank.

    Returns:
        [`Drawing`]: The items, with a waypoint for each rank that an arrow passes, and the arrows.
    """
    ranks = ranks_of(graph)
    drawing = Drawing(dict(items))
    rows: list[list[str]] = [[] for _ in range(max(ranks.values(), default=0) + 1)]
    for node in sorted(graph):
        rows[ranks[node]].append(node)
    neighbours: dict[str, list[str]] = {node: [] for node in graph}
    for node in sorted(graph):
        for target in sorted(graph[node]):
            arrow = [node]
            for rank in range(ranks[node] - 1, ranks[target], -1):
                waypoint = f"{node}>{target}@{rank}"
                drawing.items[waypoint] = Item(WAYPOINT_WIDTH, 0)
                rows[rank].append(waypoint)
                neighbours[waypoint] = []
                arrow.append(waypoint)
            arrow.append(target)
            for above, below in pairwise(arrow):
                neighbours[above].append(below)
                neighbours[below].append(above)
            drawing.arrows.append(arrow)
    rows.reverse()

    order_rows(rows, neighbours)
    place_rows(rows, neighbours, drawing.items, item_gap)
    top = 0.0
    for row in rows:
        height = max(drawing.items[node].height for node in row)
        for node in row:
            item = drawing.items[node]
            item.height = item.height or height  # a waypoint is as high as its rank
            item.y = top
        top += height + rank_gap
    left = min(item.x - item.width / 2 for item in drawing.items.values())
    for item in drawing.items.values():
        item.x -= left
    drawing.width = max(item.x + item.width / 2 for item in drawing.items.values())
    drawing.height = top - rank_gap
    return drawing


def crossings(rows: list[list[str]], neighbours: Mapping[str, list[str]]) -> int:
    """How many pairs of arrows cross."""
    total = 0
    for upper, lower in pairwise(rows):
        position = {node: index for index, node in enumerate(lower)}
        ends = [sorted(position[other] for other in neighbours[node] if other in position) for node in upper]
        flat = [end for group in ends for end in group]
        total += sum(first > second for index, first in enumerate(flat) for second in flat[index + 1 :])
    return total


def order_rows(rows: list[list[str]], neighbours: Mapping[str, list[str]]) -> None:
    """Orders each rank by the mean position of its neighbours, downwards and upwards, and keeps the best order."""
    best, fewest = [list(row) for row in rows], crossings(rows, neighbours)
    for sweep in range(24):
        sequence = rows[1:] if sweep % 2 == 0 else rows[-2::-1]
        fixed_rows = rows if sweep % 2 == 0 else rows[:0:-1]
        for row, fixed in zip(sequence, fixed_rows, strict=False):
            position = {node: index for index, node in enumerate(fixed)}
            means = {}
            for index, node in enumerate(row):
                places = [position[other] for other in neighbours[node] if other in position]
                means[node] = sum(places) / len(places) if places else float(index)
            row.sort(key=means.__getitem__)
        if (count := crossings(rows, neighbours)) < fewest:
            best, fewest = [list(row) for row in rows], count
    rows[:] = best


def place_rows(rows: list[list[str]], neighbours: Mapping[str, list[str]], items: dict[str, Item], gap: float) -> None:
    """Sets `x`: each item as near to the mean of its neighbours as the order and the gaps of its rank allow."""

    def wish(node: str) -> float:
        return mean([(items[other].weight, items[other].x) for other in neighbours[node] or [node]])

    for row in rows:
        spread(row, [0.0] * len(row), items, gap)
    for sweep in range(300):
        for row in rows if sweep % 2 == 0 else reversed(rows):
            spread(row, [wish(node) for node in row], items, gap)


def spread(row: list[str], wishes: list[float], items: dict[str, Item], gap: float) -> None:
    """The positions nearest to `wishes` in the least-squares sense at which no two items of the row overlap."""
    offsets = [0.0]
    for left, right in pairwise(row):
        offsets.append(offsets[-1] + (items[left].width + items[right].width) / 2 + gap)
    blocks: list[list[tuple[float, float]]] = []  # items pushed against each other share the mean of their wishes
    for node, wish, offset in zip(row, wishes, offsets, strict=True):
        blocks.append([(items[node].weight, wish - offset)])
        while len(blocks) > 1 and mean(blocks[-2]) > mean(blocks[-1]):
            last = blocks.pop()
            blocks[-1] += last
    starts = [mean(block) for block in blocks for _ in block]
    for node, start, offset in zip(row, starts, offsets, strict=True):
        items[node].x = start + offset


def mean(weighted: list[tuple[float, float]]) -> float:
    """The mean of (weight, value) pairs."""
    return sum(weight * value for weight, value in weighted) / sum(weight for weight, _ in weighted)
