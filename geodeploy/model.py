"""A model that stays loaded from scene to scene, or the base of several with some of its adapters."""

from collections import OrderedDict
from pathlib import Path
from threading import Lock
from typing import Self

from geodeploy.errors import ModelError
from geodeploy.options import PredictOptions, Progress
from geodeploy.predict import check_places, default_model, map_paths, map_scenes
from geodeploy.report import Report
from geodeploy.runtime import Device, Runtime, Session, open_base, open_session
from geodeploy.runtime.adapter import Base
from geodeploy.runtime.graph import is_base


class Model:
    """What `predict` needs beside the scene, loaded once; any number of threads may use it.

    Args:
        model: An ONNX file with its description, a base, or a RUN; None for the model that comes along.
        adapters: Of a base, how many are kept at most; the one not used for longest goes first. Each
            takes the memory of its decoder and its file.
        runtime: As in `PredictOptions`, as are ``device`` and ``threads``.
        device: See ``runtime``.
        threads: See ``runtime``.

    Raises:
        GeodeployError: what `predict` raises for a model that cannot be loaded.
    """

    def __init__(
        self,
        model: Path | str | None = None,
        *,
        adapters: int = 8,
        runtime: Runtime = "auto",
        device: Device = "auto",
        threads: int | None = None,
    ) -> None:
        self.path = default_model() if model is None else Path(model)
        load = open_base if self.path.is_file() and is_base(self.path) else open_session
        self._loaded: Base | Session = load(self.path, runtime=runtime, device=device, threads=threads)
        self._adapted: OrderedDict[tuple[Path, int, int], Session] = OrderedDict()
        self._most = max(adapters, 1)
        self._lock = Lock()

    def predict(
        self,
        source: Path | str,
        output: Path | str | None = None,
        *,
        adapter: Path | str | None = None,
        options: PredictOptions | None = None,
        progress: Progress | None = None,
    ) -> Report:
        """`geodeploy.predict` with this model, which a base is with an ``adapter``.

        Runtime, device and threads are those the model was loaded with, whatever ``options`` say.
        """
        options = options or PredictOptions()
        if adapter is not None:
            options = options.model_copy(update={"adapter": Path(adapter)})
        scenes = [Path(source)]
        outputs = map_paths(scenes, None if output is None else Path(output))
        check_places(scenes, outputs, self.path, options)
        session = self.session(options.adapter)
        model = options.adapter or self.path
        (report,) = map_scenes(scenes, session, model, outputs, options, progress)
        assert isinstance(report, Report)  # what is wrong with one scene alone is raised
        return report

    def session(self, adapter: Path | None = None) -> Session:
        """The model, ready to run tiles; of a base the one that ``adapter`` makes.

        It stays usable when another takes the adapter's place.

        Raises:
            ModelError: a base needs an adapter, another model has none; or it does not fit the base.
        """
        if not isinstance(self._loaded, Base):
            if adapter is not None:
                raise ModelError(f"{self.path} is no base that takes adapters: leave {adapter} out.")
            return self._loaded
        if adapter is None:
            raise ModelError(f"{self.path} is the base of several models: name an adapter.")
        try:
            state = adapter.stat()
        except OSError as error:
            raise ModelError(f"The adapter {adapter} cannot be read ({error.strerror}).") from error
        key = (adapter.absolute(), state.st_mtime_ns, state.st_size)
        with self._lock:
            if key not in self._adapted:
                self._adapted[key] = self._loaded.session(adapter)
            self._adapted.move_to_end(key)
            if len(self._adapted) > self._most:
                self._adapted.popitem(last=False)
            return self._adapted[key]

    def close(self) -> None:
        """Give back what the model holds. What runs at the time goes on to its end."""
        self._adapted.clear()
        del self._loaded

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
