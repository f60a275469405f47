"""The pages say what is so: links lead somewhere, verbs and targets exist, code blocks run."""

import os
import re
import subprocess
import sys
import types
from importlib import metadata
from pathlib import Path

import pytest
import typer

from katcore.cli import app
from katcore.dataset.harbor import HarborConfig, HarborDataset, demonstrations
from katcore.pipeline.collection import load_collection
from katcore.plugin import Plugins
from katcore.plugin.plugins import GROUP

ROOT = Path(__file__).parents[2]
PAGES = [*ROOT.glob("*.md"), *sorted((ROOT / "docs").rglob("*.md"))]
IDS = [str(page.relative_to(ROOT)) for page in PAGES]
VERBS = set(typer.main.get_command(app).commands)  # type: ignore[attr-defined]
TARGETS = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))


def blocks(page: str, language: str) -> list[str]:
    text = (ROOT / page).read_text()
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("page", PAGES, ids=IDS)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text()):
        assert "://" in target or (page.parent / target).exists(), target


@pytest.mark.parametrize("page", PAGES, ids=IDS)
def test_verbs_and_targets_exist(page: Path) -> None:
    text = page.read_text()
    code = "\n".join(
        re.findall(r"`([^`\n]+)`", text) + re.findall(r"^[$ ]*(?:kat|make) .*", text, re.MULTILINE)
    )
    for verb in re.findall(r"\bkat ([a-z]+)\b", code):
        assert verb in VERBS, f"kat {verb}"
    for target in re.findall(r"^make ([a-z]+)\b", code, re.MULTILINE):
        assert target in TARGETS, f"make {target}"


@pytest.mark.parametrize("page", ["README.md", "docs/how-to/collect.md"])
def test_collections_fit_what_is_offered(page: str, tmp_path: Path) -> None:
    first = next(block for block in blocks(page, "yaml") if block.startswith("tasks:"))
    assert len(first.splitlines()) <= 15
    (tmp_path / "first.yaml").write_text(first)
    config = load_collection(tmp_path / "first.yaml")
    for kind in ("scaffold", "engine", "sandbox", "verifier"):
        choice = getattr(config, kind)
        offer = Plugins.installed().find(kind, choice.name).offer
        assert offer is not None
        offer.config.model_validate(choice.options)


def test_each_decision_says_what_violates_it() -> None:
    pages = sorted((ROOT / "docs" / "adr").glob("*.md"))
    for number, page in enumerate(pages, 1):
        text = page.read_text()
        assert text.startswith(f"# {number}. "), page.name
        heads = re.findall(r"^## (.*)", text, re.MULTILINE)
        assert heads == ["Context", "Decision", "Consequences", "Violated when"], page.name
    assert len(pages) >= 12


def test_reference_pages_are_those_of_the_live_objects() -> None:
    command = [sys.executable, ROOT / "scripts" / "reference.py", "--check"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert not done.returncode, f"{done.stdout}{done.stderr}; run scripts/reference.py"


def run(script: str, folder: Path) -> str:
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    environment = {**environment, "OMP_NUM_THREADS": "1"}
    environment.pop("KATCORE_HOME", None)
    command = ["bash", "-euo", "pipefail", "-c", script]
    done = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, check=False
    )
    assert not done.returncode, f"{script}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def tutorial(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """The folder in which the first tutorial was followed, and what each of its blocks printed."""
    folder = tmp_path_factory.mktemp("tutorial")
    return folder, [run(block, folder) for block in blocks("docs/tutorial/first-rollout.md", "sh")]


@pytest.mark.slow
def test_the_tutorial_ends_in_judged_rollouts(tutorial: tuple[Path, list[str]]) -> None:
    _, printed = tutorial
    ends = [line.split("\t") for line in printed[-2].splitlines()]
    assert len(ends) == 8
    assert {(outcome, reward) for _, outcome, reward, _ in ends} == {("scored", "1")}
    assert printed[-1].splitlines()[-1] == "$ submit"


@pytest.mark.slow
def test_trajectories_can_be_read_as_told(tutorial: tuple[Path, list[str]]) -> None:
    folder, _ = tutorial
    page = "docs/how-to/read-a-trajectory.md"
    for block in blocks(page, "sh"):
        assert run(block, folder) == "", "no demonstration failed"
    for block in blocks(page, "python"):
        script = folder / "read.py"
        script.write_text(block)
        assert "main scripted" in run("python read.py", folder)


@pytest.mark.slow
def test_models_are_trained_as_told(tmp_path: Path) -> None:
    printed = [run(block, tmp_path) for block in blocks("docs/how-to/train.md", "sh")]
    assert "model.safetensors" in printed[-1].splitlines()


def test_the_expert_of_the_how_to_makes_tasks(tmp_path: Path) -> None:
    (code,) = blocks("docs/how-to/add-an-expert.md", "python")
    module = types.ModuleType("katcore_greet")
    exec(compile(code, "katcore_greet", "exec"), module.__dict__)
    installed = {entry.name: entry.load() for entry in metadata.entry_points(group=GROUP)}
    plugins = Plugins({**installed, "greet": module})
    expert = plugins.experts()["greet"]
    for kind in ("synthesizer", "dataset", "scaffold", "verifier", "formatter"):
        assert plugins.find(kind, getattr(expert, kind))
    plugins.make("synthesizer", "greet", {"held_out": 3}).synthesize(
        tmp_path, seed=0, report=lambda _: None
    )
    tasks = list(HarborDataset(HarborConfig(root=tmp_path)).tasks("held-out"))
    assert len(tasks) == 3
    assert all(demonstrations(task)[0].turns[-1] == "submit" for task in tasks)


def test_no_page_names_a_machine() -> None:
    for page in PAGES:
        assert not re.search(r"/(work|root|home|tmp)/(?!logs)\w+/", page.read_text()), page
