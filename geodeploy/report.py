"""What a run did: where the map is, what it holds, how long it took and on what."""

from pathlib import Path
from typing import ClassVar

from pydantic import BaseModel, ConfigDict

_EXPECTED = 0.001
"""What lies beyond either end in training itself."""
_NOTABLE = 0.02
"""Ten times what lies outside in training itself: scenes like those of the training stay below."""


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, use_attribute_docstrings=True)


class ClassArea(_Frozen):
    """How much of the map one class covers."""

    value: int
    name: str
    pixels: int
    share: float
    """Of the pixels that hold data, 0 to 1."""
    area_m2: float | None
    """On the ellipsoid where the CRS is geographic. None without a CRS, or with a geographic one that
    is turned against the meridians."""


class TargetSummary(_Frozen):
    """What one quantity ranges over in the map, in its unit; None where no pixel holds data."""

    name: str
    unit: str
    pixels: int
    minimum: float | None
    maximum: float | None
    mean: float | None
    std: float | None

    def __str__(self) -> str:
        if self.mean is None:
            return f"{self.name:<20} no data"
        return (
            f"{self.name:<20} mean {self.mean:.4g}, std {self.std:.4g}, {self.minimum:.4g} to "
            f"{self.maximum:.4g} {self.unit}"
        ).rstrip()


class LabelSummary(_Frozen):
    """In how much of a coarse map one class shows."""

    name: str
    cells: int
    """That show it with a probability of 0.5 or more."""
    share: float
    """Of the cells that hold data, 0 to 1."""
    mean: float | None
    """Of the probabilities; None without a cell that holds data."""

    def __str__(self) -> str:
        mean = "no data" if self.mean is None else f"mean probability {self.mean:.3f}"
        return f"{self.name:<24} {self.share:6.1%} of the cells, {mean}"


class UnseenShare(_Frozen):
    """How much of one band lies outside what the model saw in training."""

    band: str
    seen: tuple[float, float]
    """What all but a thousandth of the training pixels lay in at either end, in the model's units."""
    below: float
    """Of the scene's valid pixels, 0 to 1."""
    above: float
    """Of the scene's valid pixels, 0 to 1."""

    @property
    def share(self) -> float:
        """Of the valid pixels, below and above together."""
        return self.below + self.above

    @property
    def is_notable(self) -> bool:
        """Whether the user should hear of it."""
        return self.share > _NOTABLE

    def __str__(self) -> str:
        sides = [
            f"{share:.1%} {side}"
            for share, side in ((self.below, "below"), (self.above, "above"))
            if share > _EXPECTED
        ]
        return f"{self.band} {' and '.join(sides)} (seen {self.seen[0]:.4g} to {self.seen[1]:.4g})"


class BusyShares(_Frozen):
    """For each stage, the share of the wall time in which it worked, 0 to 1.

    Reading goes on in threads beside the others, so the shares may sum to more than one.
    """

    read: float
    model: float
    blend: float
    write: float


class Hole(_Frozen):
    """A rectangle of the map that could not be computed and is nodata."""

    row: int
    """Of the map, its first."""
    column: int
    height: int
    width: int
    pixels: int
    """Of them, those that would have a class: not in an area alone, nor where the scene has no data."""
    cause: str


class Failure(_Frozen):
    """One scene of several that could not be mapped."""

    scene: Path
    map: Path
    """Where the map would be."""
    error: str
    is_whole: ClassVar = False

    def __str__(self) -> str:
        return f"{self.scene}: not mapped: {self.error}"


