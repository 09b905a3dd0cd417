from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from geodeploy.errors import DeviceError, ModelError
from geodeploy.runtime import open_session
from geodeploy.train.run import load_run


def test_a_run_opens_as_a_session_that_gives_the_models_logits(tune: Callable[..., Path]) -> None:
    path = tune("method.name=lora")
    run = load_run(path)
    session = open_session(path, device="cpu", threads=torch.get_num_threads())
    with torch.inference_mode():
        needed = run.model(torch.from_numpy(run.tiles.pixels[:2])).numpy()
    np.testing.assert_array_equal(session.run(run.tiles.pixels[:2]), needed)
    assert (session.device, session.precision) == ("cpu", "fp32")
    assert session.name.startswith("torch ")
    assert session.sha256 == run.sha256
    assert session.spec == run.spec
    session.close()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_a_gpu_that_is_not_there_is_an_error(tune: Callable[..., Path]) -> None:
    with pytest.raises(DeviceError, match="--device cpu"):
        open_session(tune("method.name=lora"), device="cuda")


def test_any_other_folder_is_no_run(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"no whole RUN: it has no spec\.json"):
        open_session(tmp_path)
