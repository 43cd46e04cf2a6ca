"""The study file: what every party agrees on, as frozen, checked settings.

SPDX-License-Identifier: Apache-2.0

One TOML file describes one collaboration. The SHA-256 of what is agreed (canonical JSON) names the study at every
party; `ENVIRONMENT` lists the settings of a machine that stand in the same file and are no part of it. Nothing here can
be set at a site; what a site owns is in its site file (`client/site.py`). Every number has a bound: a site builds the
network and solves the plan of a study before anybody has approved it.
"""

from __future__ import annotations

import hashlib
from functools import cached_property
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, model_validator

from common.files import canonical_json
from common.settings import Settings, harmless

Modality = Literal["radiology", "ophthalmology", "histopathology"]
Symmetry = Literal["none", "hflip", "dihedral"]
_SYMMETRIES: dict[Modality, Symmetry] = {  # the heart is on one side; eyes come in pairs; a slide lies as it lies
    "radiology": "none", "ophthalmology": "hflip", "histopathology": "dihedral",
}  # fmt: skip


Shown = Annotated[str, AfterValidator(harmless)]  # one party writes it, and others see it on screen, page and report
Name = Annotated[str, Field(min_length=1, max_length=80, pattern=r"^[^\x00-\x1f\x7f-\x9f]+$"), AfterValidator(harmless)]
Side = Annotated[int, Field(ge=1, le=16, strict=True)]
Depth = Annotated[int, Field(ge=0, le=16, strict=True)]
MOST_CHANNELS = 1024  # of the network's deepest level
MOST_STEPS = 200_000  # noisy sums of a study in one mechanism

ENVIRONMENT: dict[str, Any] = {  # settings of the machine that runs a study: not agreed, not hashed, not sent
    "federation": {"timeout_seconds"}, "pretrain": {"path"}, "simulation": True,
}  # fmt: skip


class StudyInfo(Settings):
    name: str = Field(pattern=r"^[a-z0-9][a-z0-9-]{0,39}$", description="lower case, digits, hyphens")
    modality: Modality
    description: Shown = Field(default="", max_length=2000)
    seed: int = Field(
        default=0, ge=0, lt=2**31, description="seeds the server's public choices only (initial weights, sampling)"
    )


class TuningConfig(Settings):
    """What the settings of the study were chosen on: differential privacy does not cover choices made on records."""

    basis: Literal["undeclared", "nothing", "public data", "phantoms", "earlier private runs"] = "undeclared"
    sources: tuple[Name, ...] = Field(default=(), max_length=16, description="by name: data sets, or runs")


class DataConfig(Settings):
    """What an image of this study looks like; public."""

    image_size: int = Field(ge=8, le=256, description="pixels, height and width")
    channels: Literal[1, 3]
    classes: tuple[Name, ...] = Field(min_length=2, max_length=64, description="biomarker classes, in label order")
    symmetry: Symmetry | None = Field(
        default=None, description="changes of an image that mean nothing: hflip = left to right, dihedral = turns too; "
        "default: none in radiology, hflip in ophthalmology, dihedral in histopathology"
    )  # fmt: skip


class NetworkConfig(Settings):
    """Convolutions and Swin blocks (after Pan et al. 2023); one entry of `depths` and `heads` for each level."""

    width: int = Field(default=32, ge=8, le=512, description="channels at the first level; doubled per level")
    depths: tuple[Depth, ...] = Field(
        default=(0, 2, 2), min_length=1, max_length=6, description="Swin blocks; 0 = convolutions alone"
    )
    heads: tuple[Side, ...] = Field(default=(1, 4, 4), min_length=1, max_length=6)
    window: int = Field(default=7, ge=2, le=16, description="window side, pixels of that level")
    mlp_ratio: float = Field(default=2.0, gt=0, le=8)


class DiffusionConfig(Settings):
    noise_multiplicity: int = Field(
        default=1, ge=1, le=64, description="K draws of (sigma, noise) per record, averaged"
    )
    label_dropout: float = Field(default=0.1, ge=0, lt=1, description="share of draws trained on the null class")


