"""What a training found, and where it left it. Imports no torch."""

import math
from pathlib import Path

from pydantic import BaseModel, ConfigDict

from geodeploy.scores import AnyScores


class Checkup(BaseModel):
    """What one validation found."""

    model_config = ConfigDict(frozen=True)

    step: int
    loss: float
    """Mean of the training loss since the last one."""
    lr: float
    scores: AnyScores | None
    """None in a run without validation pixels."""

    @property
    def quality(self) -> float:
        """For comparisons: below every real one where there are no scores."""
        return self.scores.quality if self.scores else -math.inf

    @property
    def is_scored(self) -> bool:
        """Whether there are scores, and one of them is a number."""
        return self.quality > -math.inf

    def beats(self, earlier: "Checkup") -> bool:
        """Whether its weights are to be kept instead; where nothing is scored, the later are."""
        return self.quality > earlier.quality or not earlier.is_scored


class Metrics(BaseModel):
    """The ``metrics.json`` of a RUN."""

    model_config = ConfigDict(frozen=True)

    scores: AnyScores | None
    """Of the weights kept, on the validation area; None without one."""
    held_out: dict[str, AnyScores] = {}
    """Of the weights kept, on each region with ``split = "test"``: nothing was chosen by them."""
    best_step: int
    steps: int
    """Run in all."""
    trainable_parameters: int
    trainable_backbone_parameters: int
    trainable_head_parameters: int
    parameters: int
    """Of the whole network."""
    seconds: float
    """Of training and validation."""
    images_per_s: float
    waiting: float
    """Share of the training's time, validation left out, in which no window was ready."""
    device: str
    processes: int = 1
    """That shared every batch."""
    precision: str
    versions: dict[str, str]
    """Of the packages that a repetition would need."""
    history: tuple[Checkup, ...]
    """Every validation."""


class TrainReport(BaseModel):
    """What a training left, and where."""

    model_config = ConfigDict(frozen=True)

    run: Path
    metrics: Metrics

    def __str__(self) -> str:
        found = self.metrics
        scores = str(found.scores) if found.scores else "No validation pixels: not scored."
        held_out = "".join(f"\nHeld out, {name}:\n{found}" for name, found in found.held_out.items())
        device = found.device if found.processes == 1 else f"{found.processes} times {found.device}"
        return (
            f"{scores}{held_out}\n"
            f"{found.trainable_parameters:,} of {found.parameters:,} parameters trained "
            f"({found.trainable_backbone_parameters:,} in the backbone, "
            f"{found.trainable_head_parameters:,} in the decoder)\n"
            f"{found.steps} steps in {found.seconds:.0f} s on {device}, "
            f"{found.images_per_s:.1f} images/s, {found.waiting:.1%} of the time waiting for data; "
            f"kept step {found.best_step}\n"
            f"RUN: {self.run}"
        )
