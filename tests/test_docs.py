"""The words beside the code: links, commands, keys and names in them are there."""

import ast
import contextlib
import functools
import importlib.util
import io
import itertools
import pathlib
import re
import shlex
import subprocess
import tomllib

import pytest
import yaml

import jaxrl_llm
from jaxrl_llm import cli, sharding
from jaxrl_llm.config import bundled, parsing, schemas
from jaxrl_llm.tracking import metric_table

ROOT = pathlib.Path(__file__).parent.parent
MADE = {
    ROOT / "docs/configuration.md",
    *(ROOT / f"docs/configuration_{task}.md" for task in schemas.OFFLINE),
    ROOT / "docs/metrics.md",
    ROOT / "docs/recipes.md",
    *(ROOT / f"docs/notebooks/{p.stem}.md" for p in ROOT.glob("notebooks/*.ipynb")),
}
PAGES = sorted(
    [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("jaxrl_llm/**/*.md")]
)
API = (ROOT / "docs/api.md").read_text()


def blocks(text, language=""):
    """The fenced blocks of a language and, without one, the indented ones."""
    fenced = re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)
    return fenced if language else [*fenced, *re.findall(r"(?m)^ {4}(\S.*)$", text)]


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_links_lead_somewhere_and_python_is_python(page):
    text = page.read_text()
    for block in blocks(text, "python"):
        compile(block, str(page), "exec")
    for link in re.findall(
        r"\]\(([^)#\s]+)[^)]*\)", re.sub(r"(?s)```.*?```", "", text)
    ):
        if link.startswith("https://"):
            continue
        target = (page.parent / link).resolve()
        assert target.exists() or target in MADE, link
        # The site has nothing else: its strict build refuses other links.
        if page.is_relative_to(ROOT / "docs"):
            assert target.is_relative_to(ROOT / "docs"), f"{link}: name it in backticks"


def commands():
    """Every command line of the pages that begins with jaxrl."""
    for page in PAGES:
        text = page.read_text().replace("\\\n", " ")
        for line in "\n".join(blocks(text)).splitlines():
            if line.strip().startswith(("jaxrl ", "srun jaxrl ")):
                words = shlex.split(line.strip().removeprefix("srun "), comments=True)
                yield str(page.relative_to(ROOT)), words[1:]


@functools.cache
def help_of(verb):
    """What `jaxrl VERB --help` shows."""
    with contextlib.redirect_stdout(io.StringIO()) as shown:
        try:
            cli.main([verb, "--help"])
        except SystemExit as ended:
            assert ended.code == 0
    return shown.getvalue()


def test_every_command_of_the_pages_is_one(monkeypatch):
    monkeypatch.chdir(ROOT)
    found, keys = list(commands()), set(parsing.keys())
    offline = {verb: set(parsing.keys(schemas.of(verb))) for verb in schemas.OFFLINE}
    for page, words in found:
        flags = [word[2:].partition("=")[0] for word in words if word[:2] == "--"]
        match words:
            case ["train" | "evaluate" | "plan", config, *_]:
                shown = re.findall(r"--([a-z-]+)", cli.__doc__)
                known = keys.union(shown).__contains__
                if config.startswith("configs/") or "." not in config != "CONFIG":
                    assert parsing.load(config).output_dir
            case [verb, *_] if verb in offline:
                shown = re.findall(r"--([a-z-]+)", cli.__doc__)
                known = offline[verb].union(shown).__contains__
            case ["bench", name, *_]:
                known = (ROOT / f"jaxrl_llm/bench/{name}.py").read_text().__contains__
            case [verb, *_]:
                known = help_of(verb).__contains__
                assert verb != "init" or words[1] in bundled.names()
        assert all(known(flag.replace("-", "_")) or known(flag) for flag in flags), (
            page,
            words,
        )
    assert {words[0] for _, words in found} >= {"train", "evaluate", "plan", "bench"}


@pytest.fixture(scope="module")
def hooks():
    place = ROOT / "docs/hooks.py"
    spec = importlib.util.spec_from_file_location("docs_hooks", place)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_made_pages_have_every_key_and_every_metric(hooks):
    page = hooks.configuration()
    rows = dict(re.findall(r"(?m)^\| `([\w.]+)` \| (.*) \|$", page))
    missing = {key for key in parsing.keys() if key not in rows}
    assert not missing
    assert rows["actor.optim.lr"].startswith("number | `1e-06` |  |")
    assert rows["reward.functions.0.name"].startswith("text | **required** |  | exact,")
    assert (
        rows["val.greedy"]
        == "true or false | `true` | yes | Also answer once greedily."
    )
    for task in schemas.OFFLINE:
        page = hooks.configuration(task)
        keys = parsing.keys(schemas.of(task))
        assert [key for key in keys if f"\n| `{key}` | " not in page] == []
    page = hooks.metrics()
    assert all(f"| `{metric.name}` |" in page for metric in metric_table.METRICS)
    assert all(f"\n## {title}\n" in page for title in metric_table.GROUPS.values())


