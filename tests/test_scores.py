import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from geodeploy.scores import Scores, confusion_matrix
from geodeploy.spec import SegmentationClass


def classes(count: int) -> list[SegmentationClass]:
    return [
        SegmentationClass(value=10 * place, name=f"c{place}", color="#000000") for place in range(count)
    ]


@given(seed=st.integers(0, 2**16), count=st.integers(1, 6), pixels=st.integers(0, 200))
def test_each_score_is_what_its_definition_says_of_the_pixels(
    seed: int, count: int, pixels: int
) -> None:
    random = np.random.default_rng(seed)
    # Now and then a class that nobody has.
    labels, predictions = random.integers(0, max(count - 1, 1), (2, pixels))
    scores = Scores.from_confusion(confusion_matrix(labels, predictions, count), classes(count))
    for place, score in enumerate(scores.classes):
        truth, found = labels == place, predictions == place
        both, either = (truth & found).sum(), (truth | found).sum()
        assert score.pixels == truth.sum()
        if not either:
            assert score.iou is score.f1 is score.precision is score.recall is None
            continue
        assert score.iou == pytest.approx(both / either)
        assert score.f1 == pytest.approx(2 * both / (truth.sum() + found.sum()))
        assert score.precision == pytest.approx(both / found.sum() if found.any() else 0)
        assert score.recall == pytest.approx(both / truth.sum() if truth.any() else 0)
    present = [score.iou for score in scores.classes if score.iou is not None]
    assert scores.miou == (pytest.approx(np.mean(present)) if present else None)
    assert scores.accuracy == (pytest.approx((labels == predictions).mean()) if pixels else None)


def test_a_worked_case() -> None:
    labels = np.array([[0, 0, 1], [1, 1, 2]])
    predictions = np.array([[0, 1, 1], [1, 1, 1]])
    counts = confusion_matrix(labels, predictions, 4)
    np.testing.assert_array_equal(counts[:3, :3], [[1, 1, 0], [0, 3, 0], [0, 1, 0]])
    scores = Scores.from_confusion(counts, classes(4), ignored=9)
    # Class 2 is labelled and never found: it counts as zero. Class 3 is nowhere: it does not count.
    assert [score.iou for score in scores.classes] == [0.5, 0.6, 0.0, None]
    assert scores.miou == pytest.approx(1.1 / 3)
    assert scores.accuracy == pytest.approx(4 / 6)
    assert scores.ignored == 9


def test_matrices_of_parts_add_up_to_the_matrix_of_the_whole() -> None:
    labels, predictions = np.random.default_rng(1).integers(0, 3, (2, 40, 50), dtype=np.uint8)
    whole = confusion_matrix(labels, predictions, 3)
    parts = sum(confusion_matrix(labels[r : r + 7], predictions[r : r + 7], 3) for r in range(0, 40, 7))
    np.testing.assert_array_equal(parts, whole)


def test_a_matrix_of_many_classes_does_not_overflow_the_labels_type() -> None:
    labels = np.array([200, 254], np.uint8)
    counts = confusion_matrix(labels, labels, 255)
    assert counts[200, 200] == counts[254, 254] == 1


def test_the_json_has_the_keys_that_scripts_read() -> None:
    scores = Scores.from_confusion(np.array([[3, 1], [0, 2]]), classes(2), ignored=1)
    document = scores.model_dump(mode="json")
    assert set(document) == {"miou", "accuracy", "classes", "confusion", "ignored"}
    keys = {"name", "value", "iou", "f1", "precision", "recall", "pixels"}
    assert set(document["classes"][0]) == keys
    assert document["confusion"] == [[3, 1], [0, 2]]


def test_the_text_shows_a_dash_for_a_class_that_is_nowhere() -> None:
    text = str(Scores.from_confusion(np.array([[3, 0], [0, 0]]), classes(2)))
    assert "c1                  10      -      -      -      - 0" in text
    assert "mean IoU 1.000, accuracy 1.000, 0 pixels ignored" in text
