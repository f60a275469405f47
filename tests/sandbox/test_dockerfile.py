"""The Dockerfile subset: what is in it is read exactly, what is not is refused by line."""

from pathlib import Path

import pytest

from katcore.errors import TaskError
from katcore.sandbox.dockerfile import Dockerfile, Step, parse


def parsed(folder: Path, text: str) -> Dockerfile:
    (folder / "Dockerfile").write_text(text)
    return parse(folder / "Dockerfile")


def test_the_whole_subset(tmp_path: Path) -> None:
    text = """# a comment
FROM host

copy "a b" c /x/
RUN echo 'a  b' \\
    # a comment within
    && echo $HOME
ENV A=1 B="two words"
WORKDIR /x
"""
    assert parsed(tmp_path, text) == Dockerfile(
        "host",
        (
            Step("COPY", ("a b", "c", "/x/"), 4),
            Step("RUN", ("echo 'a  b' && echo $HOME",), 5),
            Step("ENV", ("A=1", "B=two words"), 8),
            Step("WORKDIR", ("/x",), 9),
        ),
    )


def test_an_instruction_that_the_file_ends_in_the_middle_of_counts(tmp_path: Path) -> None:
    assert parsed(tmp_path, "FROM host\nRUN a \\\n b \\").steps == (Step("RUN", ("a b",), 2),)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "the first instruction has to be FROM"),
        ("RUN x\nFROM host\n", "the first instruction has to be FROM"),
        ("FROM host\nFROM host\n", "only one FROM"),
        ("FROM host AS x\n", "Dockerfile:1: FROM takes one image name"),
        ("FROM --platform=x host\n", "Dockerfile:1: FROM with flags"),
        ("FROM host\n\nUSER me\n", "Dockerfile:3: USER is not supported here; what is: FROM, COPY"),
        ("FROM host\nADD a b\n", "Dockerfile:2: ADD is not supported"),
        ("FROM host\nCOPY a\n", "Dockerfile:2: COPY takes sources and a destination"),
        ("FROM host\nCOPY --from=x a b\n", "Dockerfile:2: COPY with flags"),
        ("FROM host\nCOPY 'a b\n", "Dockerfile:2: No closing quotation"),
        ("FROM host\nRUN\n", "Dockerfile:2: RUN takes one shell command"),
        ('FROM host\nRUN ["a"]\n', "Dockerfile:2: RUN takes one shell command"),
        ("FROM host\nRUN --mount=x a\n", "Dockerfile:2: RUN takes one shell command"),
        ("FROM host\nENV A 1\n", "Dockerfile:2: ENV takes NAME=value"),
        ("FROM host\nENV\n", "Dockerfile:2: ENV takes NAME=value"),
        ("FROM host\nENV PATH=/x:$PATH\n", "Dockerfile:2: ENV: variables are not replaced"),
        ("FROM host\nWORKDIR ${HOME}\n", "Dockerfile:2: WORKDIR: variables are not replaced"),
        ("FROM host\nWORKDIR /a /b\n", "Dockerfile:2: WORKDIR takes one path"),
    ],
)
def test_what_is_outside_is_refused_by_line(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(TaskError, match=message):
        parsed(tmp_path, text)


def test_a_missing_file_is_said(tmp_path: Path) -> None:
    with pytest.raises(TaskError, match="cannot be read: No such file"):
        parse(tmp_path / "Dockerfile")
