"""What follows for split points from what was recovered."""

from __future__ import annotations

from coordinator.lab.privacy.report import AuditReport, Cell
from coordinator.lab.privacy.score import Recovery
from coordinator.lab.privacy.table import advice, percent


def recovery(top1: float) -> Recovery:
    """So much of a hundred tokens."""
    return Recovery(tokens=100, top1=top1, top10=top1, sentences=10, exact=0.0)


def report(shares: dict[tuple[int, str, str], float], share: float = 0.5) -> AuditReport:
    """A report on a model of 5 blocks, by split, codec and attack."""
    cells = [
        Cell(split=split, codec=codec, attack=attack, found={"prompts": recovery(top1)})
        for (split, codec, attack), top1 in shares.items()
    ]
    return AuditReport(
        model="m",
        learned="nothing",
        task="causal-lm",
        num_blocks=5,
        share=share,
        seed=0,
        texts=1,
        tokens=100,
        known_tokens=100,
        known_from="elsewhere",
        baseline={"prompts": recovery(0.01)},
        cells=tuple(cells),
        labels=(),
        told=None,
        notes=(),
    )


def test_the_least_split_holds_from_there_on() -> None:
    """A split does if less is recovered there and at every deeper one, by the best attack."""
    shares = {
        (1, "int8", "state"): 0.9,
        (2, "int8", "state"): 0.3,
        (3, "int8", "state"): 0.6,
        (4, "int8", "state"): 0.1,
        (4, "int8", "inverter"): 0.2,
    }

    assert report(shares).least_split("int8") == 4
    assert report(shares, share=0.65).least_split("int8") == 2
    assert report(shares, share=0.2).least_split("int8") == 5
    assert report(shares, share=0.2).least_split_of("state") == 4
    assert report(shares).least_split_of("search") is None


def test_the_suggestion_does_for_every_codec() -> None:
    """It is the deepest of the codecs' least splits; all blocks where no smaller one does."""
    shares = {(1, "int8", "state"): 0.9, (2, "int8", "state"): 0.1, (1, "int2", "state"): 0.1}
    shares |= {(2, "int2", "state"): 0.1}
    bad = {**shares, (4, "int8", "state"): 0.8}

    assert (report(shares).least_split("int2"), report(shares).suggested) == (1, 2)
    assert "planning.min_split: 2" in "\n".join(advice(report(shares)))
    assert report(bad).suggested == 5
    assert "no hidden state leaves it" in "\n".join(advice(report(bad)))


def test_embeddings_count_for_no_split() -> None:
    """What enters the first block is there for comparison: it is no split point."""
    shares = {(0, "int8", "state"): 1.0, (1, "int8", "state"): 0.1}

    assert report(shares).splits == (1,)
    assert report(shares).suggested == 1


def test_nearly_all_is_not_all() -> None:
    """A share is written as 100 % only where nothing is missing."""
    assert [percent(share) for share in (1.0, 0.9999, 0.996, 0.5)] == [
        "100%",
        "99.9%",
        "99.6%",
        "50%",
    ]
