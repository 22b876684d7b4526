"""Pages that are made from the code and from the benchmarks' bounds, so that they cannot go stale.

Written to ``docs/_made`` before the site is built: the table of what is exact, one page of reference for each room, and
the benchmarks. After the build ``llms.txt`` is written beside the pages.
"""

import importlib
import inspect
import json
import re
from pathlib import Path
from typing import Any

from docutils import nodes
from docutils.utils.math import MathError
from docutils.utils.math.latex2mathml import tex2mathml
from sphinx.application import Sphinx
from sphinx.util import logging
from sphinx.util.nodes import make_refnode

import scoreinfer
from docstrings import Statement, rooms, statements

ROOT = Path(__file__).parents[2]
MADE = ROOT / "docs" / "_made"
ROOMS = {
    "Models and data": ["model", "problem", "agreement", "simulators"],
    "Learning": ["posterior", "training", "nets", "score", "process", "bijections"],
    "Drawing": ["samplers", "paths", "mcmc", "montecarlo", "filters", "markov", "draws", "reweighing"],
    "Trusting": ["evidence", "calibration", "comparison", "arviz"],
    "Underneath": ["command", "errors", "files", "figures", "identity"],
}
"""Rooms of the reference by what they are for; a room that is not named here goes to the last group."""

MAIN = {
    "NPSE": ("a training, then milliseconds", "many data sets of one design"),
    "Conditioned.sample": ("milliseconds", "draws for one data set, weighed and certified"),
    "Conditioned.focus": ("seconds to a minute", "a certificate refuses for ESS or k-hat"),
    "Conditioned.weigh": ("one run of the simulator for each draw", "a foreign simulator, a known likelihood"),
    "ProbabilityFlow": ("dimensions + 1 network evaluations a stage", "up to 16 dimensions (the default there)"),
    "ReverseSDE": ("32 to 128 network evaluations", "above 16 dimensions (the default there)"),
    "TunedProposal": (
        "up to 40,000 evaluations of the density for each data set",
        "posteriors far narrower than the prior",
    ),
    "ScoreSDE": (
        "learning in warm-up, then as many evaluations as proposals",
        "one posterior with many modes, or any kernel's place",
    ),
    "MALA": ("one gradient an iteration", "one smooth mode; a baseline"),
    "UnderdampedLangevin": ("one gradient an iteration", "one smooth mode; a baseline"),
    "ULA": ("one gradient an iteration", "large data, where a known bias is acceptable"),
    "AnnealedLangevin": ("network evaluations at every level", "comparison with published samplers only"),
    "SMDP": ("a training, then seconds", "a process in time, its end or some times observed"),
    "ConditionedPaths.sample": ("one backward path a draw", "paths, weighed and certified"),
    "PathPosterior.resampled": ("as many paths a draw as particles", "long or large paths"),
    "PathPosterior.reverse_sde": ("one backward path a draw", "comparison with published draws"),
    "PathPosterior.probability_flow": ("one backward path a draw", "comparison with published draws"),
    "reweigh": ("one evaluation of both densities a draw", "a changed prior, likelihood or data"),
    "bridge": ("a few hundred evaluations a draw", "a change too large for `reweigh`"),
    "smooth": ("one density a path, member and time", "paths of a filter, given all data"),
    "BootstrapFilter": (
        "one transition a particle and time",
        "filtering up to about ten dimensions; unbiased evidence",
    ),
    "EnKF": ("one transition a member and time", "few dimensions, a hundred members"),
    "LETKF": ("the same, and one small matrix a component", "filtering of large states: a baseline to be tuned"),
    "ScoreFilter": (
        "the same, and one block of neighbours a component",
        "large states, nonlinear sight, model errors",
    ),
    "EnSF": ("the same, and 200 Euler steps", "comparison with published filters only"),
    "GuidedPosterior.sample": (
        "one guided path a draw, or as many as particles",
        "a learned prior, any likelihood, no training",
    ),
    "score_prior": ("one flow a density", "a learned prior as a site under NUTS"),
    "ResampledPaths": ("as many paths a draw as particles", "what `resampled` uses"),
}
"""Samplers and kernels that users choose between: cost, and when to use them."""
ALL_ROOMS = {room for group in ROOMS.values() for room in group}