class MomentsConfig(Settings):
    """The private class moments that public images are carried to before the network learns from them."""

    components: int = Field(default=8, ge=1, le=32, description="lowest frequencies a side that have covariances")


class PretrainConfig(Settings):
    """The server's training on public images before the first round: no site's, so it costs no privacy."""

    source: Literal["phantoms", "npz", "none"] = Field(
        default="phantoms", description="npz = a public set in a file at the server; its own people are not protected"
    )
    path: str | None = Field(
        default=None, min_length=1, description="the public set, in MedMNIST's layout; not agreed: its hash is"
    )
    sha256: str | None = Field(default=None, pattern=r"^[0-9a-f]{64}$", description="of that file")
    images: int = Field(default=4000, ge=64, le=100_000, description="phantoms drawn; of a public set all are taken")
    class_share: float = Field(
        default=1.0, gt=0, le=1,
        description="share of a public set without labels that each class takes: the images "
        "most like it by its features; 1 = all",
    )  # fmt: skip
    steps: int = Field(default=300, ge=1, le=1_000_000)
    batch_size: int = Field(default=64, ge=1, le=4096)
    learning_rate: float = Field(default=2e-3, gt=0, le=1)


class TrainingConfig(Settings):
    rounds: int = Field(
        ge=0, le=10_000, description="0 = the network as it learnt from public images carried to the private moments"
    )
    algorithm: Literal["fedsgd", "fedavg"] = Field(
        default="fedsgd",
        description="FedSGD: one step of the sites' summed gradients per round; FedAvg: local steps, then averaging",
    )
    local_steps: int = Field(default=1, ge=1, le=10_000, description="DP-SGD steps a round at each site")
    parameters: Literal["all", "bias", "head"] = Field(
        default="bias", description="what is trained: fewer numbers take less noise"
    )
    sample_rate: float = Field(gt=0, le=1, description="Poisson sampling probability of a record, each step")
    max_grad_norm: float = Field(default=0.1, ge=1e-3, le=1e3, description="C: L2 bound of a unit's gradient")
    learning_rate: float = Field(default=3e-3, gt=0, le=1)
    ema_decay: float = Field(default=0.99, ge=0, lt=1, description="a local step")
    max_update_norm: float | None = Field(default=None, gt=0, description="L2; default: the bound that Adam implies")


class PrivacyConfig(Settings):
    epsilon: float = Field(gt=0, le=1000, description="ceiling for the whole study, per record and site")
    delta: float = Field(default=1e-5, gt=0, lt=1)
    accountant: Literal["prv", "rdp"] = "prv"
    unit: Literal["image", "patient"] = Field(default="image", description="whose whole contribution is protected")
    trust: Literal["local"] = "local"
    counts_share: float = Field(
        default=0.1, gt=0, lt=1, description="share of epsilon that the class counts would cost alone"
    )
    moments_share: float = Field(default=0.8, ge=0, lt=1, description="the same for the class moments; 0 = none")
    features_share: float = Field(
        default=0.25, ge=0, lt=1, description="the same for the class features that images are chosen by; 0 = none"
    )
    reference_share: float = Field(
        default=0.25, ge=0, lt=1, description="the same for the real-data reference; 0 = none"
    )


class FederationConfig(Settings):
    min_sites: int = Field(default=2, ge=1, le=1000)
    timeout_seconds: float = Field(
        default=1800, gt=0, description="longest wait for the sites' answers to one request; of the machine, not agreed"
    )


class GenerationConfig(Settings):
    images: int = Field(default=1000, ge=2, le=1_000_000)
    candidates: int = Field(
        default=2, ge=1, le=16, description="images drawn for each that is kept, where privacy.features_share is over 0"
    )
    balance: Literal["counts", "even"] = Field(
        default="counts", description="classes in proportion to the private counts, or as many of each"
    )
    sampler: Literal["dpm-solver++", "heun", "ancestral"] = "dpm-solver++"
    steps: int = Field(default=18, ge=2, le=4000)
    guidance: float = Field(
        default=0.0, ge=0, le=20, description="classifier-free guidance weight; 0 = conditional only"
    )
    batch_size: int = Field(default=100, ge=1, le=4096)


