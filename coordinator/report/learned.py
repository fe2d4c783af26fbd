"""What a run has learned: its numbers before and after, and its losses against what they cost."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from coordinator.config.scoring import SCORES, scores_in
from coordinator.report.parts import Chart, Grid, Section, by_device, chart_of, text_of
from coordinator.report.run_sums import RunSums
from coordinator.report.svg import ChartLine
from coordinator.results.history import overall, scores
from coordinator.results.run_folder import SAMPLES

_FORMS = (("loss", ".4f"), ("perplexity", ",.2f"), ("accuracy", ".1%"))


def learned(facts: RunSums) -> Section:
    """Return the losses of a run, over samples, time and bytes."""
    time = "modelled time (s)" if facts.is_modelled else "time in rounds (s)"
    samples = {n: float(v) for n, v in facts.history.samples().items()}
    sent = {n: v / 1e6 for n, v in facts.bytes_at.items()}
    axes = (
        ("samples", "samples trained on", samples),
        ("time", time, facts.seconds_at()),
        ("traffic", "sent by and to all devices (MB)", sent),
    )
    charts: list[Chart] = []
    for name, label, at in axes:
        if any(at.values()):
            charts += chart_of(f"Loss over {name}", list(_losses(facts, at)), label, "loss")
    own: dict[str, list[tuple[float, float]]] = {}
    for row in facts.metrics:
        for name, score in scores(row).items():
            if name != "file":
                own.setdefault(name, []).append((row["round"], score["loss"]))
    charts += chart_of("Loss on each device's own validation data", by_device(own), "round", "loss")
    grids = [_scores(facts), _counted(facts), _texts(facts)]
    return Section("What was learned", _choices(facts), charts, grids)


def _choices(facts: RunSums) -> list[str]:
    """Return why the run ended before its last round, and which round's model is the result."""
    found = []
    for row in facts.history.events:
        if row["event"] == "ended.early":
            found.append(
                f"It ended after round {row['round'] + 1}: {row['metric']} had not improved for "
                f"{row['rounds_without']} rounds."
            )
        elif row["event"] == "best.chosen":
            value = text_of(row["value"], ".4f")
            found.append(f"The result is that of round {row['round']}: {row['metric']} {value}.")
    return found


def _texts(facts: RunSums) -> Grid:
    """Return what the model said last to the coordinator's own prompts."""
    rows = facts.folder.rows(SAMPLES)
    newest = rows[-1]["round"] if rows else 0
    said = [[r["prompt"], r["text"]] for r in rows if r["round"] == newest]
    return Grid(("prompt", f"what the model says after round {newest}"), said, num_texts=2)


def _losses(facts: RunSums, at: Mapping[int, float]) -> Iterator[ChartLine]:
    """Yield the loss of training and of evaluation, where *at* says where each round stands."""
    trained = [
        (at[row["round"]], row["train_loss"])
        for row in facts.metrics
        if row["round"] in at and row.get("train_loss") is not None
    ]
    yield ChartLine("training", trained, 1)
    found = [(row["round"], overall(row)) for row in facts.metrics]
    yield ChartLine(
        "evaluation", [(at[n], s.loss) for n, s in found if s is not None and n in at], 0
    )


def _scores(facts: RunSums) -> Grid:
    first, last = facts.history.first_scores(), facts.history.last_scores()
    rows = []
    for who in sorted(last, key=lambda name: (name != "file", name)):
        before, after = first.get(who, {}), last[who]
        name = "the coordinator's file" if who == "file" else f"{who}, own data"
        values = [
            text_of(score.get(key), form) for key, form in _FORMS for score in (before, after)
        ]
        rows.append([name, *values])
    if (tested := facts.history.test()) is not None:
        texts = [text_of(tested.get(f"test_{key}"), form) for key, form in _FORMS]
        row = ["the test file, once at the end"]
        for text in texts:
            row += ["-", text]
        rows.append(row)
    head = ("data", "loss before", "after", "perplexity before", "after")
    return Grid((*head, "accuracy before", "after"), rows)


def _counted(facts: RunSums) -> Grid:
    """Return the scores of `evaluation.scores`, as papers have them."""
    tested = {k.removeprefix("test_"): v for k, v in (facts.history.test() or {}).items()}
    found = [
        (f"the coordinator's file, after round {row['round']}", scores(row).get("file", {}))
        for row in facts.metrics
    ]
    found = [(name, own) for name, own in found if scores_in(own)]
    if scores_in(tested):
        found.append(("the test file, once at the end", tested))
    names = [name for name in SCORES if any(name in own for _, own in found)]
    rows = [
        [who, *(SCORES[n].text(own[n]) if n in own else "-" for n in names)] for who, own in found
    ]
    return Grid(("data", *(SCORES[name].title for name in names)), rows)