def make_pages(app: Sphinx) -> None:
    """Write all pages."""
    made = {
        "exact.md": exact_table(),
        "samplers.md": samplers_table(),
        "benchmarks.md": benchmark_tables(),
        "against_nuts.md": against_nuts(),
    }
    for page, text in made.items():
        _write(MADE / page, text)
    found = rooms(ROOT / "scoreinfer")
    for room, modules in found.items():
        _write(ROOT / "docs" / "api" / f"{room}.md", room_page(room, modules))
    _write(MADE / "rooms.md", rooms_table(found))
    _write(MADE / "hall.md", hall_table())


def _write(path: Path, text: str) -> None:
    """Write a page if it has changed, so that Sphinx reads only what is new."""
    path.parent.mkdir(exist_ok=True)
    if not path.exists() or path.read_text() != text:
        path.write_text(text)


# --- what is exact


def exact_table() -> str:
    """Make one table of statements for each room."""
    found: dict[str, list[Statement]] = {}
    for statement in statements(ROOT / "scoreinfer"):
        found.setdefault(statement.room, []).append(statement)
    parts = []
    for room in sorted(found, key=lambda room: (_group_of(room), room)):
        rows = [f"| {{py:obj}}`{row.name} <{row.target}>` | {row.kind} | {_cell(row.text)} |" for row in found[room]]
        parts.append(f"## {room}\n\n| | | |\n|---|---|---|\n" + "\n".join(rows))
    return "\n\n".join(parts) + "\n"


def samplers_table() -> str:
    """Make the table of `MAIN`: exactness by docstring, cost and use by hand.

    Raises:
        KeyError: if a name has no statement of exactness any more.
    """
    found = {statement.name: statement for statement in statements(ROOT / "scoreinfer")}
    rows = [
        f"| {{py:obj}}`{name} <{found[name].target}>` | {_cell(found[name].first)} | {cost} | {use} |"
        for name, (cost, use) in MAIN.items()
    ]
    return "| | exactness | cost | use it for |\n|---|---|---|---|\n" + "\n".join(rows) + "\n"


def _cell(text: str) -> str:
    text = re.sub(r"``([^`]+)``", r"`\1`", re.sub(r"(?<!`)`([^`]+)`(?!`)", r"`\1`", text))
    return text.replace("|", r"\|").replace("$", r"\$").replace("*", r"\*").replace("<", r"\<")


# --- reference


def _group_of(room: str) -> int:
    groups = list(ROOMS.values())
    return next((i for i, group in enumerate(groups) if room in group), len(groups) - 1)


def room_page(room: str, modules: list[str]) -> str:
    """Make the page of one room: its public names, then what else its modules hold."""
    first = importlib.import_module(f"scoreinfer.{room}")
    public = sorted(getattr(first, "__all__", ()))
    sections = [f"# {room}\n"]
    for module in modules:
        options = []
        if module != f"scoreinfer.{room}":
            sections.append(f"## {module.removeprefix('scoreinfer.')}\n")
            options = [f":exclude-members: {', '.join(public)}"] if public else []
            options += [":no-index:"] if module.rpartition(".")[2] in public else []
        sections.append(
            "\n".join(["```{eval-rst}", f".. automodule:: {module}", *(f"   {line}" for line in options), "```\n"])
        )
    return "\n".join(sections)


def hall_table() -> str:
    """List the names in the hall, each with the first line of its docstring."""
    names = [name for name in scoreinfer.__all__ if not inspect.ismodule(getattr(scoreinfer, name))]
    rows = []
    for name in names:
        found = getattr(scoreinfer, name)
        line = (inspect.getdoc(found) or "").split("\n\n")[0].replace("\n", " ")
        rows.append(f"| {{py:obj}}`si.{name} <{found.__module__}.{name}>` | {_cell(line)} |")
    return "| | |\n|---|---|\n" + "\n".join(rows) + "\n"


def rooms_table(found: dict[str, list[str]]) -> str:
    """List the rooms by group, each with the first line of its docstring."""
    grouped: dict[str, list[str]] = {}
    for room in found:
        grouped.setdefault(list(ROOMS)[_group_of(room)], []).append(room)
    parts = []
    for group in (group for group in ROOMS if group in grouped):
        rows = [f"- [{room}](api/{room}.md): {_first_line(room)}" for room in sorted(grouped[group])]
        parts.append(f"## {group}\n\n" + "\n".join(rows))
    tree = "\n".join(f"api/{room}" for room in sorted(found))
    return "\n\n".join(parts) + f"\n\n```{{toctree}}\n:hidden:\n\n{tree}\n```\n"


