"""Kinds whose prompt says all there is to know."""

from kat_terminal.scene import Draw, Scene


def make_folder(draw: Draw) -> Scene:
    """With mkdir."""
    word, files = draw.word(), draw.others()
    return Scene(
        f"Make a folder named {word}.",
        files,
        files,
        [f"mkdir {word}"],
        wrong=f"cd {word}",
        checks=[f"rmdir {word}"],
    )


def rename(draw: Draw) -> Scene:
    """With mv."""
    old, new, files = draw.name(), draw.name(), draw.others()
    return Scene(
        f"Rename {old} to {new}.",
        {**files, old: "x\n"},
        {**files, new: "x\n"},
        [f"mv {old} {new}"],
        wrong=f"mv {draw.unused()} {new}",
    )


def delete(draw: Draw) -> Scene:
    """With rm."""
    name, files = draw.name(), draw.others(3)
    return Scene(
        f"Delete {name}.",
        {**files, name: "x\n"},
        files,
        [f"rm {name}"],
        wrong=f"rm {draw.unused()}",
    )


def copy(draw: Draw) -> Scene:
    """With cp."""
    old, new, text = draw.name(), draw.name(), f"{draw.word()}\n"
    return Scene(
        f"Copy {old} to {new}.",
        {old: text},
        {old: text, new: text},
        [f"cp {old} {new}"],
        wrong=f"cp {draw.unused()} {new}",
    )


def write(draw: Draw) -> Scene:
    """With echo into a new file."""
    name, word, files = draw.name(), draw.word(), draw.others()
    return Scene(
        f"Write {word} into {name}.",
        files,
        {**files, name: f"{word}\n"},
        [f"echo {word} > {name}"],
        confirm=f"cat {name}",
        wrong=f"cat {name}",
    )


def append(draw: Draw) -> Scene:
    """With echo onto an old file."""
    name, word, lines = draw.name(), draw.word(), draw.lines(2, 3)
    text = "\n".join(lines) + "\n"
    return Scene(
        f"Add the line {word} to {name}.",
        {name: text},
        {name: f"{text}{word}\n"},
        [f"echo {word} >> {name}"],
        look=f"cat {name}",
        confirm=f"cat {name}",
        wrong=f"cat {draw.unused()}",
    )


def sort(draw: Draw) -> Scene:
    """With sort."""
    name, new, lines = draw.name(), draw.name(), draw.lines()
    text = "\n".join(lines) + "\n"
    return Scene(
        f"Sort {name} into {new}.",
        {name: text},
        {name: text, new: "\n".join(sorted(lines)) + "\n"},
        [f"sort {name} > {new}"],
        look=f"cat {name}",
        confirm=f"cat {new}",
        wrong=f"sort {draw.unused()}",
    )


def count(draw: Draw) -> Scene:
    """With wc."""
    name, new, lines = draw.name(), draw.name(), draw.lines(2, 7)
    text = "\n".join(lines) + "\n"
    return Scene(
        f"Write the number of lines of {name} into {new}.",
        {name: text},
        {name: text, new: f"{len(lines)}\n"},
        [f"wc -l < {name} > {new}"],
        look=f"cat {name}",
        confirm=f"cat {new}",
        wrong=f"wc -l {draw.unused()}",
    )


def first_lines(draw: Draw) -> Scene:
    """With head."""
    name, new, lines = draw.name(), draw.name(), draw.lines(4, 6)
    text, num = "\n".join(lines) + "\n", draw.number(1, 3)
    return Scene(
        f"Write the first {num} lines of {name} into {new}.",
        {name: text},
        {name: text, new: "\n".join(lines[:num]) + "\n"},
        [f"head -n {num} {name} > {new}"],
        look=f"cat {name}",
        confirm=f"cat {new}",
        wrong=f"head {draw.unused()}",
    )


def replace(draw: Draw) -> Scene:
    """With sed."""
    name, lines, new = draw.name(), draw.lines(), draw.word()
    old = draw.random.choice(lines)
    return Scene(
        f"In {name} replace {old} by {new}.",
        {name: "\n".join(lines) + "\n"},
        {name: "\n".join(new if line == old else line for line in lines) + "\n"},
        [f"sed -i s/{old}/{new}/ {name}"],
        look=f"cat {name}",
        confirm=f"cat {name}",
        wrong=f"sed -i s/{old}/{new}/ {draw.unused()}",
    )


def matching(draw: Draw) -> Scene:
    """With grep."""
    name, new, word = draw.name(), draw.name(), draw.word()
    lines = [f"{item} {draw.random.choice((word, item))}" for item in draw.lines(3, 4)]
    lines.insert(draw.random.randrange(3), f"{word} {draw.number()}")
    text = "\n".join(lines) + "\n"
    return Scene(
        f"Write the lines of {name} that have {word} into {new}.",
        {name: text},
        {name: text, new: "".join(f"{line}\n" for line in lines if word in line)},
        [f"grep {word} {name} > {new}"],
        look=f"cat {name}",
        confirm=f"cat {new}",
        wrong=f"grep {word} {draw.unused()}",
    )


def executable(draw: Draw) -> Scene:
    """With chmod."""
    name, files = f"{draw.word()}.sh", draw.others()
    files |= {name: "echo hi\n"}
    return Scene(
        f"Make {name} executable.",
        files,
        files,
        [f"chmod +x {name}"],
        wrong=f"./{name}",
        confirm=f"./{name}",
        checks=[f"[ -x {name} ]"],
    )


def json_value(draw: Draw) -> Scene:
    """With jq."""
    name, new, key, value = f"{draw.word()}.json", draw.name(), draw.word(), draw.word()
    text = f'{{"{draw.word()}": "{draw.word()}", "{key}": "{value}"}}\n'
    return Scene(
        f"Write the value of {key} in {name} into {new}.",
        {name: text},
        {name: text, new: f"{value}\n"},
        [f"jq -r .{key} {name} > {new}"],
        look=f"cat {name}",
        confirm=f"cat {new}",
        wrong=f"jq -r .{key} {draw.unused()}",
    )


def column(draw: Draw) -> Scene:
    """With cut."""
    name, new, num = f"{draw.word()}.csv", draw.name(), draw.number(1, 3)
    rows = [[draw.word(), str(draw.number()), draw.word()] for _ in range(2)]
    text = "".join(",".join(row) + "\n" for row in rows)
    return Scene(
        f"Write column {num} of {name} into {new}.",
        {name: text},
        {name: text, new: "".join(f"{row[num - 1]}\n" for row in rows)},
        [f"cut -d, -f{num} {name} > {new}"],
        look=f"cat {name}",
        confirm=f"cat {new}",
        wrong=f"cut -d, -f{num} {draw.unused()}",
    )


KINDS = (
    make_folder,
    rename,
    delete,
    copy,
    write,
    append,
    sort,
    count,
    first_lines,
    replace,
    matching,
    executable,
    json_value,
    column,
)
