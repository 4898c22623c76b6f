"""The training loss as a picture."""

from __future__ import annotations

from pathlib import Path

WINDOW = 8


def save_plot(path: Path, losses: list[float], before: float, after: float) -> None:
    """Plot the loss of each step, its running mean, and the held-out loss before and after."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    means = [sum(part) / len(part) for part in windows(losses)]
    steps = range(1, len(losses) + 1)
    figure, axes = pyplot.subplots(figsize=(7, 4), layout="constrained")
    axes.plot(steps, losses, color="0.75", label="training batch")
    axes.plot(steps, means, color="C0", label=f"mean of {WINDOW} batches")
    axes.plot(
        [0, len(losses)], [before, after], "o", color="C3", label="held-out, before and after"
    )
    axes.set_xlabel("step")
    axes.set_ylabel("loss per answer token")
    axes.set_ylim(bottom=0)
    axes.legend()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def windows(values: list[float]) -> list[list[float]]:
    """Return the last WINDOW values up to each position."""
    return [values[max(0, end - WINDOW) : end] for end in range(1, len(values) + 1)]
