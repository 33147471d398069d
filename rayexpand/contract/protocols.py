"""What models and methods must offer, and what a sampler call takes and gives.

No torch here: arrays are torch tensors, named with a shape suffix (B rows, C channels, H, W pixels, D features, K
classes, T tokens, E embedding).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from rayexpand.contract.rng import PlanRng, RowRng
from rayexpand.contract.schema import ClassTable, Draw, Reason, SeedIndex

if TYPE_CHECKING:
    import torch

@dataclass(frozen=True, slots=True)
class Batch:
    """The rows of one sampler call, always of the planned shape. A filler slot stands in for a row that is absent."""

    draws: tuple[Draw, ...]
    images: tuple[np.ndarray, ...]  # uint8 (H, W, 3): the seed image as prepared; mid-grey for fillers and Start.NOISE
    rngs: tuple[RowRng, ...]
    filler: tuple[bool, ...]

    def __len__(self) -> int:
        return len(self.draws)

    def normals(self, stream: str, shape: tuple[int, ...]) -> np.ndarray:
        """float32 (B, *shape) standard normals, each row from its own stream."""
        return np.stack([rng.normals(stream, shape) for rng in self.rngs])

    def uniforms(self, stream: str, shape: tuple[int, ...]) -> np.ndarray:
        """float32 (B, *shape) uniforms on [0, 1), each row from its own stream."""
        return np.stack([rng.uniforms(stream, shape) for rng in self.rngs])


@dataclass(slots=True)
class Expansion:
    """What a method made of one batch, slot by slot.

    `images[i]` is uint8 (H, W, 3), or float (H, W, 3) in [0, 1], or None where `reasons[i]` says why.
    """

    images: list[np.ndarray | None]
    reasons: list[Reason | None] = field(default_factory=list)
    details: list[str] = field(default_factory=list)
    scores: dict[str, Sequence[float]] = field(default_factory=dict)  # name -> B numbers


@dataclass(frozen=True, slots=True)
class Calls:
    """How often a method calls the networks of a generator for one image: forward, and back to the input."""

    steps: float = 0.0  # denoising predictions
    steps_back: float = 0.0
    encodes: float = 0.0
    decodes: float = 0.0
    decodes_back: float = 0.0

    def __add__(self, other: Calls) -> Calls:
        return Calls(*(getattr(self, one.name) + getattr(other, one.name) for one in fields(self)))


class Prior(Protocol):
    """A generator with a latent space. `encode`, `decode` are deterministic given their arguments."""

    space: str  # names the latent space: "vae4", "mae1024x197", or by its hash what an image encoder sees
    decode_needs_grad: bool  # whether guidance goes through `decode`; False where a latent is what a guide sees

    def encode(self, x_BCHW: torch.Tensor, noise: torch.Tensor | None) -> torch.Tensor:
        """Images in [0, 1] to latents; `noise` is the posterior noise, None takes the mean."""

    def decode(self, z: torch.Tensor, cond: Any = None) -> torch.Tensor:
        """Latents to images (B, 3, H, W), about [0, 1], unclamped."""


class Cond(Protocol):
    """What the network is told of each row: tokens_BTE, pooled_BP or None, their negatives, and guidance_B."""

    def __getitem__(self, rows: Any) -> Cond: ...

    def with_last_slot(self, v_BD: Any, both: bool = False) -> Cond:
        """With v_BD in place of the last hidden state of each prompt, of negatives too with `both`. Raises ModelError
        where there is no place for it."""


class LatentPrior(Prior, Protocol):
    """A latent diffusion model. Its latents are of about unit variance, and noised ones too (diffusion/process.py)."""

    device: Any  # torch.device

    def latent_shape(self, height: int, width: int) -> tuple[int, int, int]:
        """(channels, height, width) of the latent of one image."""

    def schedule(self, solver: Any, steps: int, run: int | None = None, spacing: Any = None,
                 latent: Sequence[int] | None = None) -> Any:
        """The Schedule of `steps` steps whose last `run` are executed (None: all); `latent` is the shape of one."""

    def embed(self, prompts: Sequence[str], negatives: Sequence[str], guidance: float | Sequence[float]) -> Cond:
        """`guidance`: the scale of guidance, one for all rows or one for each."""

    def predict(self, z_BCHW: torch.Tensor, at: Any, cond: Cond) -> Any:
        """The Prediction (clean, noise), (B, C, h, w) each, at a Point; kind of output and guidance inside."""


class Guide(Protocol):
    """An image model that scores samples."""

    differentiable: bool

    def features(self, x_BCHW: torch.Tensor) -> torch.Tensor: ...

    def logits(self, x_BCHW: torch.Tensor) -> torch.Tensor: ...


@dataclass(frozen=True, slots=True)
class Tools:
    """The loaded models and artifacts a method asked for in `needs()`, and those of the section `accept`; None where
    nobody did."""

    classes: ClassTable
    prior: Any = None  # with the adapter, where the method needs one
    guide: Any = None
    prototypes: Any = None
    class_features: Any = None  # float32 tensor (K, D)
    image_features: Any = None  # its rows(seed_ids) are float32 (B, D), zeros for the seed id "filler"
    judge: Any = None  # the guide of the section `accept`
    thresholds: Any = None  # Thresholds of the classes by that guide


class Method(Protocol):
    """A way to make samples. The method is its own configuration: a frozen pydantic model with defaults that name
    their source; fields `name` (the module name) and, usually, `ratio`, the copies of each seed.

    A method that works on part of a call at a time may name the fields that say how many rows in a class attribute
    PIECES, in the order in which they are halved when memory runs out; None in such a field is the whole call.

    A method that calls a generator oftener than plain sampling may say how often for one image in `calls(plain, rows)`:
    Calls, where `plain` are those of plain sampling and `rows` is the size of a sampler call. A plan counts them.

    A method whose labels are mixtures may say in `label_words()` what they are; cards, pages and exports print it.

    A run grows where its samples have the same draws and groups in the larger one. A method whose pixels depend on its
    number of copies besides says so in `no_growth(before)`, `before` being the method of the smaller run.

    A method whose copies cannot be dealt by weights says why in `no_allocation()`, which is "" where they can.

    A guided method may give in `unguided()` itself without guidance, which pages show beside it.

    A method whose samples are meant to be judged may give in `acceptance()` fields of the section `accept`, which a job
    file without them gets; None where it is set to keep all."""

    name: str

    def needs(self) -> frozenset[str]:
        """Names of Tools fields (besides classes) that `expand` uses."""

    def copies(self, index: SeedIndex, rng: PlanRng) -> np.ndarray:
        """uint16[n_seeds]: how many copies of each seed are planned."""

    def draw(self, seed_id: str, label: int, copy: int, row: int, classes: ClassTable, rng: RowRng) -> Draw:
        """The draw of one copy. numpy only, no model: this is the plan."""

    def group(self, copies: int) -> int:
        """How many copies of one seed must share a call; 1 for methods whose rows are independent."""

    def batch_key(self, draw: Draw) -> tuple[Any, ...]:
        """Rows of one call agree on it (for example the executed steps)."""

    def expand(self, batch: Batch, tools: Tools) -> Expansion: ...

    def soft_label(self, source: np.ndarray, target: np.ndarray, strength: np.ndarray, n_classes: int,
                   **recipe: float) -> np.ndarray:
        """float32 (B, K) training labels from provenance columns: one-hot target unless the method says otherwise."""


Progress = Callable[[str, int, int], None]  # stage, done, total
