"""What a check of data found, as typed results."""

from collections import defaultdict
from collections.abc import Iterator
from typing import Literal

from pydantic import BaseModel, ConfigDict

_SHOWN = 5
"""Findings of a kind that are printed; JSON has all."""

Severity = Literal["error", "warning", "note"]


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, use_attribute_docstrings=True)


class Finding(_Frozen):
    """One thing that is or may be wrong."""

    severity: Severity
    """An ``error`` makes the training fail or its scores worthless, a ``warning`` may; a ``note`` is
    good to know."""
    kind: str
    """``unreadable``, ``labels``, ``range``, ``classes``, ``bands``, ``duplicate``, ``ground``,
    ``crs``, ``resolution`` or ``nodata``."""
    where: str
    """The key in the recipe and the file; empty for all the data."""
    message: str


class ClassCount(_Frozen):
    """Labelled pixels of one class where the image holds data."""

    value: int
    name: str
    train: int
    validation: int
    test: int


class TargetFacts(_Frozen):
    """The labels of one quantity in one split, where the image holds data."""

    name: str
    unit: str
    split: str
    pixels: int
    mean: float
    std: float
    minimum: float
    maximum: float


class SceneFacts(_Frozen):
    """What one image was found to be."""

    where: str
    split: str
    height: int
    width: int
    crs: str | None
    gsd_m: float | None
    nodata_share: float
    """Of its pixels, 0 to 1."""
    means: tuple[float, ...]
    """Of each band in model order, in units; empty where nothing holds data."""


class DataReport(_Frozen):
    """All that was found, the worst first."""

    findings: tuple[Finding, ...]
    classes: tuple[ClassCount, ...] = ()
    targets: tuple[TargetFacts, ...] = ()
    """Of each target, one a split that has labels."""
    scenes: tuple[SceneFacts, ...]
    """Those that could be read."""

    @property
    def errors(self) -> int:
        """How many findings are errors."""
        return sum(finding.severity == "error" for finding in self.findings)

    def __str__(self) -> str:
        lines = list(self._table())
        kinds: dict[tuple[str, str], list[Finding]] = defaultdict(list)
        for finding in self.findings:
            kinds[finding.severity, finding.kind].append(finding)
        for (severity, kind), found in kinds.items():
            lines += [
                f"{severity}: {': '.join(filter(None, (item.where, item.message)))}"
                for item in found[:_SHOWN]
            ]
            if len(found) > _SHOWN:
                lines.append(f"{severity}: {len(found) - _SHOWN} more of this kind ({kind}).")
        warnings = sum(finding.severity == "warning" for finding in self.findings)
        lines.append(f"{len(self.scenes)} images read; {self.errors} errors, {warnings} warnings.")
        return "\n".join(lines)

    def _table(self) -> Iterator[str]:
        names = [item.name for item in self.classes] or [fact.name for fact in self.targets]
        width = max(map(len, ["class", *names]))
        if self.targets:
            yield f"{'target':{width}} {'unit':<8} {'split':<10} {'pixels':>12} mean, std, range"
        for fact in self.targets:
            yield (
                f"{fact.name:{width}} {fact.unit:<8} {fact.split:<10} {fact.pixels:12,} "
                f"{fact.mean:.4g}, {fact.std:.4g}, {fact.minimum:.4g} to {fact.maximum:.4g}"
            )
        if self.classes:
            yield f"{'class':{width}} {'train':>12} {'validation':>12} {'test':>12}"
        for item in self.classes:
            yield f"{item.name:{width}} {item.train:12,} {item.validation:12,} {item.test:12,}"


class Findings(list[Finding]):
    """Those so far."""

    def say(self, severity: Severity, kind: str, where: str, message: str) -> None:
        """Add one."""
        self.append(Finding(severity=severity, kind=kind, where=where, message=message))
