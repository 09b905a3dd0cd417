"""The table ``[method]`` of a recipe: how a backbone is tuned, with the options that way has.

Options are named as in peft and in the papers. Each kind of adapter says here what it is in peft's own
registry, and `NOT_OFFERED` says why the rest of that registry is left out.
"""

import difflib
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal, Self, get_args

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    model_validator,
)

PATCHES = "patch_embed.proj"
"""The layer that takes the pixels of a vision transformer; some adapters may sit on it too."""

Layers = Annotated[tuple[str, ...], Field(min_length=1)]
Fraction = Annotated[float, Field(ge=0, lt=1)]

NOT_OFFERED = {
    "adamss": "it needs scikit-learn and cuts layers by clusters that a reload cannot repeat",
    "adaption_prompt": "it is made for language models",
    "cartridge": "it is made for language models",
    "cpt": "it is made for language models",
    "frod": "what it stores depends on signs of a decomposition that a reload may choose otherwise",
    "lily": "peft cannot merge it",
    "ln_tuning": "layernorm does the same",
    "multitask_prompt_tuning": "it is made for language models; vpt prompts a transformer for images",
    "osf": "it splits the backbone's own weights by a decomposition that it does not store",
    "p_tuning": "it is made for language models; vpt prompts a transformer for images",
    "poly": "it needs several tasks",
    "prefix_tuning": "it is made for language models; vpt prompts a transformer for images",
    "prompt_tuning": "it is made for language models; vpt prompts a transformer for images",
    "psoft": "what it stores depends on signs of a decomposition that a reload may choose otherwise",
    "shadow": "it is made for language models",
    "trainable_tokens": "it is made for word embeddings",
    "xlora": "it mixes adapters of language models by their input, and cannot be merged",
}
"""Names in peft's registry (0.21) that are no method here, and why."""


class Table(BaseModel):
    """A table of the recipe."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False
    )


class _Method(Table):
    title: ClassVar[str]
    """For people."""
    rank: ClassVar[str | None] = None
    """The option that is the rank of a product added to each weight."""

    name: str

    @property
    def tunes_all(self) -> bool:
        """Whether all of the backbone is trained."""
        return False

    def options(self) -> dict[str, Any]:
        """All but the name, under peft's names where it has them."""
        return self.model_dump(by_alias=True, exclude={"name"})

    def __str__(self) -> str:
        # Neither 0 nor a factor of 1 does anything.
        told = [
            f"{key}={value}"
            for key, value in self.model_dump(exclude={"name", "targets"}).items()
            if value not in (0, 1.0)
        ]
        text = f"{self.title} ({', '.join(told)})" if told else self.title
        targets: Sequence[str] = getattr(self, "targets", ())
        return f"{text} on {', '.join(targets)}" if targets else text


class Adapter(_Method):
    """Small matrices or vectors beside frozen layers, made by peft and folded into them at export."""

    kind: ClassVar[str]
    """In peft's registry."""
    fixed: ClassVar[Mapping[str, Any]] = {}
    """Further settings of peft that make the method what it is."""
    takes_patches: ClassVar[bool] = False
    """Whether ``targets`` may name `PATCHES`, a convolution."""
    changes_base: ClassVar[bool] = False
    """Whether its first values are taken out of the layer's own weights."""

    targets: Layers = ("attn.qkv", "mlp.fc1", "mlp.fc2")
    """Layers inside each transformer block that get an adapter. ``attn.q``, ``attn.k`` and ``attn.v``
    are the thirds of ``attn.qkv``."""


class _LoraKin(Adapter):
    kind, rank = "LORA", "r"

    r: PositiveInt = 16
    """Rank of the adapters."""
    alpha: PositiveInt = Field(default=16, serialization_alias="lora_alpha")
    """The adapters' product is scaled with alpha / r."""
    dropout: Fraction = Field(default=0.0, serialization_alias="lora_dropout")


class Lora(_LoraKin):
    """A product of two thin matrices is added to each weight."""

    title = "LoRA"
    takes_patches = True
    name: Literal["lora"] = "lora"