class Report(_Frozen):
    """One scene, mapped."""

    scene: Path
    map: Path
    beside: tuple[Path, ...] = ()
    """Rasters of the same run: confidence, probabilities, disagreement."""
    model: str
    model_sha256: str
    """Of its file; of the adapter where it is one."""
    base_sha256: str | None = None
    """Of the base that the adapter was used with; None for a model by itself."""
    runtime: str
    device: str
    """Where the model really ran."""
    precision: str
    height: int
    """Of the map, in its own pixels, as all that follows."""
    width: int
    valid_pixels: int
    nodata_pixels: int
    tile: int
    overlap: int
    blend: str
    batch: int
    tiles_run: int
    tiles_skipped: int
    """Tiles without a valid pixel, which cost no forward pass."""
    tiles_failed: int = 0
    """Tiles whose answer was left out; where others overlap them these alone count."""
    holes: tuple[Hole, ...] = ()
    """What could not be read, or has no answer of the model, with ``on_error="skip"``."""
    pixels_kept: int
    """Of the map, made by an earlier run: one that was stopped, or one that had finished it."""
    was_there: bool = False
    """Whether the same job had finished the map before, so that nothing was left to do."""
    seconds: float
    pixels_per_s: float
    peak_memory_bytes: int
    """Of the whole process so far, earlier scenes included."""
    planned_memory_bytes: int
    """What such a run holds at its fullest beyond the model's session, by the sum that
    `geodeploy.engine` states."""
    busy: BusyShares
    classes: tuple[ClassArea, ...] = ()
    targets: tuple[TargetSummary, ...] = ()
    labels: tuple[LabelSummary, ...] = ()
    """Of a coarse map of what whole tiles show."""
    unseen: tuple[UnseenShare, ...] | None
    """Each band, from a regular sample of the scene; None if the model does not know what it saw."""
    warnings: tuple[str, ...]
    derived: tuple[Path, ...] = ()
    """Files that were made of the map."""

    @property
    def adapted(self) -> str:
        """Which adapter on which base the model is, in words; empty for a model by itself."""
        if self.base_sha256 is None:
            return ""
        return f" (adapter {self.model_sha256[:12]} on base {self.base_sha256[:12]})"

    @property
    def hole_pixels(self) -> int:
        """Pixels of the map that are nodata for being holes."""
        return sum(hole.pixels for hole in self.holes)

    @property
    def is_whole(self) -> bool:
        """Whether nothing failed."""
        return not self.holes and not self.tiles_failed

    def __str__(self) -> str:
        lines = [
            f"{self.map}: {self.height} x {self.width} pixels in {self.seconds:.1f} s "
            f"({self.pixels_per_s / 1e6:.2f} Mpx/s), {self.tiles_run} tiles run, "
            f"{self.tiles_skipped} empty ones skipped",
            f"  model {self.model}{self.adapted} in {self.precision} on {self.device} "
            f"({self.runtime}), peak memory {self.peak_memory_bytes / 2**20:.0f} MiB",
            f"  busy: read {self.busy.read:.0%}, model {self.busy.model:.0%}, "
            f"blend {self.busy.blend:.0%}, write {self.busy.write:.0%}",
        ]
        for item in self.classes:
            area = "" if item.area_m2 is None else f"  {item.area_m2 / 1e6:12.2f} km²"
            lines.append(f"  {item.value:>3}  {item.name:<20} {item.share:6.1%}{area}")
        lines += [f"  {item}" for item in (*self.targets, *self.labels)]
        if self.was_there:
            lines.append("  made by the same job before: nothing was mapped")
        elif self.pixels_kept:
            share = self.pixels_kept / (self.height * self.width)
            lines.append(f"  {share:.0%} of it kept from a run that was stopped")
        if self.nodata_pixels:
            share = self.nodata_pixels / (self.height * self.width)
            lines.append(f"       {'(no data)':<20} {share:6.1%} of the scene")
        if not self.is_whole:
            causes = "; ".join(dict.fromkeys(hole.cause for hole in self.holes))
            lines.append(
                f"  {self.hole_pixels} pixels in {len(self.holes)} holes, {self.tiles_failed} tiles "
                f"failed{causes and ': '}{causes}"
            )
        notable = [str(item) for item in self.unseen or () if item.is_notable]
        if notable:
            lines.append(f"  hardly seen in training: {', '.join(notable)}")
        if self.beside:
            lines.append(f"  beside it: {', '.join(map(str, self.beside))}")
        if self.derived:
            lines.append(f"  made of it: {', '.join(map(str, self.derived))}")
        return "\n".join(lines)
