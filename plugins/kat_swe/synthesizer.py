"""Writes SWE tasks: bugs in real packages, chosen so that no operator dominates."""

import asyncio
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from kat_swe.case import Case, cases, sources
from kat_swe.draft import draft
from kat_swe.ingest import Ingester
from kat_swe.package import PACKAGES
from kat_swe.source import Package, configured_index
from katcore.dataset.harbor import write_task
from katcore.errors import TaskError
from katcore.plugin import Plugins
from katcore.sandbox.lease import open_backend

_READING_SHARE = 0.4
_AT_ONCE = 2


class SweConfig(BaseModel):
    """Options of the synthesizer: how many tasks of each split, from which packages (all by default).

    `index` is a package index (PEP 503 or 691); by default the one that pip is configured to use. `sandbox`
    is the backend that runs the packages' tests.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    train: int = Field(default=1600, ge=1)
    held_out: int = Field(default=800, ge=1)
    packages: tuple[str, ...] = ()
    index: str = ""
    sandbox: str = "local"
    sandbox_options: dict[str, Any] = Field(default_factory=dict)


class SweSynthesizer:
    """Whole packages are held out; their tasks are the same for all seeds."""

    def __init__(self, config: SweConfig) -> None:
        known = {package.name: package for package in PACKAGES}
        unknown = [name for name in config.packages if name not in known]
        if unknown:
            raise TaskError(f"no SWE package named {unknown[0]!r}; there are: {', '.join(known)}")
        self._config = config
        self._packages = [known[name] for name in config.packages or known]

    def synthesize(self, out: Path, *, seed: int, report: Callable[[str], None]) -> None:
        """See `Synthesizer.synthesize`. Everything of a package that runs, runs in a sandbox."""
        found = asyncio.run(self._gather(report))
        held = [case for case in found if case.ingested.package.is_held_out]
        unseen = sources(held)
        train = [
            case
            for case in found
            if not case.ingested.package.is_held_out and not sources([case]) & unseen
        ]
        report(f"{len(train)} bugs to train on, {len(held)} held out")
        config = self._config
        splits = (
            ("held-out", "held-out", held, config.held_out),
            ("train", f"train-{seed}", train, config.train),
        )
        for split, source, pool, num in splits:
            chosen = choose(pool, num, source)
            if len(chosen) < num:
                raise TaskError(
                    f"the packages give {len(chosen)} {split} tasks, not {num}; ask for fewer,"
                    " or add packages"
                )
            for number, case in enumerate(chosen):
                task = draft(
                    f"swe-{case.id}",
                    case,
                    needs_reading=_needs_reading(number),
                    is_held_out=split == "held-out",
                )
                write_task(out, split, task)

    async def _gather(self, report: Callable[[str], None]) -> list[Case]:
        """The cases of all packages, some packages at once."""
        config = self._config
        slots = asyncio.Semaphore(_AT_ONCE)
        plugins = Plugins.installed()
        async with open_backend(
            plugins, config.sandbox, config.sandbox_options, work="swe.synthesize"
        ) as backend:
            ingester = Ingester(backend, config.index or configured_index())

            async def work(package: Package) -> list[Case]:
                async with slots:
                    found = await cases(ingester, await ingester.ingest(package))
                    report(f"{package.name} {package.release.version}: {len(found)} bugs")
                    return found

            lists = await asyncio.gather(*(work(package) for package in self._packages))
        return [case for part in lists for case in part]


def _needs_reading(number: int) -> bool:
    """Four tasks of ten, spread evenly."""
    return int((number + 1) * _READING_SHARE) > int(number * _READING_SHARE)


def choose(pool: Sequence[Case], num: int, source: str) -> list[Case]:
    """`num` cases, the operators in turn, then in an order of chance."""
    draw = random.Random(source)
    by_operator: dict[str, list[Case]] = {}
    for case in sorted(pool, key=lambda case: case.id):
        by_operator.setdefault(case.mutant.operator, []).append(case)
    for group in by_operator.values():
        draw.shuffle(group)
    chosen: list[Case] = []
    while len(chosen) < num and any(by_operator.values()):
        for _, group in sorted(by_operator.items()):
            if group and len(chosen) < num:
                chosen.append(group.pop())
    draw.shuffle(chosen)
    return chosen