def test_pages_that_the_navigation_does_not_name_are_added(
    hooks, tmp_path, monkeypatch
):
    class Site:
        nav = [{"Home": "index.md"}, {"Tasks": [{"Own": "tasks/own.md"}]}]

    monkeypatch.setattr(hooks, "DOCS", tmp_path)
    (tmp_path / "tasks").mkdir()
    for name in ("index.md", "tasks/own.md", "from_verl.md", "release.md"):
        (tmp_path / name).write_text("# A page\n")
    assert hooks.on_config(Site).nav[2:] == [
        {"Coming from": ["from_verl.md"]},
        {"More": ["release.md"]},
    ]


def public(path):
    """Names of a module that a reader of its reference sees, with their nodes."""
    tree = ast.parse(path.read_text())
    kinds = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef
    yield path.stem, tree
    for node in tree.body:
        if isinstance(node, kinds) and node.name[0] != "_":
            yield node.name, node
            if isinstance(node, ast.ClassDef):
                for inner in node.body:
                    if isinstance(inner, kinds) and inner.name[0] != "_":
                        yield f"{node.name}.{inner.name}", inner


def test_the_reference_has_every_public_name_and_each_has_a_docstring():
    shown = re.findall(r"(?m)^::: (\S+)$", API)
    modules = {**jaxrl_llm._MODULES, "sharding": "jaxrl_llm.sharding"}
    functions = jaxrl_llm._FUNCTIONS
    assert {*modules, *functions} == {*jaxrl_llm.__all__}
    names = [m for m in modules.values() if m != "jaxrl_llm.sharding"]
    names += [f"jaxrl_llm.sharding.{name}" for name in sharding._MODULES]
    assert {*names, *(".".join(where) for where in functions.values())} <= {*shown}
    names += [module for module, _ in functions.values()]
    files = {m: ROOT / (m.replace(".", "/") + ".py") for m in names}
    count = 0
    for module, path in files.items():
        for name, node in public(path):
            assert ast.get_docstring(node), f"{module}.{name}"
            count += 1
    assert count > 100


def test_the_readme_is_one_screen_with_a_small_picture():
    text = (ROOT / "README.md").read_text()
    assert len(text.splitlines()) <= 100
    [picture] = re.findall(r"!\[[^]]+\]\(([^)]+)\)", text)
    assert (ROOT / picture).stat().st_size < 150_000
    assert (ROOT / picture).read_bytes()[:4] == b"\x89PNG"
    targets = set(re.findall(r"(?m)^([a-z-]+):", (ROOT / "Makefile").read_text()))
    assert set(re.findall(r"\bmake ([a-z-]+)", text)) <= targets


def test_no_docstring_begins_in_the_middle_of_a_sentence():
    """Its reader would have to find what it is of, or what it is the same as."""
    folders = [ROOT / "jaxrl_llm", ROOT / "sharding"]
    for path in itertools.chain(*(folder.rglob("*.py") for folder in folders)):
        for node in ast.walk(ast.parse(path.read_text())):
            body = getattr(node, "body", None)
            for one in body if isinstance(body, list) else ():
                match one:
                    case ast.Expr(value=ast.Constant(value=str(text))):
                        found = re.match(r"(Of|As|The same)\b", text.strip())
                        assert not found, f"{path}:{one.lineno}: {text[:60]}"


def test_what_others_read_of_the_repository_is_true():
    with (ROOT / "pyproject.toml").open("rb") as file:
        project = tomllib.load(file)["project"]
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == project["version"]
    assert citation["license"] == project["license"]
    workflow = yaml.safe_load((ROOT / ".github/workflows/test.yml").read_text())
    steps = workflow["jobs"]["test"]["steps"]
    assert [step["run"] for step in steps if "run" in step] == ["make test"]
    makefile = (ROOT / "Makefile").read_text()
    assert re.search(r"(?m)^test:.*\n(\t.*\n)*\t\$\(MAKE\) docs\n", makefile)
    # The published site is built with the notebooks' outputs, the tested one without.
    site = yaml.safe_load((ROOT / ".github/workflows/site.yml").read_text())
    steps = site["jobs"]["build"]["steps"]
    assert [step["run"] for step in steps if "run" in step] == ["make site"]
    assert re.search(r"(?m)^site: notebooks\n\t\$\(MAKE\) docs\n", makefile)
    assert re.search(r"(?m)^docs: .venv/test\n", makefile)
    # With --quiet mkdocs counts no warnings, so that nothing is strict.
    assert re.search(r"(?m)^docs:.*\n\t.*mkdocs build --strict$", makefile)


def test_every_figure_of_the_performance_page_names_its_commit():
    text = (ROOT / "docs/performance.md").read_text()
    figures, _, since = text.partition("## What has changed since")
    rows = re.findall(r"(?m)^\|(?!--)(.*)\|$\n(?!\|--)", figures)  # no heads of tables
    commits = [row.split("|")[-1].strip() for row in rows]
    assert len(rows) > 20 and all(re.fullmatch("[0-9a-f]{7}", c) for c in commits)
    commits += re.findall(r"\b[0-9a-f]{7}\b", since)
    git = ["git", "-C", str(ROOT), "rev-list", "HEAD"]
    known = subprocess.run(git, capture_output=True, text=True).stdout.splitlines()
    if len(known) < 300:
        pytest.skip("the history is not here")
    assert set(commits) <= {commit[:7] for commit in known}
