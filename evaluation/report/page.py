"""The report as one HTML page: no script, no request, no number that is not in the document."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.resources import files

from ...core.manifest import GateRecord
from ...core.numbers import in_unit, labelled, number, plain, seconds, share, size
from ..gates import label
from . import charts
from .comparison import comparison
from .document import ArtifactEntry, ExportEntry, LayerMap, PassEntry, Report
from .markup import Child, Markup, element
from .tables import VERDICTS, bar, counted, or_dash, table, verdict

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
_LOSSES = {
    "kl": ("KL from the teacher", "nats a token"),
    "reverse_kl": ("reverse KL from the teacher", "nats a token"),
    "js": ("JS from the teacher", "nats a token"),
    "lm": ("loss on the text", "nats a token"),
    "labels": ("loss on the labels", "nats"),
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
    body = [comparison(report)] if several else []
    for at, entry in enumerate(report.artifacts):
        body.append(_artifact(entry, anchor=f"artifact-{at + 1}", titled=several))
    head = element(
        "head",
        element("meta", charset="utf-8"),
        element("meta", name="viewport", content="width=device-width, initial-scale=1"),
        element("meta", name="color-scheme", content="light dark"),
        element("title", f"{title}: llmopt report"),
        element("style", Markup(files(__package__ or "").joinpath("style.css").read_text(encoding="utf-8"))),
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
        shown.append(("Bits per weight", or_dash(bits, number), f"{count}, with scales"))
        if error is not None:
            shown.append(("Median error", share(error), "of a rounded weight"))
    shown += [
        (f"Verified, {export.name}", verdict(export), (export.verification or {}).get("runtime"))
        for export in entry.exports
    ]
    if entry.run is not None:
        shown.append(("Built in", seconds(entry.run.seconds), f"{size(entry.run.peak_memory_bytes)} at the peak"))
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
    return _section("What was done", table(header, rows, numbers={1, 2}, wide={4}))


def _sizes(entry: ArtifactEntry) -> Markup:
    found = [*_by_part(entry), *_step_by_step(entry)]
    return _section("Size", *found) if found else Markup()


def _by_part(entry: ArtifactEntry) -> list[Markup]:
    before: Mapping[str, int] = entry.source.get("parts") or {}
    columns = [("Before", before, "before")] if before else []
    columns += [(export.name, export.parts, None) for export in entry.exports if export.parts]
    most = max((value for _, parts, _ in columns for value in parts.values()), default=0)
    rows: list[Sequence[Child]] = [
        [
            PARTS[kind],
            *(
                bar(size(parts[kind]), parts[kind], most, class_) if kind in parts else "–"
                for _, parts, class_ in columns
            ),
        ]
        for kind in PARTS
        if any(kind in parts for _, parts, _ in columns)
    ]
    header = ("Part", *(name for name, _, _ in columns))
    return [element("h4", "By part"), table(header, rows, kind="bars")] if rows else []


def _step_by_step(entry: ArtifactEntry) -> list[Markup]:
    most = max((step.size_bytes for step in entry.size_path), default=0)
    rows: list[Sequence[Child]] = [
        [
            step.name,
            bar(size(step.size_bytes), step.size_bytes, most, "before" if at == 0 else None),
            or_dash(step.share, share),
            ", ".join(" ".join(labelled(name, value)) for name, value in step.quality.items()) or "–",
        ]
        for at, step in enumerate(entry.size_path)
    ]
    if len(rows) < 2:
        return []
    said = "Weights after each step, codes packed without gaps; an export counts all its files."
    made = table(("After", "Size", "Of source", "Quality there"), rows, kind="bars")
    return [element("h4", "Step by step"), element("p", said, class_="soft"), made]


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
        found.append(table(header, rows, numbers={4, 5, 6, 7}))
    if entry.run is not None and entry.run.gates:
        found += [element("h4", "Gates"), *map(_gate, entry.run.gates)]
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
        found.append(table(("Figure", "Value", f"{share(one.confidence)} interval"), figures, numbers={1, 2}))
    return _section("Quality", *found) if found else Markup()


def _checked(export: ExportEntry) -> list[Child]:
    figures = export.verification or {}
    weights = {None: "–", True: "equal bit for bit", False: "differ"}[figures.get("weights_equal")]
    return [
        export.name,
        figures.get("runtime", ""),
        verdict(export),
        weights,
        or_dash(figures.get("max_difference"), number),
        or_dash(figures.get("mean_kl"), number),
        or_dash(figures.get("top1_agreement"), share),
        or_dash(figures.get("positions"), number),
    ]


def _gate(gate: GateRecord) -> Markup:
    kind, words = VERDICTS[gate.verdict]
    low, high = (gate.value, gate.value) if gate.low is None or gate.high is None else (gate.low, gate.high)
    sure = f", {share(gate.confidence)} sure" if gate.confidence else ""
    between = f"{sure} between {in_unit(low, gate.unit)} and {in_unit(high, gate.unit)}" if low < high else ""
    against = " against the source" if gate.against else ""
    told = (
        f"{labelled(gate.metric, None)[0]} {in_unit(gate.value, gate.unit)}{against}{between}; "
        f"the limit is {gate.comparison} {in_unit(gate.limit, gate.unit)}"
    )
    told += f"; {counted(gate.samples, 'sample')}" if gate.samples else ""
    told += f", about {number(gate.samples_needed)} are needed" if gate.samples_needed is not None else ""
    top = [element("strong", element("span", words, class_=kind)), f" {label(gate)}"]
    drawn = charts.interval(gate.value, low, high, gate.limit, told)
    return element("figure", element("figcaption", top), drawn, element("p", told), class_="gate")


def _plot(drawn: Markup, caption: str | None = None) -> Markup:
    return element("figure", drawn, element("figcaption", caption) if caption else None)


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
        "The error is |W − W′| / |W|, W being the weight as the pass that rounded it was given it; of experts the "
        "largest of a block is shown."
    )
    return _section("Layer by layer", same, element("p", about, class_="soft"), element("div", found, class_="plots"))


def _cells(layers: LayerMap) -> Markup:
    write = number if layers.figure == "bits" else share
    rows = [
        [str(block), *(or_dash(value, write) for value in figures)]
        for block, figures in zip(layers.blocks, layers.cells, strict=True)
    ]
    names = charts.short_names(layers.kinds)
    made = table(
        ("Block", *names), rows, numbers=set(range(1, len(names) + 1)), kind="tall" if len(rows) > 12 else "grid"
    )
    return element("details", element("summary", "All values as a table"), made)


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
    most = max((step.seconds for step in run.steps), default=0.0)
    rows: list[Sequence[Child]] = []
    for step in run.steps:
        notes: list[str] = []
        if step.seconds_saved:
            notes.append(f"{'' if step.cached else 'partly '}from the cache, {seconds(step.seconds_saved)} saved")
        if step.blocks_resumed:
            notes.append(f"{counted(step.blocks_resumed, 'block')} of an earlier run taken over")
        time = bar(seconds(step.seconds), step.seconds, most)
        rows.append([step.name, time, seconds(step.cpu_seconds), size(step.peak_memory_bytes), "; ".join(notes) or "–"])
    machine = run.machine
    said = f"{seconds(run.seconds)} altogether, {seconds(run.cpu_seconds)} of processor time. Begun {run.started}, on "
    said += f"{machine.processor}, {counted(machine.cores, 'core')}"
    said += f", {size(machine.memory_bytes)} of memory" if machine.memory_bytes else ""
    said += f", {machine.system}; {counted(run.threads, 'thread')}."
    made = table(("Step", "Time", "Processor", "Peak memory", "Note"), rows, kind="bars")
    return _section("Time and memory", element("p", said, class_="soft"), made)


def _speed(entry: ArtifactEntry) -> Markup:
    if not entry.speeds:
        return Markup()
    columns = {name: label for name, label in _SPEEDS.items() if any(name in one.figures for one in entry.speeds)}
    rows: list[Sequence[Child]] = []
    for one in entry.speeds:
        whose = "source" if one.export is None else one.export
        figures = [or_dash(one.figures.get(name), lambda value, name=name: _rate(name, value)) for name in columns]
        rows.append([whose, one.runtime, *figures])
    machine = entry.speeds[0].machine
    about = ", ".join(" ".join(labelled(name, value)) for name, value in machine.items() if value is not None)
    made = table(("Of", "Engine", *columns.values()), rows, numbers=set(range(2, 2 + len(columns))))
    return _section("Speed and memory by engine", element("p", about, class_="soft"), made)


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
    return _section("Versions and origin", table(("What", "Which"), rows, kind="grid"), recipe)