class ValidationConfig(Settings):
    backbone: str = Field(
        default="plain_cnn",
        max_length=80,
        description="plain_cnn = six convolutions with GroupNorm; or a timm model name",
    )
    steps: int = Field(default=300, ge=1, le=1_000_000)
    batch_size: int = Field(default=128, ge=2, le=4096)
    learning_rate: float = Field(default=3e-3, gt=0, le=1)
    bins: int = Field(default=24, ge=4, le=512, description="bins of each score histogram")
    reference_steps: int = Field(default=100, ge=1, le=10_000, description="DP-SGD steps of the real-data reference")
    reference_learning_rate: float = Field(default=3e-3, gt=0, le=1)
    reference_sample_rate: float = Field(default=0.1, gt=0, le=1)


class SimulationConfig(Settings):
    """Only read when the study is run on one machine with simulated sites; not agreed, not hashed."""

    sites: int = Field(default=3, ge=1, le=64)
    label_skew: float = Field(
        default=0.5, ge=0, le=1, description="0 = same class mix at every site, 1 = strongly different"
    )
    phantoms_per_site: int = Field(default=600, ge=20, le=1_000_000)
    own_reference: bool = Field(
        default=True, description="with real images: each site also trains, for itself alone, a classifier on its own"
    )


class ReleaseConfig(Settings):
    """What a release says of who made it and how it may be used, and the least that it has to be; a hospital that
    approves the study approves this, too. No site computes anything by it."""

    title: Name | None = Field(default=None, description="of the published set; default: from the study's name")
    authors: tuple[Name, ...] = Field(default=(), max_length=64, description="as they are to be cited")
    contact: Shown = Field(default="", max_length=200, description="whom to ask: an address or a page")
    licence: str = Field(
        default="", max_length=64, pattern=r"^$|^[A-Za-z0-9][A-Za-z0-9.+-]*$",
        description="of the set and the weights: an SPDX identifier, or LicenseRef-NAME with licence_url; empty = none "
        "is given",
    )  # fmt: skip
    licence_url: str = Field(default="", max_length=500, pattern=r"^$|^https://[!-~]+$")
    url: str = Field(default="", max_length=500, pattern=r"^$|^https://[!-~]+$", description="where it is published")
    uid_root: str = Field(
        default="", max_length=30, pattern=r"^$|^[0-2](\.(0|[1-9][0-9]*))+$", description="of the UIDs of DICOM files"
    )
    min_auc: float | None = Field(
        default=None, ge=0, le=1, description="least AUC of the classifier that is trained on the synthetic images"
    )
    smallest_class: int = Field(default=0, ge=0, le=1_000_000, description="least images of any class")

    @model_validator(mode="after")
    def _named_licence(self) -> ReleaseConfig:
        if self.licence.startswith("LicenseRef-") and not self.licence_url:
            raise ValueError("licence: a LicenseRef- is no known licence: it needs licence_url")
        if self.licence_url and not self.licence:
            raise ValueError("licence_url: needs licence, too")
        return self