class RsLora(_LoraKin):
    """LoRA scaled with alpha / sqrt(r), so that a higher rank learns no slower."""

    title, fixed = "rsLoRA", {"use_rslora": True}
    takes_patches = True
    name: Literal["rslora"] = "rslora"


class Dora(_LoraKin):
    """LoRA on the direction of each column, whose length is trained by itself."""

    title, fixed = "DoRA", {"use_dora": True}
    takes_patches = True
    name: Literal["dora"] = "dora"


class Pissa(_LoraKin):
    """LoRA that starts as the largest singular values of the weight, which leave the frozen part."""

    title, fixed = "PiSSA", {"init_lora_weights": "pissa"}
    changes_base = True
    name: Literal["pissa"] = "pissa"


class Olora(_LoraKin):
    """LoRA that starts as the first columns of the weight's QR decomposition."""

    title, fixed = "OLoRA", {"init_lora_weights": "olora"}
    changes_base = True
    name: Literal["olora"] = "olora"


class Eva(_LoraKin):
    """LoRA that starts along the directions in which the layer's input varies most."""

    title, fixed = "EVA", {"init_lora_weights": "eva"}
    name: Literal["eva"] = "eva"
    rho: Annotated[float, Field(ge=1)] = 2.0
    """A layer may get up to rho times ``r``, taken from layers whose input varies less."""


class AdaLora(Adapter):
    """LoRA in the form of a singular value decomposition, its rank shared out while it is trained."""

    title, kind, rank = "AdaLoRA", "ADALORA", "init_r"
    name: Literal["adalora"] = "adalora"
    init_r: PositiveInt = 24
    """Rank at the start."""
    target_r: PositiveInt = 16
    """Mean rank at the end; less than ``init_r``."""
    alpha: PositiveInt = Field(default=16, serialization_alias="lora_alpha")
    dropout: Fraction = Field(default=0.0, serialization_alias="lora_dropout")
    warm: Fraction = 0.1
    """Share of the steps before ranks begin to fall."""
    settled: Fraction = 0.3
    """Share of the steps after they have stopped falling."""
    orthogonal: NonNegativeFloat = Field(default=0.5, serialization_alias="orth_reg_weight")
    """Weight of the loss that keeps the matrices orthogonal."""

    @model_validator(mode="after")
    def _ranks_fall(self) -> Self:
        if self.init_r <= self.target_r:
            raise ValueError(
                f"init_r = {self.init_r} leaves no rank to give up on the way to target_r = "
                f"{self.target_r}; take a larger init_r, or lora for a rank that stays"
            )
        if self.warm + self.settled >= 1 - 1e-9:  # 0.7 + 0.2 + 0.1 is rounded
            raise ValueError(
                f"warm = {self.warm:g} and settled = {self.settled:g}, shares of the steps, leave none "
                "in which ranks fall; lower one, so that the sum is less than 1"
            )
        return self

    def options(self) -> dict[str, Any]:
        """As for any method; steps are counted when their number is known."""
        return self.model_dump(by_alias=True, exclude={"name", "warm", "settled"}) | {"total_step": 1}


class Ia3(Adapter):
    """A factor for each output of a layer, or for each input of those in ``feedforward``."""

    title, kind = "IA3", "IA3"
    name: Literal["ia3"] = "ia3"
    targets: Layers = ("attn.qkv", "mlp.fc2")
    feedforward: tuple[str, ...] = Field(
        default=("mlp.fc2",), serialization_alias="feedforward_modules"
    )
    """Those of ``targets`` whose input is scaled."""


class Vera(Adapter):
    """Random matrices that all layers share, and two trained vectors in each."""

    title, kind = "VeRA", "VERA"
    name: Literal["vera"] = "vera"
    r: PositiveInt = 256
    dropout: Fraction = Field(default=0.0, serialization_alias="vera_dropout")
    d_initial: PositiveFloat = 0.1
    """First value of the inner vector."""


class Pvera(Adapter):
    """VeRA whose inner vector is drawn from a trained distribution; its mean is what is exported."""

    title, kind = "PVeRA", "PVERA"
    name: Literal["pvera"] = "pvera"
    r: PositiveInt = 256
    dropout: Fraction = Field(default=0.0, serialization_alias="pvera_dropout")
    d_initial: PositiveFloat = 0.1
    """First value of the inner vector."""


