"""The frame of every HTML page that we write: nothing in it runs, nothing is loaded from elsewhere."""

from collections.abc import Iterable
from pathlib import Path

from katcore.pipeline.chart import escape

_POLICY = "default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"
_IMAGES = "; img-src data:"


def document(title: str, body: str, *, styles: Iterable[str] = ("page.css",)) -> str:
    """A whole page. `body` is HTML and `title` is not; images in `body` are shown if they are `data:`."""
    style = "".join(Path(__file__).with_name(name).read_text(encoding="utf-8") for name in styles)
    policy = _POLICY + (_IMAGES if "<img" in body else "")
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{style}</style></head><body>{body}</body></html>\n"
    )


def table(head: Iterable[str], rows: Iterable[Iterable[str]], *, num_text: int) -> str:
    """A table whose cells are HTML. Columns after the first `num_text` hold numbers."""

    def row(tag: str, cells: Iterable[str]) -> str:
        return "".join(
            f"<{tag}{' class=number' if at >= num_text else ''}>{cell}</{tag}>"
            for at, cell in enumerate(cells)
        )

    body = "".join(f"<tr>{row('td', cells)}</tr>" for cells in rows)
    return f'<div class="table"><table><tr>{row("th", head)}</tr>{body}</table></div>'


def write(path: Path, text: str) -> None:
    """Put a page where it belongs, whole or not at all."""
    temporary = path.with_suffix(".tmp")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)