class Study(Settings):
    """One collaboration, whole."""

    study: StudyInfo
    tuning: TuningConfig = TuningConfig()
    data: DataConfig
    network: NetworkConfig = NetworkConfig()
    diffusion: DiffusionConfig = DiffusionConfig()
    moments: MomentsConfig = MomentsConfig()
    pretrain: PretrainConfig = PretrainConfig()
    training: TrainingConfig
    privacy: PrivacyConfig
    federation: FederationConfig = FederationConfig()
    generation: GenerationConfig = GenerationConfig()
    validation: ValidationConfig = ValidationConfig()
    simulation: SimulationConfig = SimulationConfig()
    release: ReleaseConfig = ReleaseConfig()

    @model_validator(mode="after")
    def _consistent(self) -> Study:
        net, side = self.network, self.data.image_size
        if len(net.depths) != len(net.heads):
            raise ValueError("network.depths and network.heads: must have the same length")
        if side % 2 ** (len(net.depths) - 1):
            raise ValueError(f"network.depths: {side} px cannot be halved {len(net.depths) - 1} times")
        if net.width % 2:
            raise ValueError(f"network.width: {net.width} is odd")
        if net.width * 2 ** (len(net.depths) - 1) > MOST_CHANNELS:
            raise ValueError(f"network.width: over {MOST_CHANNELS} channels at the deepest level")
        if self.training.rounds * self.training.local_steps > MOST_STEPS:
            raise ValueError(f"training.rounds: over {MOST_STEPS} steps in all")
        for level, heads in enumerate(net.heads):
            if (net.width * 2**level) % heads:
                raise ValueError(f"network.heads: {heads} heads do not divide {net.width * 2**level} channels")
        if self.generation.guidance > 0 and self.diffusion.label_dropout == 0:
            raise ValueError("generation.guidance: needs diffusion.label_dropout over 0, or 0")
        if self.generation.images < len(self.data.classes):
            raise ValueError(f"generation.images: fewer than the {len(self.data.classes)} classes")
        if self.pretrain.source == "phantoms" and self.pretrain.images < 8 * len(self.data.classes):
            raise ValueError("pretrain.images: fewer than 8 phantoms of each class")
        if self.moments.components >= side:
            raise ValueError(f"moments.components: not fewer than the {side} px of a side")
        if self.training.algorithm == "fedsgd" and self.training.local_steps != 1:
            raise ValueError('training.local_steps: must be 1 where training.algorithm is "fedsgd"')
        if self.training.rounds == 0 and self.privacy.moments_share == 0:
            raise ValueError("training.rounds: with no round and no moments nothing would be learnt")
        if self.pretrain.class_share < 1 and 0 in (self.privacy.features_share, self.privacy.moments_share):
            raise ValueError("pretrain.class_share: below 1 needs privacy.features_share and moments_share over 0")
        if (self.pretrain.sha256 is not None) != (self.pretrain.source == "npz"):
            raise ValueError('pretrain.sha256: goes with pretrain.source "npz", which needs path and sha256')
        if self.pretrain.path is not None and self.pretrain.source != "npz":
            raise ValueError('pretrain.path: goes with pretrain.source "npz", which needs path and sha256')
        private = self.privacy.moments_share > 0 or self.privacy.features_share > 0
        if self.pretrain.source == "none" and (private or self.training.rounds == 0):
            raise ValueError(
                'pretrain.source: "none" needs training.rounds, and privacy.moments_share = 0 and features_share = 0, '
                "since moments say where public images are to be carried, and features which are to be kept"
            )
        if self.pretrain.source == "phantoms" and not 16 <= side <= 128:
            raise ValueError(f"pretrain.source: phantoms are drawn at 16 to 128 px, not {side}")
        if len(set(self.data.classes)) != len(self.data.classes):
            raise ValueError("data.classes: names must differ")
        return self

    def __hash__(self) -> int:
        return hash(self.sha256)

    @property
    def symmetry(self) -> Symmetry:
        """Which changes of an image mean nothing: as the study says, or by its modality."""
        return self.data.symmetry or _SYMMETRIES[self.study.modality]

    def agreed(self) -> dict[str, Any]:
        """What every party agrees on, as plain JSON values: all settings but those of `ENVIRONMENT`.

        A release table that says nothing is left out: studies from before there was one keep their hash.
        """
        silent = self.release == ReleaseConfig()
        return self.model_dump(mode="json", exclude={**ENVIRONMENT, "release": True} if silent else ENVIRONMENT)

    @cached_property
    def sha256(self) -> str:
        """The study's name at every party: SHA-256 of what is agreed, in canonical JSON."""
        return hashlib.sha256(canonical_json(self.agreed()).encode()).hexdigest()
