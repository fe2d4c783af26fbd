"""The picture of a sweep: the loss over the rate, and what is suggested."""

from __future__ import annotations

from coordinator.lab.comparison.plots import COLOURS, Picture, make_panels, to_picture
from coordinator.lab.rates.sweep import Sweep


def draw_sweep(sweep: Sweep) -> Picture:
    """Draw the losses of all steps, smoothed and not, and the rates that count."""
    figure, panels = make_panels(1, 1, width=6.0, height=3.8)
    axes, found = panels[0][0], sweep.found
    rates = [point.rate for point in sweep.points]
    losses = [point.loss for point in sweep.points]
    axes.plot(rates, losses, ".", color="#b0b0b0", label="loss of a step")
    axes.plot(rates, [point.smoothed for point in sweep.points], color=COLOURS[0], label="smoothed")
    if found.steepest is not None:
        label = f"suggested: {found.steepest:.1e}"
        axes.axvline(found.steepest, color=COLOURS[2], label=label)
        axes.axvline(found.lowest, color=COLOURS[1], linestyle="--", label="lowest")
    axes.set(xscale="log", xlabel="learning rate", ylabel="training loss")
    axes.legend(frameon=False)
    caption = f"Trained on {sweep.data}, {sweep.batch_size} sequences a step."
    return to_picture("lr-find", "Learning rate", caption, figure)
