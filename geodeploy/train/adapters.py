"""Adapters: peft's, around a timm transformer, and what some of them ask of a training."""

import itertools
import re
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import version
from typing import Any

import peft
import torch
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.eva import initialize_lora_eva_weights
from torch import Tensor, nn

from geodeploy.errors import RecipeError, first_line
from geodeploy.train.backbone import Backbone
from geodeploy.train.method_options import PATCHES, AdaLora, Adapter, Eva, Ia3, Lora, Method
from geodeploy.train.qkv import FUSED, PARTS, fuse_qkv, split_qkv

_IMPORTANCE = ("ipt", "exp_avg_ipt", "exp_avg_unc")
"""What peft's allocator keeps of each matrix of AdaLoRA."""
_EVA_BATCHES = 8
"""Training batches whose features EVA looks at, each as large as it takes."""
_EVA_SKETCH = 2
"""Rows and columns that peft's decomposition needs for each direction it finds."""
_EVA_PASSES = 100
"""Readings of the batches in which the directions settle, or never do."""


@contextmanager
def quiet() -> Iterator[None]:
    """Without peft's advice on memory we have and CUDA extensions it can do without."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*low_cpu_mem_usage")
        warnings.filterwarnings("ignore", message="Failed to load the CUDA extension")
        warnings.filterwarnings("ignore", message="Setting boft_n_butterfly_factor")
        yield


def wrap(backbone: Backbone, method: Adapter) -> nn.Module:
    """The encoder in a `peft.PeftModel` with the adapters that ``method`` names.

    Raises:
        RecipeError: the installed peft lacks them, or they do not fit the layers.
    """
    kinds = {kind.value: config for kind, config in peft.PEFT_TYPE_TO_CONFIG_MAPPING.items()}
    if method.kind not in kinds:
        raise RecipeError(
            f"method.name: peft {version('peft')} has no {method.title}. pip install --upgrade peft."
        )
    patches = PATCHES if method.takes_patches else None
    # These two watch every adapter at work, and the blocks after the last that is decoded never are.
    blocks = max(backbone.taps.indices) + 1 if isinstance(method, AdaLora | Eva) else None
    pattern = layer_pattern(backbone.encoder, method.targets, patches=patches, blocks=blocks)
    if backbone.new_patches and PATCHES in method.targets:
        raise RecipeError(
            f"method.targets: {PATCHES} is trained whole, because the weights never saw these bands. "
            "Leave it out."
        )
    check_rank(backbone.encoder, pattern, method)
    if isinstance(method, Eva):
        _check_directions(backbone.encoder, pattern, method)
    settings = method.options() | dict(method.fixed)
    del settings["targets"]
    settings |= {
        "target_modules": pattern,
        "modules_to_save": [PATCHES] if backbone.new_patches else None,
        "revision": backbone.sha256,
    }
    if isinstance(method, Ia3):
        settings["feedforward_modules"] = layer_pattern(backbone.encoder, method.feedforward)
    if isinstance(method, Eva):
        settings["eva_config"] = peft.EvaConfig(rho=settings.pop("rho"))
    try:
        with quiet():
            # OFT would take another block than the one that was asked for.
            warnings.filterwarnings("error", message="Invalid .oft_block_size")
            config = kinds[method.kind](**settings)
            wrapped: nn.Module = peft.get_peft_model(backbone.encoder, config)
    except (AssertionError, RuntimeError, TypeError, ValueError, UserWarning) as error:
        raise RecipeError(
            f"method: {method.title} does not fit {type(backbone.encoder).__name__} "
            f"({first_line(error)})."
        ) from error
    return wrapped


def inject_lora(vit: nn.Module, r: int) -> None:
    """Put LoRA of rank ``r`` into the layers of ``vit`` that it adapts by default; train it alone."""
    method = Lora(r=r, alpha=r)
    settings = method.options() | {"target_modules": layer_pattern(vit, method.targets)}
    del settings["targets"]
    with quiet():
        peft.inject_adapter_in_model(peft.LoraConfig(**settings), vit)


def merge_lora(module: nn.Module) -> None:
    """Put a plain layer in place of each that `inject_lora` made.

    Raises:
        ValueError: there is NaN in the product of the adapter's matrices.
    """
    for name, layer in list(module.named_modules()):
        if isinstance(layer, LoraLayer):
            layer.merge(safe_merge=True)
            module.set_submodule(name, layer.get_base_layer())


def layer_pattern(
    vit: nn.Module,
    targets: tuple[str, ...],
    *,
    patches: str | None = None,
    blocks: int | None = None,
) -> str:
    """The pattern of the layers ``targets`` inside the blocks, and of ``patches`` if that is a target.

    Of the first ``blocks`` blocks, or all. It is anchored there: a bare ``proj`` would also find the
    projection of the patch embedding.
    """
    layers = {
        re.sub(r"^blocks\.\d+\.", "", name)
        for name, module in vit.named_modules()
        if name.startswith("blocks.") and isinstance(module, nn.Linear)
    }
    if layers & {FUSED, *PARTS.values()}:
        layers = layers - set(PARTS.values()) | {FUSED, *PARTS}
    unknown = [target for target in targets if target not in layers | {patches}]
    if unknown:
        raise RecipeError(
            f"method.targets: the blocks have no linear layer {', '.join(unknown)}; "
            f"they have {', '.join(sorted(layers))}."
        )
    inside = "|".join(re.escape(PARTS.get(target, target)) for target in targets if target != patches)
    number = r"\d+" if blocks is None else f"({'|'.join(map(str, range(blocks)))})"
    parts = [rf"blocks\.{number}\.({inside})"] if inside else []
    if patches in targets:
        parts.append(re.escape(str(patches)))
    return "|".join(parts)


def check_rank(vit: nn.Module, pattern: str, method: Method | Adapter) -> None:
    """Refuse a rank that one of the layers whose name ``pattern`` matches cannot have.

    It would train more than the weight itself, and PiSSA and OLoRA have no more to begin with.

    Raises:
        RecipeError: names the narrowest layer and the largest rank.
    """
    ranks = getattr(method, method.rank) if method.rank else 0
    weights: list[tuple[str, Any]] = [
        (name, layer.weight) for name, layer in vit.named_modules() if re.fullmatch(pattern, name)
    ]
    name, weight = min(weights, key=lambda item: _width(item[1]))
    if ranks > _width(weight):
        raise RecipeError(
            f"method.{method.rank}: found {ranks}, and the layer {name} is {_width(weight)} wide; take "
            f"{_width(weight)} or less, or full to train the weights themselves."
        )


def _check_directions(vit: nn.Module, pattern: str, method: Eva) -> None:
    """Refuse EVA where the input of a layer has fewer directions than it looks among."""
    inputs, name = min(
        (layer.in_features, name)
        for name, layer in vit.named_modules()
        if isinstance(layer, nn.Linear) and re.fullmatch(pattern, name)
    )
    needed = _EVA_SKETCH * round(method.rho * method.r)
    if needed > inputs:
        raise RecipeError(
            f"method.rho: eva looks for rho = {method.rho:g} times r = {method.r} directions and needs "
            f"{_EVA_SKETCH} inputs for each, {needed}; the layer {name} has {inputs}. Take a smaller "
            f"method.r or method.rho, whose product is {inputs // _EVA_SKETCH} or less."
        )


def _width(weight: Tensor) -> int:
    """The rank that no matrix of the weight's shape exceeds."""
    return min(weight.flatten(1).shape)


