"""What mkdocs does besides: pages made from the code, equations, and the navigation.

`configuration.md` is made from the fields of the configuration and `metrics.md` from
the table of metrics, each time the site is built, so that neither is out of date.
"""

import html
import json
import re
import typing
from pathlib import Path

from pydantic import BaseModel

from jaxrl_llm.config import schemas
from jaxrl_llm.config.resume import may_change
from jaxrl_llm.config.schema import Config
from jaxrl_llm.tracking import metric_table

DOCS = Path(__file__).parent


def on_config(config):
    """Puts pages that the navigation does not name into it."""
    named = set(re.findall(r"[\w/]+\.md", str(config.nav)))
    others = [str(path.relative_to(DOCS)) for path in sorted(DOCS.rglob("*.md"))]
    others = [name for name in others if name not in named]
    before = [name for name in others if name.startswith("from_")]
    for title, pages in (
        ("Coming from", before),
        ("More", [name for name in others if name not in before]),
    ):
        if pages:
            config.nav.append({title: pages})
    return config


def on_files(files, config):
    """Adds the pages that are made from the code."""
    from mkdocs.structure.files import File

    for name, text in (
        ("configuration.md", configuration()),
        *(
            (f"configuration_{task}.md", configuration(task))
            for task in schemas.OFFLINE
        ),
        ("metrics.md", metrics()),
    ):
        files.append(File.generated(config, name, content=text))
    return files


def on_page_content(page_html, **_):
    """Sets mathematics as MathML, which browsers show without a script."""

    from latex2mathml.converter import convert

    def mathml(found):
        display = "block" if found[1] == "div" else "inline"
        return convert(html.unescape(found[2]), display=display)

    what = r'<(div|span) class="arithmatex">\s*\\[(\[](.*?)\\[)\]]\s*</\1>'
    return re.sub(what, mathml, page_html, flags=re.DOTALL)


def configuration(task: str | None = None) -> str:
    """The page of every key, with its type, its default and what it means.

    Args:
      task: that a verb is for; None for `jaxrl train`.
    """
    schema = schemas.of(task) if task else Config
    lines = [
        f"# Configuration of jaxrl {task}" if task else "# Configuration",
        "",
        f"Every key of a YAML file of `jaxrl {task or 'train'}`. Each can be "
        f"overridden on the command line, as `--{'learner' if task else 'actor'}"
        ".optim.lr 1e-6`; an unknown key is an error. The page is made from the fields "
        "of `jaxrl_llm/config/schema*.py`.",
        "",
        "*resume* says whether a key may change when a run goes on: **yes**; with "
        "another **rounding** from there on; or with another **course** of the run. "
        "Other keys must be as they were.",
        "",
    ]
    sections = [("", schema)]
    for prefix, section in sections:  # grows while it is gone through
        lines += [f"## `{prefix or 'top level'}`", "", *_paragraph(section.__doc__)]
        lines += ["| key | type | default | resume | |", "|---|---|---|---|---|"]
        for name, field in section.model_fields.items():
            key = f"{prefix}.{name}".lstrip(".")
            inner = [x for x in _types(field.annotation) if _is_section(x)]
            sections += [(_place(key, field.annotation), x) for x in inner]
            lines.append(
                f"| `{key}` | {_cell(_type(field.annotation))} | {_default(field)} "
                f"| {_resumes(key, schema)} "
                f"| {_cell(field.description or _first(inner))} |"
            )
        lines.append("")
    return "\n".join(lines)


def metrics() -> str:
    """The page of every metric, by what it is about."""
    lines = [
        "# Metrics",
        "",
        "What stands in `metrics.jsonl`, in the report and in the trackers. "
        "SOURCE, NAME and KIND stand for a name, N and K for a number, `{a,b}` for "
        "either. A metric that does not apply to a run is not logged. Names are veRL's "
        "where veRL has the metric. The ranges are where healthy runs usually are; a "
        "run outside of one is worth a look, not always wrong.",
        "",
    ]
    done = set()
    for title in metric_table.GROUPS.values():
        if title in done:
            continue
        done.add(title)
        lines += [f"## {title}", ""]
        lines += ["| name | what it is | healthy | if not |", "|---|---|---|---|"]
        for metric in metric_table.METRICS:
            if metric_table.GROUPS[metric.name.partition("/")[0]] == title:
                rest = " | ".join(_cell(text) for text in metric[1:])
                lines.append(f"| `{metric.name}` | {rest} |")
        lines.append("")
    return "\n".join(lines)


def _is_section(x) -> bool:
    return isinstance(x, type) and issubclass(x, BaseModel)


def _types(annotation) -> list:
    inner = typing.get_args(annotation)
    return [annotation, *(y for x in inner for y in _types(x))]


def _place(key: str, annotation) -> str:
    """Where a section's keys stand: in an entry of a list or mapping, if it is one."""
    kinds = {typing.get_origin(x) for x in _types(annotation)}
    return key + (".NAME" if dict in kinds else ".0" if tuple in kinds else "")


def _type(annotation) -> str:
    origin, inner = typing.get_origin(annotation), typing.get_args(annotation)
    if hasattr(annotation, "__metadata__"):
        return _type(inner[0])
    if origin is typing.Literal:
        return ", ".join(str(x) for x in inner)
    if origin is tuple:
        kinds = [_type(x) for x in inner if x is not ...]
        return f"list of {kinds[0]}" if ... in inner else f"[{', '.join(kinds)}]"
    if origin is dict:
        return f"mapping of {_type(inner[0])} to {_type(inner[1])}"
    if inner:
        kinds = ["null" if x is type(None) else _type(x) for x in inner]
        return " or ".join(kinds)
    if _is_section(annotation):
        return "section"
    names = {
        "str": "text",
        "int": "integer",
        "float": "number",
        "Any": "any",
        "bool": "true or false",
    }
    name = getattr(annotation, "__name__", str(annotation))
    return names.get(name, name)


def _default(field) -> str:
    if field.is_required():
        return "**required**"
    value = field.get_default(call_default_factory=True)
    if isinstance(value, BaseModel):
        return "see its section"
    text = json.dumps(value) if not isinstance(value, str) else value
    return f"`{text}`"


def _resumes(key: str, schema) -> str:
    mark = may_change(key, schema)
    return {"nothing": "yes"}.get(mark.alters, mark.alters) if mark else ""


def _first(inner: list) -> str:
    return (inner[0].__doc__ or "").partition("\n\n")[0] if inner else ""


def _paragraph(text) -> list[str]:
    return [" ".join((text or "").split()), ""]


def _cell(text: str) -> str:
    """Text that a cell of a Markdown table shows as it is."""
    parts = " ".join(text.split()).replace("|", "\\|").split("`")
    parts[::2] = [re.sub(r"([*<_\[])", r"\\\1", part) for part in parts[::2]]
    return "`".join(parts)
