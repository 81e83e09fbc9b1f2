"""One picture of each workload: every round a dot, the median a line; needs ``matplotlib``."""

from __future__ import annotations

import re
from pathlib import Path

from benchmarks.measuring import list_points
from benchmarks.points import Measured
from benchmarks.spread import find_spread

OURS, OTHERS = "#1f6f8b", "#c1666b"


def write_plot(folder: Path, measured: Measured) -> Path | None:
    """Write the picture of a workload and return where it is; ``None`` if there is nothing to show."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    points = list_points(measured)
    if not points:
        return None
    workload = measured.workload
    cases = list(dict.fromkeys(point.case for point in points))
    most = max(sum(point.case == case for point in points) for case in cases)
    figure, places = pyplot.subplots(
        1, len(cases), figsize=(3.0 + 3.2 * len(cases), 1.8 + 0.35 * most), squeeze=False, layout="constrained"
    )
    for place, case in zip(places[0], cases, strict=True):
        names = [point.contender for point in points if point.case == case][::-1]
        for height, point in enumerate([point for point in points if point.case == case][::-1]):
            values = list(measured.by_round(point).values())
            color = OURS if point.contender.startswith("ours") else OTHERS
            place.plot(values, [height] * len(values), "o", color=color, alpha=0.5, markersize=5)
            spread = find_spread(values)
            assert spread is not None
            place.plot([spread.median] * 2, [height - 0.3, height + 0.3], color=color, linewidth=3)
        place.set_yticks(range(len(names)), names)
        place.set_ylim(-0.6, len(names) - 0.4)
        every = [value for point in points if point.case == case for value in measured.by_round(point).values()]
        place.set_xlim(min(0.0, 1.1 * min(every)), 1.1 * max(0.0, *every))
        place.set_title(case, fontsize=10)
        place.set_xlabel(workload.unit)
        place.grid(axis="x", alpha=0.3)
    figure.suptitle(workload.title, fontsize=11)
    path = folder / f"{re.sub('[^a-z0-9]+', '-', workload.name)}.svg"
    figure.savefig(path)
    pyplot.close(figure)
    return path
