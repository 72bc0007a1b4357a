"""The report as one HTML page: no script, no request, no number that is not in the document."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from importlib.resources import files
from typing import Any

from ...core.numbers import in_unit, labelled, number, plain, seconds, share, size
from . import charts
from .document import ArtifactEntry, ExportEntry, LayerMap, PassEntry, Report
from .markup import Child, Markup, element, joined

PARTS = {
    "embeddings": "Embeddings",
    "attention": "Attention",
    "mlp": "MLP",
    "head": "Head",
    "norms": "Norms",
    "unnamed": "Products that the graph does not name",
    "other": "Other weights",
    "files": "Tokenizer, config, graph",
}
_VERDICTS = {"passed": ("good", "✓ passed"), "failed": ("bad", "✕ failed"), "undecided": ("doubt", "? undecided")}
_LOSSES = {
    "kl": ("KL from the teacher", "nats a token"),
    "reverse_kl": ("reverse KL from the teacher", "nats a token"),
    "js": ("JS from the teacher", "nats a token"),
    "lm": ("loss on the text", "nats a token"),
}
_SPEEDS = {
    "prefill_tokens_per_second": "Prompt, tokens/s",
    "decode_tokens_per_second": "Generation, tokens/s",
    "sequences_per_second": "Texts/s",
    "tokens_per_second": "Tokens/s",
    "load_seconds": "To load",
    "peak_memory_bytes": "Peak memory",
}


def page(report: Report) -> str:
    """Return the page."""
    several = len(report.artifacts) > 1
    title = "Comparison of artifacts" if several else report.artifacts[0].name
    body = [_comparison(report)] if several else []
    for at, entry in enumerate(report.artifacts):
        body.append(_artifact(entry, anchor=f"artifact-{at + 1}", titled=several))
    head = element(
        "head",
        element("meta", charset="utf-8"),
        element("meta", name="viewport", content="width=device-width, initial-scale=1"),
        element("meta", name="color-scheme", content="light dark"),
        element("title", f"{title}: llmopt report"),
        element("style", Markup(files(__package__).joinpath("style.css").read_text(encoding="utf-8"))),
    )
    top = [element("h1", title)]
    top += [_contents(report)] if several else [element("p", report.artifacts[0].summary)]
    foot = element(
        "footer", f"Made by llmopt {report.llmopt} from the files of the artifact; nothing was loaded from elsewhere."
    )
    body_ = element("body", element("header", top, class_="page"), element("main", body), foot)
    return f"<!doctype html>\n{element('html', head, body_, lang='en')}\n"


def _contents(report: Report) -> Markup:
    links = [
        element("li", element("a", entry.name, href=f"#artifact-{at + 1}")) for at, entry in enumerate(report.artifacts)
    ]
    return element("nav", element("ul", links), aria_label="Artifacts")


# Several artifacts


def _comparison(report: Report) -> Markup:
    rows: list[Sequence[Child]] = []
    for entry in report.artifacts:
        for export in entry.exports:
            checked = export.verification or {}
            perplexity = next(
                (
                    one.figures["perplexity"].value
                    for one in entry.evaluations
                    if one.export == export.name and "perplexity" in one.figures
                ),
                None,
            )
            speed = next((one.figures for one in entry.speeds if one.export == export.name), {})
            layers = entry.layers or {}
            rows.append(
                [
                    entry.name,
                    export.name,
                    size(export.size_bytes),
                    "–" if export.share is None else share(export.share),
                    _or_dash(layers.get("bits_per_weight"), number),
                    _or_dash(layers.get("median_relative_error"), share),
                    _verdict(export),
                    _or_dash(checked.get("mean_kl"), number),
                    _or_dash(perplexity, number),
                    _or_dash(speed.get("decode_tokens_per_second", speed.get("tokens_per_second")), number),
                ]
            )
    header = (
        "Artifact", "Export", "Size", "Of source", "Bits per weight", "Median error", "Verified", "KL to its model, nats",
        "Perplexity", "Tokens/s",
    )  # fmt: skip
    table = _table(header, rows, numbers={2, 3, 4, 5, 7, 8, 9})
    return element("section", element("h2", "Side by side"), table, _plots(report))


def _plots(report: Report) -> Markup | None:
    shown: list[Markup] = []
    unit, factor = _unit(max((point.size_bytes for point in report.points), default=1))
    by_size = (f"size, {unit}", lambda point: point.size_bytes / factor)
    by_quality = (f"{report.quality}", lambda point: point.quality)
    if report.quality and sum(point.quality is not None for point in report.points) > 1:
        points = [point for point in report.points if point.quality is not None]
        shown.append(
            _titled("Size and quality", charts.scatter("Size and quality", points, by_size, by_quality, intervals=True))
        )
        points = [point for point in points if point.latency_ms is not None]
        if len(points) > 1:
            by_latency = (f"ms for {report.latency}", lambda point: point.latency_ms)
            shown.append(
                _titled(
                    "Latency and quality",
                    charts.scatter("Latency and quality", points, by_latency, by_quality, intervals=True),
                )
            )
    timed = [point for point in report.points if point.latency_ms is not None]
    if len(timed) > 1:
        latency = (f"ms for {report.latency}", lambda point: point.latency_ms)
        shown.append(
            _titled("Size and latency", charts.scatter("Size and latency", timed, by_size, latency, intervals=False))
        )
    if not shown:
        said = "Give measurements with --eval and --bench to see quality and speed against size."
        return element("p", said, class_="soft")
    return element("div", shown, class_="plots")


def _plot(drawn: Markup, caption: str | None = None) -> Markup:
    return element("figure", drawn, element("figcaption", caption) if caption else None)


def _titled(title: str, drawn: Markup) -> Markup:
    return element("figure", element("figcaption", title, class_="over"), drawn)


def _unit(most: float) -> tuple[str, float]:
    units = ("B", "KiB", "MiB", "GiB", "TiB")
    at = next((at for at in range(len(units) - 1) if most < 1024 ** (at + 1)), len(units) - 1)
    return units[at], 1024.0**at


# One artifact


def _artifact(entry: ArtifactEntry, *, anchor: str, titled: bool) -> Markup:
    title = [element("h2", entry.name, id=anchor), element("p", entry.summary)] if titled else []
    parts = [
        _key_figures(entry),
        [element("p", element("strong", "Warning: "), one, class_="warning") for one in entry.warnings],
        _passes(entry),
        _sizes(entry),
        _quality(entry),
        _layers(entry),
        _curves(entry),
        _time(entry),
        _speed(entry),
        _loading(entry),
        _left_out(entry),
        _provenance(entry),
    ]
    return element("article", title, parts)


def _section(title: str, *children: Child) -> Markup:
    return element("section", element("h3", title), *children)


def _key_figures(entry: ArtifactEntry) -> Markup:
    shown: list[tuple[str, Child, str | None]] = []
    before = entry.source.get("bytes")
    for export in entry.exports:
        of = f"{share(export.share)} of {size(before)}" if export.share is not None and before else None
        shown.append((f"Size, {export.name}", size(export.size_bytes), of))
    if entry.layers:
        bits, error = entry.layers.get("bits_per_weight"), entry.layers.get("median_relative_error")
        count = f"{number(int(entry.layers['count']))} layers"
        shown.append(("Bits per weight", _or_dash(bits, number), f"{count}, with scales"))
        if error is not None:
            shown.append(("Median error", share(error), "of a rounded weight"))
    for export in entry.exports:
        shown.append((f"Verified, {export.name}", _verdict(export), (export.verification or {}).get("runtime")))
    run = entry.run or {}
    if "seconds" in run:
        shown.append(("Built in", seconds(run["seconds"]), f"{size(run['peak_memory_bytes'])} at the peak"))
    return element(
        "dl",
        [
            element("div", element("dt", name), element("dd", value, element("small", note) if note else None))
            for name, value, note in shown
        ],
        class_="key",
    )


def _passes(entry: ArtifactEntry) -> Markup:
    if not entry.passes:
        return _section("What was done", element("p", "No pass changed the model: it was exported as it is."))
    rows: list[Sequence[Child]] = []
    for one in entry.passes:
        name = one.name if one.export is None else f"{one.name} (on the graph for {one.export})"
        params = ", ".join(f"{key} {value}" for key, value in one.params.items()) or "as usual"
        metrics = [element("li", " ".join(labelled(key, value))) for key, value in one.metrics.items()]
        notes = [element("li", note) for note in one.notes]
        rows.append(
            [
                name,
                number(one.changed),
                number(one.left_out),
                params,
                element("ul", metrics, notes, class_="plain") if metrics or notes else "–",
            ]
        )
    header = ("Pass", "Changed", "Left out", "Parameters", "Figures and notes")
    return _section("What was done", _table(header, rows, numbers={1, 2}, wide={4}))


def _sizes(entry: ArtifactEntry) -> Markup:
    before: Mapping[str, int] = entry.source.get("parts") or {}
    kinds = [name for name in PARTS if name in before or any(name in export.parts for export in entry.exports)]
    columns = [("Before", before, "before")] if before else []
    columns += [(export.name, export.parts, "") for export in entry.exports if export.parts]
    most = max((value for _, parts, _ in columns for value in parts.values()), default=1)
    rows: list[Sequence[Child]] = []
    for kind in kinds:
        bars = [_bar(parts.get(kind), most, class_) for _, parts, class_ in columns]
        rows.append([PARTS[kind], *bars])
    found: list[Child] = []
    if rows and columns:
        found += [element("h4", "By part"), _table(("Part", *(name for name, _, _ in columns)), rows, kind="bars")]
    steps: list[Sequence[Child]] = []
    top = max((step.size_bytes for step in entry.size_path), default=1)
    for at, step in enumerate(entry.size_path):
        quality = ", ".join(" ".join(labelled(name, value)) for name, value in step.quality.items())
        of = "–" if step.share is None else share(step.share)
        bar = _bar(step.size_bytes, top, "before" if at == 0 else "")
        steps.append(["Source" if at == 0 else step.name, bar, of, quality or "–"])
    if len(steps) > 1:
        said = "Weights after each step, codes packed without gaps; an export counts all its files."
        header = ("After", "Size", "Of source", "Quality there")
        found += [element("h4", "Step by step"), element("p", said, class_="soft"), _table(header, steps, kind="bars")]
    return _section("Size", *found) if found else Markup()


def _bar(value: int | None, most: int, class_: str) -> Markup:
    """Return a size with a bar below it."""
    if value is None:
        return Markup("–")
    drawn = element("i", style=f"width:{100 * value / max(most, 1):.1f}%", class_=class_ or None)
    return joined(size(value), element("div", drawn, class_="bar", aria_hidden="true"))


def _quality(entry: ArtifactEntry) -> Markup:
    found: list[Child] = []
    rows = [_checked(export) for export in entry.exports if export.verification is not None]
    if rows:
        header = (
            "Export",
            "Opened in",
            "Verdict",
            "Weights",
            "Largest difference",
            "Mean KL, nats",
            "Top-1",
            "Positions",
        )
        said = "Each export was opened in its own engine and compared with the model that was exported."
        found += [element("h4", "Verification"), element("p", said, class_="soft")]
        found.append(_table(header, rows, numbers={4, 5, 6, 7}))
    gates: list[Mapping[str, Any]] = (entry.run or {}).get("gates") or []
    if gates:
        found += [element("h4", "Gates"), *map(_gate, gates)]
    for one in entry.evaluations:
        whose = "the source" if one.export is None else one.export
        figures = [
            [
                labelled(name, figure.value)[0],
                plain(name, figure.value),
                f"{plain(name, figure.low)} to {plain(name, figure.high)}"
                if figure.low is not None and figure.high is not None
                else "–",
            ]
            for name, figure in one.figures.items()
        ]
        found.append(element("h4", f"Evaluation of {whose}"))
        found.append(element("p", f"{one.data}, in {one.runtime}", class_="soft"))
        found.append(_table(("Figure", "Value", "95 % interval"), figures, numbers={1, 2}))
    return _section("Quality", *found) if found else Markup()


def _checked(export: ExportEntry) -> list[Child]:
    figures = export.verification or {}
    weights = {None: "–", True: "equal bit for bit", False: "differ"}[figures.get("weights_equal")]
    return [
        export.name,
        figures.get("runtime", ""),
        _verdict(export),
        weights,
        _or_dash(figures.get("max_difference"), number),
        _or_dash(figures.get("mean_kl"), number),
        _or_dash(figures.get("top1_agreement"), share),
        _or_dash(figures.get("positions"), number),
    ]


def _verdict(export: ExportEntry) -> Markup:
    if export.verification is None:
        return element("span", "? not verified", class_="doubt")
    kind, words = _VERDICTS["passed" if export.verification["passed"] else "failed"]
    return element("span", words, class_=kind)


def _gate(gate: Mapping[str, Any]) -> Markup:
    kind, words = _VERDICTS.get(str(gate.get("verdict")), ("doubt", str(gate.get("verdict"))))
    unit = str(gate.get("unit") or "")
    value, low, high, limit = (gate[key] for key in ("value", "low", "high", "limit"))
    low, high = (value, value) if low is None or high is None else (low, high)
    sure = f", {share(gate['confidence'])} sure" if gate.get("confidence") else ""
    between = f"{sure} between {in_unit(low, unit)} and {in_unit(high, unit)}" if low < high else ""
    against = " against the source" if gate.get("against") == "source" else ""
    told = (
        f"{labelled(gate['metric'], None)[0]} {in_unit(value, unit)}{against}{between}; "
        f"the limit is {gate['comparison']} {in_unit(limit, unit)}; {_counted(gate['samples'], 'sample')}"
    )
    if gate.get("samples_needed"):
        told += f", about {number(gate['samples_needed'])} are needed"
    top = [element("strong", element("span", words, class_=kind)), f" {gate['text']} ({gate['export']})"]
    return element("figure", element("figcaption", top), charts.interval(value, low, high, limit, told), element("p", told),
                   style="max-width:36rem")  # fmt: skip


def _layers(entry: ArtifactEntry) -> Markup:
    if not entry.maps:
        return Markup()
    found: list[Child] = []
    same: list[Child] = []
    for one in entry.maps:
        if one.figure == "bits" and one.low == one.high:
            same.append(element("p", f"Every rounded layer in {one.stack} has {number(one.low)} bits."))
            continue
        what = "bits" if one.figure == "bits" else "error"
        caption = f"{one.stack}: the highest {what} is that of {one.highest}."
        found.append(element("div", _plot(charts.heat_map(one), caption), _cells(one)))
    about = (
        "The error is |W − W′| / |W|, W being the weight as the pass that rounded it was given it; of experts the largest "
        "of a block is shown."
    )
    return _section("Layer by layer", same, element("p", about, class_="soft"), element("div", found, class_="plots"))


def _cells(layers: LayerMap) -> Markup:
    write = number if layers.figure == "bits" else share
    rows = [
        [str(block), *(_or_dash(value, write) for value in figures)]
        for block, figures in zip(layers.blocks, layers.cells, strict=True)
    ]
    names = charts.short_names(layers.kinds)
    table = _table(
        ("Block", *names), rows, numbers=set(range(1, len(names) + 1)), kind="tall" if len(rows) > 12 else "grid"
    )
    return element("details", element("summary", "All values as a table"), table)


def _curves(entry: ArtifactEntry) -> Markup:
    drawn: list[Markup] = []
    for one in entry.passes:
        for name, series in _series(one).items():
            label, unit = _LOSSES.get(name, (labelled(name, None)[0], "loss"))
            drawn.append(_plot(charts.curve(f"{one.name}: {label}", unit, series)))
    return _section("Learning", element("div", drawn, class_="plots")) if drawn else Markup()


def _series(one: PassEntry) -> dict[str, dict[str, list[tuple[float, float]]]]:
    """Return by loss the lines to draw: of training, and of held-out rows where these were measured."""
    found: dict[str, dict[str, list[tuple[float, float]]]] = {}
    for point in one.curve:
        for key, value in point.items():
            if key in ("step", "learning_rate"):
                continue
            name = key.removeprefix("held_out_")
            line = "held out" if name != key else "training"
            found.setdefault(name, {}).setdefault(line, []).append((point["step"], value))
    return {
        name: {key: lines[key] for key in ("training", "held out") if len(lines.get(key, ())) > 1}
        for name, lines in found.items()
        if any(len(line) > 1 for line in lines.values())
    }


def _time(entry: ArtifactEntry) -> Markup:
    run = entry.run
    if run is None:
        said = "Not recorded: llmopt.run.json does not lie in the artifact."
        return _section("Time and memory", element("p", said, class_="soft"))
    most = max((step["seconds"] for step in run.get("steps", ())), default=1) or 1
    rows: list[Sequence[Child]] = []
    for step in run.get("steps", ()):
        notes = []
        if step.get("cached"):
            notes.append(f"from the cache, {seconds(step['seconds_saved'])} saved")
        if step.get("blocks_resumed"):
            notes.append(f"{number(step['blocks_resumed'])} blocks of an earlier run taken over")
        drawn = element("i", style=f"width:{100 * step['seconds'] / most:.1f}%")
        time = joined(seconds(step["seconds"]), element("div", drawn, class_="bar", aria_hidden="true"))
        rows.append(
            [step["name"], time, seconds(step["cpu_seconds"]), size(step["peak_memory_bytes"]), "; ".join(notes) or "–"]
        )
    machine = run.get("machine", {})
    memory = machine.get("memory_bytes")
    said = f"{run.get('started', '')}, on {machine.get('processor', '?')}, {_counted(machine.get('cores'), 'core')}"
    said += f", {size(memory)} of memory" if memory else ""
    said += f", {machine.get('system', '')}; {_counted(run.get('threads'), 'thread')}"
    whole = f"{seconds(run['seconds'])} altogether, {seconds(run['cpu_seconds'])} of processor time"
    return _section(
        "Time and memory",
        element("p", f"{whole}. {said}.", class_="soft"),
        _table(("Step", "Time", "Processor", "Peak memory", "Note"), rows, kind="bars"),
    )


def _speed(entry: ArtifactEntry) -> Markup:
    if not entry.speeds:
        return Markup()
    columns = {name: label for name, label in _SPEEDS.items() if any(name in one.figures for one in entry.speeds)}
    rows: list[Sequence[Child]] = []
    for one in entry.speeds:
        whose = "source" if one.export is None else one.export
        figures = [_or_dash(one.figures.get(name), lambda value, name=name: _rate(name, value)) for name in columns]
        rows.append([whose, one.runtime, *figures])
    machine = entry.speeds[0].machine
    about = ", ".join(" ".join(labelled(name, value)) for name, value in machine.items() if value is not None)
    table = _table(("Of", "Engine", *columns.values()), rows, numbers=set(range(2, 2 + len(columns))))
    return _section("Speed and memory by engine", element("p", about, class_="soft"), table)


def _rate(name: str, value: float) -> str:
    return number(value) if name.endswith("per_second") else plain(name, value)


def _loading(entry: ArtifactEntry) -> Markup:
    found: list[Child] = []
    for export in entry.exports:
        for snippet in export.load:
            found += [element("h4", f"{export.name}: {snippet.engine}"), _code(snippet.code)]
    return _section("How to load it", *found) if found else Markup()


def _code(code: str) -> Markup:
    return element("pre", element("code", code), tabindex=0)


def _left_out(entry: ArtifactEntry) -> Markup:
    lines: list[str] = []
    for one in entry.passes:
        for skip in one.skipped:
            more = f" and {number(skip.more)} more" if skip.more else ""
            lines.append(f"{one.name}: {', '.join(skip.names)}{more}: {skip.reason}")
    notes = [f"{export.name}: {note}" for export in entry.exports for note in export.notes]
    found: list[Child] = []
    if lines:
        found += [element("h4", "Left out"), element("ul", [element("li", line) for line in lines], class_="plain")]
    if notes:
        found += [element("h4", "Notes"), element("ul", [element("li", note) for note in notes], class_="plain")]
    return _section("Left out, and notes", *found) if found else Markup()


def _provenance(entry: ArtifactEntry) -> Markup:
    source = entry.source
    rows: list[Sequence[Child]] = [["llmopt", entry.llmopt], ["Seed", number(entry.seed)]]
    names = {"id": "Source", "revision": "Revision", "license": "License", "architecture": "Architecture",
             "dtype": "Stored as", "sha256": "SHA-256 of the source"}  # fmt: skip
    rows += [[label, str(source[key])] for key, label in names.items() if source.get(key)]
    if isinstance(source.get("parameters"), int):
        rows.append(["Parameters", number(source["parameters"])])
    if entry.calibration:
        told = ", ".join(" ".join(labelled(key, value)) for key, value in entry.calibration.items())
        rows.append(["Calibration", told])
    rows += [[name, version] for name, version in entry.versions.items()]
    recipe = element("details", element("summary", "The recipe"), _code(entry.recipe))
    return _section("Versions and origin", _table(("What", "Which"), rows, kind="grid"), recipe)


# Tables


def _table(
    header: Sequence[str],
    rows: Sequence[Sequence[Child]],
    *,
    numbers: Collection[int] = (),
    wide: Collection[int] = (),
    kind: str = "stack",
) -> Markup:
    """Return a table whose first column names the rows.

    Args:
        header: names of the columns.
        rows: cells.
        numbers: the columns to align on the right.
        wide: the columns that hold sentences.
        kind: "stack", its rows become lists on a phone; "grid", it stays a table, scrolled where it must be; "tall",
            the same for many rows; "bars", its cells hold bars.
    """
    classes = ["number" if at in numbers else "wide" if at in wide else None for at in range(len(header))]
    top = [_cell("th", name, "columnheader", scope="col", class_=classes[at]) for at, name in enumerate(header)]
    body = [
        element(
            "tr",
            _cell("th", row[0], "rowheader", scope="row"),
            [
                _cell("td", cell, "cell", class_="none" if cell == "–" else classes[at], data_label=header[at])
                for at, cell in enumerate(row[1:], 1)
            ],
            role="row",
        )
        for row in rows
    ]
    table = element(
        "table",
        element("thead", element("tr", top, role="row"), role="rowgroup"),
        element("tbody", body, role="rowgroup"),
        class_={"bars": "bars stack", "tall": "grid"}.get(kind, kind),
        role="table",
    )
    name = f"Table: {', '.join(header[:3])}"
    scrolled = "scroll tall" if kind == "tall" else "scroll"
    return element("div", table, class_=scrolled, tabindex=0, role="region", aria_label=name)


def _cell(tag: str, content: Child, role: str, **attributes: object) -> Markup:
    """Return a cell; its role is told because a phone shows it as a block."""
    return element(tag, content, role=role, **attributes)


def _counted(amount: int | None, what: str) -> str:
    return f"{_or_dash(amount, number)} {what}{'' if amount == 1 else 's'}"


def _or_dash(value: Any, write: Callable[[Any], str]) -> str:
    return "–" if value is None else write(value)