class Loha(Adapter):
    """The elementwise product of two low-rank products is added to each weight."""

    title, kind, takes_patches = "LoHa", "LOHA", True
    name: Literal["loha"] = "loha"
    r: PositiveInt = 8
    alpha: PositiveInt = 8


class Lokr(Adapter):
    """A Kronecker product is added to each weight."""

    title, kind, takes_patches = "LoKr", "LOKR", True
    name: Literal["lokr"] = "lokr"
    r: PositiveInt = 8
    alpha: PositiveInt = 8


class Oft(Adapter):
    """Each weight is turned by a rotation made of blocks."""

    title, kind = "OFT", "OFT"
    name: Literal["oft"] = "oft"
    block: PositiveInt = Field(default=32, serialization_alias="oft_block_size")
    """Inputs that are turned together; divides the layers' inputs."""


class Boft(Adapter):
    """Each weight is turned by small rotations, a butterfly of one factor: peft has no more."""

    title, kind = "BOFT", "BOFT"
    name: Literal["boft"] = "boft"
    block: PositiveInt = Field(default=4, serialization_alias="boft_block_size")
    """Inputs that are turned together; divides the layers' inputs."""


class Hra(Adapter):
    """Each weight is turned by a chain of Householder reflections."""

    title, kind = "HRA", "HRA"
    name: Literal["hra"] = "hra"
    r: Annotated[int, Field(gt=0, multiple_of=2)] = 8
    """Reflections; an even number, so that they begin as none."""


class Road(Adapter):
    """Pairs of a layer's outputs are turned and scaled."""

    title, kind = "RoAd", "ROAD"
    name: Literal["road"] = "road"
    group: PositiveInt = Field(default=32, serialization_alias="group_size")
    """Outputs among which pairs are made; divides the layers' outputs."""


class FourierFt(Adapter):
    """Some coefficients of the change's Fourier transform, at random places."""

    title, kind, fixed = "FourierFT", "FOURIERFT", {"init_weights": True}
    name: Literal["fourierft"] = "fourierft"
    n_frequency: PositiveInt = 1000
    """Coefficients in each layer."""
    scaling: PositiveFloat = 150.0


class WaveFt(Adapter):
    """Some coefficients of the change's wavelet transform, at random places."""

    title, kind = "WaveFT", "WAVEFT"
    name: Literal["waveft"] = "waveft"
    n_frequency: PositiveInt = 2592
    """Coefficients in each layer."""
    scaling: PositiveFloat = 25.0


class Miss(Adapter):
    """Sums over pieces of the input, through one trained matrix."""

    title, kind = "MiSS", "MISS"
    name: Literal["miss"] = "miss"
    r: PositiveInt = 16


class RandLora(Adapter):
    """A sum of random low-rank matrices of full rank together, whose scales are trained."""

    title, kind = "RandLoRA", "RANDLORA"
    name: Literal["randlora"] = "randlora"
    r: PositiveInt = 32
    """Rank of each; a smaller one makes more of them, and more to train."""
    alpha: PositiveInt = Field(default=640, serialization_alias="randlora_alpha")
    dropout: Fraction = Field(default=0.0, serialization_alias="randlora_dropout")


class Beft(Adapter):
    """A trained shift of each layer's outputs."""

    title, kind = "BEFT", "BEFT"
    name: Literal["beft"] = "beft"


class C3a(Adapter):
    """Circular convolutions, block by block, are added to each weight."""

    title, kind, fixed = "C3A", "C3A", {"init_weights": True}
    name: Literal["c3a"] = "c3a"
    block: PositiveInt = Field(default=32, serialization_alias="block_size")
    """Divides the layers' inputs and outputs."""


class Deft(Adapter):
    """A few directions are taken out of each weight, and new ones put in."""

    title, kind = "DEFT", "DEFT"
    name: Literal["deft"] = "deft"
    r: PositiveInt = 8


