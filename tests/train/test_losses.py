import numpy as np
import pytest
import torch

from geodeploy.labels import IGNORED
from geodeploy.train.losses import build_loss, class_weights, cross_entropy, taught_entropy
from geodeploy.train.recipe import Training

SHARES = np.array([0.7, 0.25, 0.05])


@pytest.mark.parametrize(
    "weights", [(1, 0, 0, 0), (0, 1, 0, 0), (0, 0, 1, 0), (0, 0, 0, 1), (0.5, 2, 1, 3)]
)
def test_ignored_pixels_carry_no_loss(weights: tuple[float, ...]) -> None:
    names = ("cross_entropy", "dice", "focal", "lovasz")
    loss = build_loss(Training(steps=1, **dict(zip(names, weights, strict=True))), SHARES)
    torch.manual_seed(0)
    logits = torch.randn(2, 3, 8, 8)
    codes = torch.randint(0, 3, (2, 8, 8))
    codes[:, 4:] = IGNORED
    changed = logits.clone()
    changed[:, :, 4:] += 5 * torch.randn(2, 3, 4, 8)
    torch.testing.assert_close(loss(logits, codes), loss(changed, codes))
    logits.requires_grad_()
    loss(logits, codes).backward()
    assert logits.grad is not None
    assert not logits.grad[:, :, 4:].any()
    assert logits.grad[:, :, :4].any()


def test_a_batch_without_labels_has_no_loss_and_a_gradient_of_zero() -> None:
    loss = build_loss(Training(steps=1, focal=1, lovasz=1), SHARES)
    logits = torch.randn(1, 3, 4, 4, requires_grad=True)
    value = loss(logits, torch.full((1, 4, 4), IGNORED))
    value.backward()
    assert value == 0
    assert logits.grad is not None
    assert not logits.grad.any()


def test_cross_entropy_is_that_of_torch_over_the_labelled_pixels() -> None:
    logits, codes = torch.randn(2, 3, 5, 5), torch.randint(0, 3, (2, 5, 5))
    codes[0, 0] = IGNORED
    weights = (1.0, 2.0, 0.5)
    needed = torch.nn.functional.cross_entropy(
        logits, codes, weight=torch.tensor(weights), ignore_index=IGNORED
    )
    torch.testing.assert_close(cross_entropy(logits, codes, weights), needed)


def test_focal_loss_counts_each_pixel_by_how_far_its_class_is_from_certain() -> None:
    torch.manual_seed(0)
    logits, codes = torch.randn(2, 3, 5, 5), torch.randint(0, 3, (2, 5, 5))
    codes[0, 0] = IGNORED
    probs = logits.softmax(dim=1).numpy()
    sums = [0.0, 0.0]
    for place, code in np.ndenumerate(codes.numpy()):
        if code != IGNORED:
            p, weight = probs[place[0], code, place[1], place[2]], (1.0, 2.0, 0.5)[code]
            sums[0] -= weight * (1 - p) ** 2 * np.log(p)
            sums[1] += weight
    found = cross_entropy(logits, codes, (1.0, 2.0, 0.5), gamma=2)
    assert float(found) == pytest.approx(sums[0] / sums[1], rel=1e-5)


def test_lovasz_loss_of_a_sure_answer_is_the_mean_of_one_minus_iou() -> None:
    codes = torch.randint(0, 3, (1, 12, 12), generator=torch.Generator().manual_seed(0))
    guess = torch.where(torch.arange(12) < 3, 0, codes)
    logits = 1e4 * torch.nn.functional.one_hot(guess, 3).permute(0, 3, 1, 2).float()
    ious = [
        float(((guess == value) & (codes == value)).sum() / ((guess == value) | (codes == value)).sum())
        for value in range(3)
    ]
    loss = build_loss(Training(steps=1, cross_entropy=0, dice=0, lovasz=1), SHARES)
    assert float(loss(logits, codes)) == pytest.approx(1 - np.mean(ious), rel=1e-5)


def test_taught_entropy_is_that_of_torch_over_the_pixels_that_teachers_speak_of() -> None:
    torch.manual_seed(0)
    logits = torch.randn(2, 3, 5, 5)
    taught = torch.softmax(torch.randn(2, 3, 5, 5), dim=1)
    needed = torch.nn.functional.cross_entropy(logits[:, :, 1:], taught[:, :, 1:])
    taught[:, :, 0] = 0
    torch.testing.assert_close(taught_entropy(logits, taught), needed)


def test_what_is_taught_adds_to_the_labels_by_its_weight() -> None:
    torch.manual_seed(0)
    logits, codes = torch.randn(2, 3, 4, 4), torch.randint(0, 3, (2, 4, 4))
    taught = torch.softmax(torch.randn(2, 3, 4, 4), dim=1)
    loss = build_loss(Training(steps=1), SHARES, distillation=2.5)
    labels = loss(logits, codes)
    torch.testing.assert_close(
        loss(logits, codes, taught), labels + 2.5 * taught_entropy(logits, taught)
    )
    assert loss(logits, codes, torch.zeros_like(taught)) == labels


@pytest.mark.parametrize("dice", [0, 1])
def test_without_a_label_a_batch_still_learns_what_is_taught(dice: float) -> None:
    torch.manual_seed(0)
    loss = build_loss(Training(steps=1, dice=dice), SHARES, distillation=1)
    logits = torch.randn(1, 3, 4, 4, requires_grad=True)
    taught = torch.softmax(torch.randn(1, 3, 4, 4), dim=1)
    taught[:, :, 2:] = 0
    value = loss(logits, torch.full((1, 4, 4), IGNORED), taught)
    torch.testing.assert_close(value, taught_entropy(logits, taught))
    value.backward()
    assert logits.grad is not None
    assert logits.grad[:, :, :2].any()
    assert not logits.grad[:, :, 2:].any()


def test_balanced_weights_rise_as_classes_get_rare_up_to_a_limit() -> None:
    weights = class_weights("balanced", SHARES)
    assert weights[0] < weights[1] < weights[2]
    assert weights[1] / weights[0] == pytest.approx(0.7 / 0.25)
    assert np.mean(weights) == pytest.approx(1)
    assert max(class_weights("balanced", np.array([0.5, 0.5 - 1e-9, 1e-9] + [0] * 20))) <= 10
    # Absent, as far as labels go: what clouds are made up weighs as the others do.
    assert class_weights("balanced", np.array([0.5, 0.5, 0.0])) == (1, 1, 1)
    assert class_weights("balanced", np.zeros(3)) == (1, 1, 1)


def test_weights_are_one_or_those_given() -> None:
    assert class_weights("none", SHARES) == (1, 1, 1)
    assert class_weights((1, 5, 2), SHARES) == (1, 5, 2)
