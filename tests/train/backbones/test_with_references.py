"""Published networks, where they are installed, against ours with the same random weights."""

from pathlib import Path

import pytest
import torch
from comparing import LARGEST, largest_difference, maps_of, ours
from references import REFERENCES, filled, pixels_of

pytest.importorskip("terratorch", reason="needs terratorch and torchgeo, too heavy for the extra dev")

pytestmark = pytest.mark.filterwarnings("ignore")  # of libraries that are not ours


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.mark.parametrize("name", REFERENCES)
def test_published_weights_give_the_features_that_the_published_network_gives(
    name: str, tmp_path: Path
) -> None:
    reference = REFERENCES[name]
    native = reference.sides[0]
    try:
        tensors = filled(reference.build(native))
    except ImportError as error:
        pytest.skip(str(error))
    for side in reference.sides:
        pixels = pixels_of(len(reference.bands), side)
        backbone = ours(reference, tensors, side, tmp_path)
        assert not backbone.new_patches
        found = largest_difference(maps_of(backbone, pixels), reference.answer(tensors, pixels))
        print(f"{name} on tiles of {side}: {found:.1e}")
        assert found <= LARGEST