class DeLora(Adapter):
    """LoRA with directions of length one and a trained bound on the strength of the change."""

    title, kind = "DeLoRA", "DELORA"
    name: Literal["delora"] = "delora"
    r: PositiveInt = 8
    strength: PositiveInt = Field(default=15, serialization_alias="delora_lambda")
    """First bound."""


class Glora(Adapter):
    """Weights and biases are scaled and shifted by low-rank matrices."""

    title, kind = "GLoRA", "GLORA"
    name: Literal["glora"] = "glora"
    r: PositiveInt = 8


class GraLora(Adapter):
    """LoRA apart in each of k x k blocks of a weight."""

    title, kind = "GraLoRA", "GRALORA"
    name: Literal["gralora"] = "gralora"
    r: PositiveInt = 16
    alpha: PositiveInt = 32
    blocks: PositiveInt = Field(default=2, serialization_alias="gralora_k")
    """k; divides the rank and the layers' inputs and outputs."""


class Hira(Adapter):
    """The weight times, element by element, a low-rank product is added to it."""

    title, kind = "HiRA", "HIRA"
    name: Literal["hira"] = "hira"
    r: PositiveInt = 16


class Peanut(Adapter):
    """The change is what a small network with ReLU makes of the weight."""

    title, kind = "PEANuT", "PEANUT"
    name: Literal["peanut"] = "peanut"
    r: PositiveInt = 16


class Shira(Adapter):
    """Some entries of each weight, at random places."""

    title, kind = "SHiRA", "SHIRA"
    name: Literal["shira"] = "shira"
    r: PositiveInt = 16
    """As many entries as LoRA of this rank has parameters."""


class SuperTuning(Adapter):
    """The largest entries of each weight."""

    title, kind = "Super-Tuning", "SUPERTUNING"
    name: Literal["supertuning"] = "supertuning"
    sparsity: Annotated[float, Field(gt=0, lt=1)] = 0.99
    """Share of the entries that stay as they are."""


class TinyLora(Adapter):
    """A few numbers a layer, spread by fixed random matrices over its largest singular vectors."""

    title, kind = "TinyLoRA", "TINYLORA"
    name: Literal["tinylora"] = "tinylora"
    r: PositiveInt = 2
    u: PositiveInt = 64
    """Numbers trained in each layer."""


class UniLora(Adapter):
    """LoRA whose matrices all draw their entries from one short trained vector."""

    title, kind = "Uni-LoRA", "UNILORA"
    name: Literal["unilora"] = "unilora"
    r: PositiveInt = 4
    length: PositiveInt = Field(default=2048, serialization_alias="theta_d_length")
    """Of the vector."""


class VbLora(Adapter):
    """LoRA whose matrices are put together from a bank of trained vectors that all layers share."""

    title, kind = "VB-LoRA", "VBLORA"
    name: Literal["vblora"] = "vblora"
    r: PositiveInt = 4
    vectors: PositiveInt = Field(default=256, serialization_alias="num_vectors")
    """In the bank."""
    length: PositiveInt = Field(default=128, serialization_alias="vector_length")
    """Of each; divides the layers' inputs and outputs."""


class Ssl(_Method):
    """Rows of each weight are scaled, a shift and a low-rank product added (arXiv 2407.05417)."""

    title, rank = "SSL", "r"
    name: Literal["ssl"] = "ssl"
    targets: Layers = ("attn.qkv", "mlp.fc1", "mlp.fc2")
    """Layers inside each transformer block that are tuned."""
    r: NonNegativeInt = 4
    """Rank of the product; 0 for none."""
    alpha: PositiveInt = 4
    """The product is scaled with alpha / r."""


class Ssb(Ssl):
    """As ssl, and columns are scaled too."""

    title = "SSB"
    name: Literal["ssb"] = "ssb"  # type: ignore[assignment]


class Vpt(_Method):
    """Trained tokens beside the patches, new ones in every block (deep) or for all (shallow)."""

    title = "visual prompt tuning"
    name: Literal["vpt"] = "vpt"
    tokens: PositiveInt = 100
    deep: bool = True
    dropout: Fraction = 0.1


