"""The pictures of `kat study mcla`."""

import re
from statistics import fmean

from katcore.pipeline.chart import Point
from katcore.study.mcla import Report
from katcore.study.plot import lines, page, picture


def pictures(report: Report) -> str:
    """A page: what noise is left by how many passes, what it clips, and the runs."""
    figures = []
    for found in report.noises:
        left = {
            "measured": [(float(row.passes), row.mean_square) for row in found.rows],
            "theory": [(float(row.passes), row.theory) for row in found.rows],
        }
        figures.append(lines(f"mean square error, {found.name}", left, is_log=True, unit="passes"))
    clips = {
        found.name: [(float(row.passes), row.clipped) for row in found.rows]
        for found in report.noises
    }
    figures.append(lines("turns that noise alone clips", clips, unit="passes"))
    figures += [
        lines(f"reward of what was learnt, by step, mean of seeds, {source}", series, unit="steps")
        for source, series in _learnt(report).items()
    ]
    return page("Averaging log-probabilities", figures)


def curves(report: Report) -> dict[str, str]:
    """By name of the engine, an SVG of its runs."""
    return {
        re.sub(r"\W+", "-", source): picture("reward of what was learnt", series, unit="steps")
        for source, series in _learnt(report).items()
    }


def _learnt(report: Report) -> dict[str, dict[str, list[Point]]]:
    """By engine and way the mean over seeds, beside that of the engine without noise."""
    calm, *noisy = dict.fromkeys(run.entry.source for run in report.runs)
    beside = {"without noise": _mean_curve(report, calm, "one pass")}
    return {
        source: beside
        | {
            way: _mean_curve(report, source, way)
            for way in dict.fromkeys(r.entry.way for r in report.runs if r.entry.source == source)
        }
        for source in noisy
    }


def _mean_curve(report: Report, source: str, way: str) -> list[Point]:
    """The mean over seeds of what was learnt, smoothed over three points."""
    every, last = report.settings.shape.every, report.settings.shape.steps
    means = [
        fmean(values)
        for values in zip(*(run.learnt for run in report.of(source, way)), strict=True)
    ]
    return [
        (float(min(last, every * (at + 1))), fmean(means[max(0, at - 2) : at + 1]))
        for at in range(len(means))
    ]