def initialise(model: Any, batches: Iterator[Tensor], method: Adapter) -> None:
    """Give adapters whose first values come from data theirs; ``batches`` are pixels.

    ``model`` is the whole network, its ``backbone`` a `peft.PeftModel`.

    Raises:
        RecipeError: what the layers take has too few directions for them, or none that settle.
    """
    if isinstance(method, Eva):
        model.eval()  # the decoder's statistics are not to be touched
        with torch.no_grad():
            looked_at = _join(model, batches, tokens=_EVA_SKETCH * round(method.rho * method.r))
            left = iter(range(_EVA_PASSES * len(looked_at)))

            def look(_: Any, pixels: Tensor) -> None:
                if next(left, None) is None:
                    raise RecipeError(
                        f"method.name: the directions that eva looks for have not settled after "
                        f"{_EVA_PASSES} readings of {len(looked_at)} batches; take a smaller method.r "
                        "or lora."
                    )
                model(pixels)

            initialize_lora_eva_weights(
                model.backbone,
                looked_at,
                forward_fn=look,
                prepare_model_inputs_fn=None,
                prepare_layer_inputs_fn=None,  # every token counts, there is no mask of words
                show_progress_bar=False,
            )


def _join(model: nn.Module, batches: Iterator[Tensor], *, tokens: int) -> list[Tensor]:
    """`_EVA_BATCHES` batches in each of which every adapted layer sees ``tokens`` or more.

    peft passes over smaller ones, for ever if there are no others.
    """
    first = next(batches)
    seen: list[int] = []
    hooks = [
        layer.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0][..., 0].numel()))
        for layer in model.modules()
        if isinstance(layer, LoraLayer)
    ]
    model(first)
    for hook in hooks:
        hook.remove()
    every = itertools.chain([first], batches)
    joined = -(-tokens // min(seen))
    return [torch.cat(list(itertools.islice(every, joined))) for _ in range(_EVA_BATCHES)]


class RankAllocation:
    """AdaLoRA's part in a training: a loss of its own, and ranks that fall from step to step.

    Raises:
        RecipeError: there is but one step.
    """

    def __init__(self, backbone: Any, method: AdaLora, steps: int) -> None:
        if steps < 2:
            raise RecipeError(
                f"training.steps: AdaLoRA measures in one step what falls in the next; found {steps}, "
                "take 2 or more."
            )
        self._model = backbone.base_model
        self._config = config = backbone.peft_config["default"]
        config.total_step = steps
        # Ranks are settled after the second step at the earliest: nothing is measured before the first.
        config.tinit = int(method.warm * steps)
        config.tfinal = min(int(method.settled * steps), steps - 2)
        self._weight = method.orthogonal
        self._matrices = [
            (parameter, "lora_A" in name)
            for name, parameter in backbone.named_parameters()
            if "lora_A" in name or "lora_B" in name
        ]

    def penalty(self) -> Tensor:
        """How far the matrices are from orthogonal ones, weighted."""
        distances = []
        for matrix, is_wide in self._matrices:
            product = matrix @ matrix.T if is_wide else matrix.T @ matrix
            distances.append(torch.linalg.norm(product - torch.eye(len(product), device=matrix.device)))
        return self._weight * torch.stack(distances).mean()

    def allocate(self, step: int) -> None:
        """Silence what matters least; after ``step``, before its gradients are forgotten."""
        self._model.update_and_allocate(step)

    def state(self) -> tuple[Any, dict[str, Tensor]]:
        """Which ranks are silent, and how much each has mattered."""
        allocator = self._model.rankallocator
        tensors = {
            f"{kind}/{name}": value
            for kind in _IMPORTANCE
            for name, value in getattr(allocator, kind).items()
        }
        return self._config.rank_pattern, tensors

    def restore(self, pattern: Any, tensors: Mapping[str, Tensor]) -> None:
        """Take back what `state` gave."""
        self._config.rank_pattern = pattern
        for key, value in tensors.items():
            kind, name = key.split("/")
            getattr(self._model.rankallocator, kind)[name] = value.to(self._matrices[0][0].device)


def allocate_ranks(backbone: nn.Module, method: Method, steps: int) -> RankAllocation | None:
    """What AdaLoRA does in a training of ``steps``; None for any other method."""
    return RankAllocation(backbone, method, steps) if isinstance(method, AdaLora) else None


def state_of(wrapped: nn.Module) -> dict[str, Tensor]:
    """A copy of the adapter's own tensors, as peft names them in its file."""
    state = peft.get_peft_model_state_dict(wrapped, save_embedding_layers=False)
    return {name: value.detach().cpu().clone() for name, value in state.items()}


def as_plain_lora(
    wrapped: Any, method: Adapter, start: Mapping[str, Tensor], initial: Mapping[str, Tensor]
) -> nn.Module:
    """A LoRA of twice the rank around the weights ``start`` that does what ``wrapped`` does.

    Where adapters started as a part of the weight (PiSSA, OLoRA), the frozen part is no longer the one
    that was named and hashed: W - B0 A0 + B A. As W + (B A - B0 A0) the adapter needs nothing but W,
    and no decomposition that another machine may take otherwise. ``initial`` holds A0 and B0.
    """
    tuned = state_of(wrapped)
    for name in tuned:
        if ".lora_A." in name:
            tuned[name] = torch.cat([tuned[name], initial[name]])
        elif ".lora_B." in name:
            tuned[name] = torch.cat([tuned[name], -initial[name]], dim=1)
    config = wrapped.peft_config["default"]
    encoder = wrapped.unload()
    fuse_qkv(encoder)
    encoder.load_state_dict(start)
    split_qkv(encoder, method.targets)
    config.init_lora_weights = True
    config.r, config.lora_alpha = 2 * config.r, 2 * config.lora_alpha
    plain: nn.Module = peft.get_peft_model(encoder, config)
    peft.set_peft_model_state_dict(plain, tuned)
    return plain.eval()
