"""Task directories: what is written is what is read; what is malformed is said."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from katcore.dataset.harbor import (
    Draft,
    HarborConfig,
    HarborDataset,
    demonstrations,
    read_task,
    write_task,
)
from katcore.errors import TaskError
from katcore.schema.expert import Demonstration

DRAFT = Draft(
    "t1",
    "swe",
    "Fix it.\n",
    {"Dockerfile": b"FROM host\nCOPY . /\n", "sub/file": b"\0\xff"},
    {"test.sh": b"echo 1\n", "expected/a": b"a"},
    [("hindsight", ["sed -i s/a/b/ x", "submit"]), ("careful", ["ls", "submit"])],
    "g",
    {"b": "2", "a": "1"},
    12.5,
    256,
)


def test_what_is_written_is_read(tmp_path: Path) -> None:
    directory = write_task(tmp_path, "held-out", DRAFT)
    assert directory == tmp_path / "held-out" / "t1"
    task = read_task(directory)
    assert (task.id, task.domain, task.prompt, task.group) == ("t1", "swe", "Fix it.\n", "g")
    assert (task.split, task.timeout_s, task.traits) == ("held-out", 12.5, {"a": "1", "b": "2"})
    assert task.sandbox.environment == directory / "environment"
    assert (task.sandbox.memory_mib, task.sandbox.cpus) == (256, 0)
    assert (directory / "environment/sub/file").read_bytes() == b"\0\xff"
    assert (directory / "tests/expected/a").read_bytes() == b"a"


def test_the_cores_of_a_task_are_its_sandbox_s(tmp_path: Path) -> None:
    directory = write_task(tmp_path, "train", DRAFT)
    with (directory / "task.toml").open("a") as file:
        file.write("cpus = 2\n")
    assert read_task(directory).sandbox.cpus == 2


def test_demonstrations_come_back_and_the_first_is_the_solution(tmp_path: Path) -> None:
    directory = write_task(tmp_path, "train", DRAFT)
    assert demonstrations(read_task(directory)) == [
        Demonstration("t1", "hindsight", ("sed -i s/a/b/ x", "submit")),
        Demonstration("t1", "careful", ("ls", "submit")),
    ]
    assert (directory / "solution/solve.sh").read_text() == "#!/bin/bash\nsed -i s/a/b/ x\n"


def test_the_same_draft_gives_the_same_bytes(tmp_path: Path) -> None:
    for name in ("one", "two"):
        write_task(tmp_path / name, "train", DRAFT)
    one, two = (
        {str(p.relative_to(root)): p.read_bytes() for p in root.rglob("*") if p.is_file()}
        for root in (tmp_path / "one", tmp_path / "two")
    )
    assert one == two


_TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)


@settings(max_examples=60)
@given(prompt=_TEXT, group=_TEXT, traits=st.dictionaries(_TEXT, _TEXT, max_size=3))
def test_any_text_survives(
    tmp_path_factory: pytest.TempPathFactory, prompt: str, group: str, traits: dict[str, str]
) -> None:
    draft = replace(DRAFT, prompt=prompt, group=group, traits=traits)
    task = read_task(write_task(tmp_path_factory.mktemp("t"), "train", draft))
    assert (task.prompt, task.group, task.traits) == (prompt, group, traits)


@pytest.mark.parametrize(
    ("split", "draft", "message"),
    [
        ("test", DRAFT, "no split 'test'; choose one of: train, held-out"),
        ("train", replace(DRAFT, environment={}), "environment/ needs a Dockerfile"),
        ("train", replace(DRAFT, tests={}), "tests/ needs a test.sh"),
        ("train", replace(DRAFT, id="../t"), "not the name of a folder"),
        ("train", replace(DRAFT, id=""), "not the name of a folder"),
    ],
)
def test_a_draft_that_is_no_task_is_refused(
    tmp_path: Path, split: str, draft: Draft, message: str
) -> None:
    with pytest.raises(TaskError, match=message):
        write_task(tmp_path, split, draft)
    assert not list(tmp_path.iterdir())


def test_two_tasks_of_one_id_are_refused(tmp_path: Path) -> None:
    write_task(tmp_path, "train", DRAFT)
    with pytest.raises(TaskError, match="two tasks of one id"):
        write_task(tmp_path, "train", DRAFT)


@pytest.mark.parametrize(
    "name", ["task.toml", "instruction.md", "environment/Dockerfile", "tests/test.sh"]
)
def test_a_missing_file_is_named(tmp_path: Path, name: str) -> None:
    directory = write_task(tmp_path, "train", DRAFT)
    (directory / name).unlink()
    with pytest.raises(TaskError, match=f"not a task directory: no {name}"):
        read_task(directory)


@pytest.mark.parametrize(
    "text",
    ["[metadata", "metadata = 3", "[agent]\ntimeout_sec = 'soon'", "[environment]\nmemory_mb = []"],
)
def test_a_malformed_description_names_its_file(tmp_path: Path, text: str) -> None:
    directory = write_task(tmp_path, "train", DRAFT)
    (directory / "task.toml").write_text(text)
    with pytest.raises(TaskError, match=f"{directory}/task.toml: "):
        read_task(directory)


def test_a_task_of_harbor_s_own_is_read(tmp_path: Path) -> None:
    directory = write_task(tmp_path, "train", DRAFT)
    (directory / "task.toml").write_text('version = "1.0"\n[metadata]\ncategory = "games"\n')
    (directory / "solution/demonstrations.json").unlink()
    task = read_task(directory)
    assert (task.id, task.domain, task.split, task.timeout_s) == ("t1", "games", "train", 60.0)
    assert demonstrations(task) == []


@pytest.mark.parametrize("text", ["[", "{}", '[{"style": "x"}]', "[1]"])
def test_malformed_demonstrations_name_their_file(tmp_path: Path, text: str) -> None:
    directory = write_task(tmp_path, "train", DRAFT)
    (directory / "solution/demonstrations.json").write_text(text)
    if text == "{}":
        assert demonstrations(read_task(directory)) == []
        return
    with pytest.raises(TaskError, match=r"demonstrations.json: "):
        demonstrations(read_task(directory))


def test_a_dataset_gives_its_split_in_order_of_ids(tmp_path: Path) -> None:
    for name in ("b", "a", "c"):
        write_task(tmp_path, "train", replace(DRAFT, id=name))
    write_task(tmp_path, "held-out", replace(DRAFT, id="h"))
    dataset = HarborDataset(HarborConfig(root=tmp_path))
    assert [task.id for task in dataset.tasks("train")] == ["a", "b", "c"]
    assert [task.id for task in dataset.tasks("held-out")] == ["h"]


def test_an_unknown_split_lists_what_is_there(tmp_path: Path) -> None:
    write_task(tmp_path, "train", DRAFT)
    dataset = HarborDataset(HarborConfig(root=tmp_path))
    with pytest.raises(TaskError, match="no split 'test'; found: train"):
        list(dataset.tasks("test"))


def test_a_folder_that_is_no_task_is_said(tmp_path: Path) -> None:
    (tmp_path / "train" / "junk").mkdir(parents=True)
    with pytest.raises(TaskError, match=r"junk: not a task directory"):
        list(HarborDataset(HarborConfig(root=tmp_path)).tasks("train"))


def test_demonstrations_are_plain_json(tmp_path: Path) -> None:
    directory = write_task(tmp_path, "train", DRAFT)
    content = json.loads((directory / "solution/demonstrations.json").read_bytes())
    assert [set(item) for item in content] == [{"style", "turns"}] * 2


def test_history_is_kept_by_those_who_say_so_alone(tmp_path: Path) -> None:
    directory = write_task(tmp_path, "train", DRAFT)
    assert not read_task(directory).sandbox.keeps_history
    path = directory / "task.toml"
    text = path.read_text()
    path.write_text(text.replace("[metadata]", "[metadata]\nkeep_git_history = true", 1))
    assert read_task(directory).sandbox.keeps_history
    path.write_text(text.replace("[metadata]", "[metadata]\nkeep_git_history = 'no'", 1))
    with pytest.raises(TaskError, match="has to be true or false"):
        read_task(directory)


def test_a_task_that_names_services_is_judged_live(tmp_path: Path) -> None:
    directory = write_task(tmp_path, "train", DRAFT)
    assert read_task(directory).services is None
    path = directory / "task.toml"
    text = path.read_text()
    for said, services in (("[]", ()), ("['/usr/sbin/nginx']", ("/usr/sbin/nginx",))):
        path.write_text(text.replace("[metadata]", f"[metadata]\nservices = {said}", 1))
        assert read_task(directory).services == services
    path.write_text(text.replace("[metadata]", "[metadata]\nservices = 'nginx'", 1))
    with pytest.raises(
        TaskError, match="services is 'nginx'; it has to be a list of absolute paths"
    ):
        read_task(directory)


def test_canaries_are_the_task_s_or_the_default(tmp_path: Path) -> None:
    directory = write_task(tmp_path, "train", DRAFT)
    assert read_task(directory).canaries == ("/solution/solve.sh",)
    path = directory / "task.toml"
    text = path.read_text()
    for said, canaries in (("[]", ()), ("['/a', '/b/c']", ("/a", "/b/c"))):
        path.write_text(text.replace("[metadata]", f"[metadata]\ncanaries = {said}", 1))
        assert read_task(directory).canaries == canaries
    path.write_text(text.replace("[metadata]", "[metadata]\ncanaries = ['a']", 1))
    with pytest.raises(TaskError, match="a list of absolute paths"):
        read_task(directory)


@pytest.mark.parametrize(
    ("environment", "metadata", "egress", "hosts"),
    [
        ("", "", "proxy", ()),
        ("network_mode = 'public'", "", "proxy", ()),
        ("network_mode = 'no-network'", "", "proxy", ()),
        ("network_mode = 'no-network'", "egress = 'none'", "none", ()),
        (
            "network_mode = 'allowlist'\nallowed_hosts = ['PyPI.org', '*.x.org:8443']",
            "",
            "allowlist",
            ("pypi.org", "*.x.org:8443"),
        ),
    ],
)
def test_where_an_agent_may_go(
    tmp_path: Path, environment: str, metadata: str, egress: str, hosts: tuple[str, ...]
) -> None:
    directory = write_task(tmp_path, "train", DRAFT)
    said(directory, environment, metadata)
    task = read_task(directory)
    assert (task.egress, task.allowed_hosts) == (egress, hosts)


@pytest.mark.parametrize(
    "host", ["127.0.0.1", "10.0.0.0/8", "localhost", "*", "*.org.", "a_b", "x.org:", ""]
)
def test_only_names_can_be_allowed(tmp_path: Path, host: str) -> None:
    directory = write_task(tmp_path, "train", DRAFT)
    said(directory, f"network_mode = 'allowlist'\nallowed_hosts = ['{host}']", "")
    with pytest.raises(TaskError, match="a list of names"):
        read_task(directory)


def said(directory: Path, environment: str, metadata: str) -> None:
    """Put lines into two tables of a task's file."""
    path = directory / "task.toml"
    text = path.read_text().replace("[metadata]", f"[metadata]\n{metadata}", 1)
    path.write_text(text.replace("[environment]", f"[environment]\n{environment}", 1))
