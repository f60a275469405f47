"""The pictures of `kat study mcla`."""

from statistics import fmean

from katcore.pipeline.chart import Point
from katcore.study.mcla import Report
from katcore.study.plot import lines, page


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
    for source in dict.fromkeys(run.entry.source for run in report.runs):
        ways = dict.fromkeys(run.entry.way for run in report.runs)
        curves = {way: _mean_curve(report, source, way) for way in ways}
        figures.append(lines(f"reward by step, mean of seeds, {source}", curves, unit="steps"))
    return page("Averaging log-probabilities", figures)


def _mean_curve(report: Report, source: str, way: str) -> list[Point]:
    """The mean over seeds of the reward, smoothed over five steps."""
    rewards = [run.rewards for run in report.of(source, way)]
    means = [fmean(values) for values in zip(*rewards, strict=True)]
    return [(float(at), fmean(means[max(0, at - 4) : at + 1])) for at in range(len(means))]
