"""What the grader of a live sandbox is told: variables by which it finds nothing that is an agent's."""

from collections.abc import Mapping

from kat_sandboxes import host
from kat_sandboxes.zygote.live import FOLDERS

_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
_DROPPED = ("LD_", "PYTHON", "BASH", "GIT_")


def environment(image: Mapping[str, str], *, on_host: bool) -> dict[str, str]:
    """The variables of an image, but for those that name places to load code from.

    Where the programs are the machine's, its interpreter is found, and pytest beside it.
    """
    env = {name: value for name, value in image.items() if not name.startswith(_DROPPED)}
    env |= {"PATH": _PATH, "HOME": FOLDERS[0], "TMPDIR": FOLDERS[1]}
    env |= {"PYTHONNOUSERSITE": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    if on_host:
        env |= {"PATH": f"{host.interpreter().parent}:{_PATH}", "PYTHONPATH": f"{host.TOOLS}/lib"}
    return env
