"""The notebooks as pages of the site: their text, their code and what it printed.

Nothing is run here. `make notebooks` runs them into build/notebooks; where that has not
been done, or where a notebook's code has changed since, its page says so and has no
outputs.
"""

import html
import re
from pathlib import Path

import nbformat

ROOT = Path(__file__).parents[1]
SOURCES, RUN = ROOT / "notebooks", ROOT / "build" / "notebooks"
_TERMINAL = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")
_ELSEWHERE = re.compile(r'<a\b[^>]*href="(?!https?://)[^"]*"[^>]*>(.*?)</a>', re.DOTALL)


def on_files(files, config):
    """Adds a page for each notebook."""
    from mkdocs.structure.files import File

    for path in sorted(SOURCES.glob("*.ipynb")):
        name = f"notebooks/{path.stem}.md"
        files.append(File.generated(config, name, content=page(path, RUN / path.name)))
    return files


def page(path: Path, run: Path) -> str:
    """The Markdown of a notebook, with the outputs of `run` if that is the same one."""
    notebook = nbformat.read(path, as_version=4)
    about, ran = f"This is `notebooks/{path.name}`", notebook
    if run.exists() and _code(found := nbformat.read(run, as_version=4)) == _code(ran):
        ran = found
        seconds, on = ran.metadata["ran"]["seconds"], ran.metadata["ran"]["on"]
        about += f" as it ran in {_duration(seconds)} on {on}."
    else:
        about += ", which was not run for this page: `make site` runs it and shows "
        about += "what it prints."
    title, *rest = notebook.cells
    head, _, text = title.source.partition("\n")
    parts = [head, f"*{about}*", _linked(text.strip())]
    code = iter([cell for cell in ran.cells if cell.cell_type == "code"])
    for cell in rest:
        if cell.cell_type == "markdown":
            parts.append(_linked(cell.source))
            continue
        parts += _shown(next(code))
        if "parameters" in _tags(cell) and ran is not notebook and _given(ran):
            parts.append("For this page these values were put in their place:")
            parts += _shown(next(code))
    return "\n\n".join(part for part in parts if part) + "\n"


def _tags(cell) -> list[str]:
    return cell.metadata.get("tags", [])


def _given(notebook) -> bool:
    """Whether a run has put in values of its own."""
    return any("injected-parameters" in _tags(cell) for cell in notebook.cells)


def _code(notebook) -> list[str]:
    """The code of a notebook, without what a run has put in."""
    return [
        cell.source
        for cell in notebook.cells
        if cell.cell_type == "code" and "injected-parameters" not in _tags(cell)
    ]


def _shown(cell) -> list[str]:
    """A cell of code and its outputs."""
    return [_fenced(cell.source, "python"), *map(_output, cell.outputs)]


def _linked(text: str) -> str:
    """Links from notebooks/ into docs/ as those of a page beside docs/'s own."""
    return text.replace("](../docs/", "](../")


def _output(output) -> str:
    """What one output shows: a picture, a table, or text."""
    if output.output_type == "stream":
        return _text(output.text)
    if output.output_type == "error":
        raise ValueError(f"a cell ended with {output.ename}: {output.evalue}")
    data = output.data
    if "image/png" in data:
        picture = data["image/png"].replace("\n", "")
        return _box(f'<img alt="output" src="data:image/png;base64,{picture}">')
    if "text/html" in data:
        # What lies in the run's directory is not on the site.
        return _box(_ELSEWHERE.sub(r"\1", data["text/html"]))
    return _text(data["text/plain"])


def _text(text: str) -> str:
    """Text as a terminal shows it, without its colours."""
    text = _TERMINAL.sub("", text)
    lines = [line.rstrip("\r").rpartition("\r")[2] for line in text.split("\n")]
    shown = html.escape("\n".join(lines).strip("\n"))
    return _box(f"<pre>{shown}</pre>") if shown.strip() else ""


def _box(inside: str) -> str:
    """A block of HTML, which Markdown leaves as it is."""
    return f'<div class="output">\n{inside}\n</div>'


def _fenced(text: str, language: str) -> str:
    """A block of code, whatever ticks stand in it."""
    ticks = max(map(len, re.findall("`+", text)), default=0)
    fence = "`" * max(3, ticks + 1)
    return f"{fence}{language}\n{text}\n{fence}"


def _duration(seconds: int) -> str:
    """90 as "1 min 30 s"."""
    minutes, rest = divmod(seconds, 60)
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"