def _first_line(room: str) -> str:
    doc = inspect.getdoc(importlib.import_module(f"scoreinfer.{room}")) or ""
    return doc.split("\n\n")[0].replace("\n", " ")


def tidy_docstring(app: Any, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """Make formulas literal, escape what is no markup, and set statements of exactness apart as boxes."""
    lines[:] = _with_formulas(lines)
    text = "\n".join(lines)
    for label, kind in (("Exactness", "important"), ("Good values", "tip")):
        pattern = rf"^{label}: ((?:.+(?:\n|$))+)"
        box = f".. admonition:: {label}\n   :class: {kind}\n\n"
        text = re.sub(pattern, lambda found, box=box: box + _indented(found[1]) + "\n", text, flags=re.MULTILINE)
    text = re.sub(r"^References: ", "**References.** ", text, flags=re.MULTILINE)
    lines[:] = text.split("\n")


def _with_formulas(lines: list[str]) -> list[str]:
    """Turn indented blocks after a paragraph, which are formulas, into literal ones; escape all other lines."""
    made: list[str] = []
    literal = paragraph = False
    for i, line in enumerate(lines):
        indented = line.startswith("    ")
        if line and not indented:
            literal, paragraph = False, not re.match(r"\.\. |:\w|[-*] |\d\. |>>>", line)
        elif indented and not literal and paragraph and not lines[i - 1].strip():
            made += ["::", ""]
            literal = True
        made.append(line if literal or ">>>" in line else _escaped(line))
    return made


def _escaped(line: str) -> str:
    """Escape bars, lone stars and trailing underscores outside of backticks."""
    parts = re.split(r"(``.*?``|`[^`]*`|\*\*?[^\s*][^*]*\*\*?)", line)
    return "".join(
        part if i % 2 else re.sub(r"([|*]|\b_(?=\W|$)|(?<=\w)_(?=\W|$))", r"\\\1", part) for i, part in enumerate(parts)
    )


def _indented(text: str) -> str:
    return "\n".join(f"   {line.strip()}" for line in text.strip().split("\n")) + "\n"


def skip_fields(app: Any, what: str, name: str, obj: Any, skip: bool, options: Any) -> bool | None:
    """Leave out the fields of records, which the docstring of the class explains."""
    return True if type(obj).__name__ in ("_tuplegetter", "member_descriptor") else None


def find_name(app: Sphinx, env: Any, node: Any, contnode: Any) -> nodes.reference | None:
    """Resolve a name by its last parts, where they name one documented object only."""
    if node.get("refdomain") != "py":
        return None
    objects = env.domaindata["py"]["objects"]
    parts = node.get("reftarget", "").removesuffix("()").split(".")
    fits: set[str] = set()
    while parts and not fits:
        target = ".".join(parts)
        fits = {name for name in objects if name == target or name.endswith(f".{target}")}
        fits = fits if len(fits) < 2 else {name for name in fits if inspect.isclass(_object(name))}
        parts = parts[1:] if parts[0] in ("scoreinfer", "si", *ALL_ROOMS) or len(parts) > 2 else []
    if len(fits) != 1:
        return None
    found = objects[fits.pop()]
    return make_refnode(app.builder, node["refdoc"], found.docname, found.node_id, contnode)


def _object(name: str) -> Any:
    module, _, attribute = name.rpartition(".")
    try:
        return getattr(importlib.import_module(module), attribute, None)
    except ImportError:
        return None


# --- benchmarks


def _suites() -> dict[str, Any]:
    """Read ``benchmarks/expected.json``."""
    suites: dict[str, Any] = json.loads((ROOT / "benchmarks" / "expected.json").read_text())
    return suites


def reached() -> dict[str, Any]:
    """Collect what was measured, by suite, row and figure: pages name these numbers instead of repeating them."""
    return {
        suite: {
            row: {figure: value["reached"] for figure, value in figures.items() if "reached" in value}
            for row, figures in rows.items()
        }
        for suite, rows in _suites().items()
    }


def against_nuts() -> str:
    """Make the table of posteriors with one mode: effective samples per second beside NUTS's."""
    lines = [
        "| posterior | bulk ESS per second, ScoreSDE | NUTS | NUTS is cheaper by |",
        "|---|---|---|---|",
    ]
    for row, figures in reached()["unimodal"].items():
        if "nuts_ess_per_second" in figures:
            ours, theirs = figures["score_ess_per_second"], figures["nuts_ess_per_second"]
            lines.append(f"| {row.replace('_', ' ')} | {ours:g} | {theirs:g} | {theirs / ours:.0f} |")
    return "\n".join(lines) + "\n"


def benchmark_tables() -> str:
    """Make a table for each suite of ``benchmarks/expected.json``: reached, allowed, published."""
    suites = _suites()
    return "\n\n".join(filter(None, (_suite(name, rows) for name, rows in suites.items()))) + "\n"


def _suite(name: str, rows: dict[str, Any]) -> str:
    told = {row: values for row, values in rows.items() if any("reached" in value for value in values.values())}
    if not told:
        return ""
    lines = [f"## {name}\n", "| task | figure | reached | allowed | published |", "|---|---|---|---|---|"]
    for row, values in told.items():
        for figure, value in values.items():
            if "reached" not in value:
                continue
            bounds = _inherited(rows, row, figure) | value
            allowed = ", ".join(f"{word} {bounds[word]:g}" for word in ("min", "max") if word in bounds)
            published = f"{bounds['published']:g}" if "published" in bounds else ""
            shown = f"| {row} | {figure.replace('_', ' ')} | {value['reached']:g} | {allowed} | {published} |"
            lines.append(shown)
    return "\n".join(lines)


def _inherited(rows: dict[str, Any], row: str, figure: str) -> dict[str, float]:
    """Collect the bounds of all patterns that fit a row; longer patterns win."""
    bounds: dict[str, float] = {}
    for pattern in sorted(rows, key=len):
        if re.fullmatch(re.escape(pattern).replace(r"\*", ".*"), row):
            bounds |= rows[pattern].get(figure, {})
    return bounds


# --- for language models


def write_llms(app: Sphinx, error: Exception | None) -> None:
    """Write ``llms.txt`` (llmstxt.org): the pages with their titles, for readers that are programs."""
    if error or app.builder.name != "html":
        return
    titles = {page: title.astext() for page, title in app.env.titles.items()}
    start = (ROOT / "docs" / "index.md").read_text()
    summary = re.search(r"^\*\*(.+?)\*\*", start, flags=re.MULTILINE)
    lines = ["# scoreinfer", "", f"> {summary[1] if summary else ''}", "", "## Pages", ""]
    lines += [f"- [{title}]({page}.html)" for page, title in sorted(titles.items()) if not page.startswith("_made")]
    Path(app.outdir, "llms.txt").write_text("\n".join(lines) + "\n")


# --- sources


def tidy_source(app: Sphinx, page: str, template: str, context: dict[str, Any], doctree: Any) -> None:
    """Leave links back out of pages of source: names that only a room exports have no place of their own."""
    if page.startswith("_modules/"):
        body = re.sub(r'<a class="viewcode-back"[^>]*>[^<]*</a>', "", context["body"])
        context["body"] = re.sub(r'<li><a href="builtins.html">builtins</a></li>', "", body)


# --- formulas


def _inline_math(self: Any, node: nodes.math) -> None:
    self.body.append(_mathml(node, False))
    raise nodes.SkipNode


def _block_math(self: Any, node: nodes.math_block) -> None:
    self.body.append(f'<div class="math">{_mathml(node, True)}</div>')
    raise nodes.SkipNode


def _mathml(node: Any, block: bool) -> str:
    try:
        return tex2mathml(node.astext(), as_block=block)
    except MathError as error:
        logging.getLogger(__name__).warning("%s in %s", error, node.astext(), location=node)
        return node.astext()


def setup(app: Sphinx) -> dict[str, bool]:
    """Register the pages."""
    app.connect("builder-inited", make_pages)
    app.connect("autodoc-process-docstring", tidy_docstring, priority=1000)
    app.connect("autodoc-skip-member", skip_fields)
    app.connect("missing-reference", find_name)
    app.connect("html-page-context", tidy_source)
    app.add_html_math_renderer("mathml", (_inline_math, None), (_block_math, None))
    app.connect("build-finished", write_llms)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