class VitAdapter(_Method):
    """A convolutional pyramid beside the transformer, joined by deformable attention (2205.08534)."""

    title, rank = "ViT-Adapter", "lora_r"
    name: Literal["vit_adapter"] = "vit_adapter"
    points: PositiveInt = 4
    """That each head looks at in each map."""
    channels: PositiveInt = 64
    """Of the pyramid at a quarter of the tile's resolution; twice and four times as many below."""
    value_ratio: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Width of what is looked up over that of a token. The paper's code takes a half from ViT-B on."""
    lora_r: NonNegativeInt = 0
    """Rank of LoRA in the transformer, on ``attn.qkv``, ``mlp.fc1`` and ``mlp.fc2``; 0 for none."""
    full: bool = False
    """Whether all of the transformer is tuned."""

    @model_validator(mode="after")
    def _one_way(self) -> Self:
        if self.full and self.lora_r:
            raise ValueError(f"lora_r = {self.lora_r} leaves frozen what full = true tunes; take one")
        return self

    @property
    def tunes_all(self) -> bool:
        """Whether all of the transformer is trained."""
        return self.full


class BitFit(_Method):
    """All biases."""

    title = "BitFit"
    name: Literal["bitfit"] = "bitfit"


class LayerNorm(_Method):
    """Weights and biases of the layer normalisations."""

    title = "LayerNorm tuning"
    name: Literal["layernorm"] = "layernorm"


class Linear(_Method):
    """Nothing in the backbone."""

    title = "the backbone is frozen"
    name: Literal["linear"] = "linear"


class Full(_Method):
    """All of the backbone."""

    title = "all of the backbone is tuned"
    name: Literal["full"] = "full"
    layer_decay: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Each layer's learning rate is that of the layer above times this; the last keeps ``lr``."""

    @property
    def tunes_all(self) -> bool:
        """It is."""
        return True


_Any = (
    Lora | RsLora | Dora | Pissa | Olora | Eva | AdaLora | Ia3 | Vera | Pvera | Loha | Lokr | Oft
    | Boft | Hra | Road | FourierFt | WaveFt | Miss | RandLora | Beft | C3a | Deft | DeLora | Glora
    | GraLora | Hira | Peanut | Shira | SuperTuning | TinyLora | UniLora | VbLora | Ssl | Ssb | Vpt
    | VitAdapter | BitFit | LayerNorm | Linear | Full
)  # fmt: skip

METHODS: dict[str, type[_Method]] = {
    table.model_fields["name"].default: table for table in get_args(_Any)
}
"""By the name in the recipe."""


def _named(value: Any) -> Any:
    if not isinstance(value, dict):
        return value
    value = {"name": "lora"} | value
    name = value["name"]
    if name not in METHODS:
        if name in NOT_OFFERED:
            raise ValueError(f"{name} is left out: {NOT_OFFERED[name]}")
        near = difflib.get_close_matches(str(name).lower(), METHODS, 3)
        hint = f"Near: {', '.join(near)}" if near else f"There are {', '.join(METHODS)}"
        raise ValueError(f"there is no method {name}. {hint}")
    return value


Method = Annotated[_Any, Field(discriminator="name"), BeforeValidator(_named)]
"""One of `METHODS`; without a name, LoRA."""


def keep_known(table: Mapping[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """What the table ``[method]`` says to the method that counts, which ``overrides`` may change.

    Options of the method that is written there and that the other one lacks are left out, so that
    ``--set method.name=full`` suffices. So are those of LoRA with ``linear`` and ``full``: before there
    were other methods a RUN wrote them down for all.
    """
    written = METHODS.get(table.get("name", "lora"))
    named = [
        text.strip().strip("\"'")
        for key, _, text in (item.partition("=") for item in overrides)
        if key.strip() == "method.name"
    ]
    wanted = METHODS.get(named[-1]) if named else written
    if written is None or wanted is None:
        return dict(table)
    foreign = set(written.model_fields)
    if written in (Linear, Full):
        foreign |= set(Lora.model_fields)
    foreign -= set(wanted.model_fields)
    return {key: value for key, value in table.items() if key not in foreign}
