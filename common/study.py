"""The study file: what every party agrees on, as frozen, checked settings.

SPDX-License-Identifier: Apache-2.0

One TOML file describes one collaboration. Its SHA-256 (over the settings, in canonical JSON) names the study at
every party. Nothing here can be set at a site; what a site owns is in its site file (`client/site.py`).
"""

from __future__ import annotations

import difflib
import hashlib
import json
import tomllib
from pathlib import Path
from typing import Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from common.errors import StudyError

Modality = Literal["radiology", "ophthalmology", "histopathology"]
Symmetry = Literal["none", "mirror", "square"]
_SYMMETRIES: dict[Modality, Symmetry] = {  # the heart is on one side; eyes come in pairs; a slide lies as it lies
    "radiology": "none", "ophthalmology": "mirror", "histopathology": "square",
}  # fmt: skip


class Settings(BaseModel):
    """Base of all settings: frozen, unknown keys refused, numbers finite."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class StudyInfo(Settings):
    name: str = Field(pattern=r"^[a-z0-9][a-z0-9-]{0,39}$", description="lower case, digits, hyphens")
    modality: Modality
    description: str = ""
    seed: int = Field(default=0, ge=0, description="seeds the server's public choices only (initial weights, sampling)")


class DataConfig(Settings):
    """What an image of this study looks like; public."""

    image_size: int = Field(ge=8, le=256, description="pixels, height and width")
    channels: Literal[1, 3]
    classes: tuple[str, ...] = Field(min_length=2, max_length=64, description="biomarker classes, in label order")
    symmetry: Symmetry | None = Field(
        default=None, description="changes of an image that mean nothing: mirror = left to right, square = also turns; "
        "default: none in radiology, mirror in ophthalmology, square in histopathology"
    )  # fmt: skip


class NetworkConfig(Settings):
    """Swin U-Net of the diffusion model (Pan et al. 2023); one entry of `depths` and `heads` a level."""

    patch_size: Literal[1, 2, 4, 8] = 2
    width: int = Field(default=32, ge=8, le=512, description="channels at the first level; doubled a level")
    depths: tuple[int, ...] = Field(default=(2, 2), min_length=1, max_length=4)
    heads: tuple[int, ...] = Field(default=(2, 4), min_length=1, max_length=4)
    window: int = Field(default=7, ge=2, le=16, description="window side, tokens")
    mlp_ratio: float = Field(default=2.0, gt=0, le=8)
    class_conditional: bool | None = Field(
        default=None, description="whether the network is told the class; default: only where no class moments tell it"
    )
    time_share: float | None = Field(
        default=None, gt=0, le=1, description="share of the time steps, the cleaner ones, at which the network acts; "
        "default: a half where there are class moments, else all"
    )  # fmt: skip


class DiffusionConfig(Settings):
    timesteps: int = Field(default=1000, ge=10, le=4000)
    noise_multiplicity: int = Field(default=2, ge=1, le=64, description="K draws of (t, noise) a record, averaged")
    label_dropout: float = Field(default=0.1, ge=0, lt=1, description="share of draws trained on the null class")
    weighting: Literal["velocity", "min-snr"] = Field(
        default="velocity", description="of the loss over time steps; min-snr turns from the nearly clean ones"
    )


class MomentsConfig(Settings):
    """The private class moments that the diffusion model starts from."""

    components: int = Field(default=8, ge=1, le=32, description="lowest frequencies a side that have covariances")


class PretrainConfig(Settings):
    """The server's training on public images before the first round: no site's, so it costs no privacy."""

    source: Literal["phantoms", "npz", "none"] = Field(
        default="phantoms", description="npz = a public set in a file at the server; its own people are not protected"
    )
    path: str | None = Field(default=None, min_length=1, description="the public set, in MedMNIST's layout")
    sha256: str | None = Field(default=None, pattern=r"^[0-9a-f]{64}$", description="of that file")
    images: int = Field(default=4000, ge=64, le=1_000_000, description="phantoms drawn; of a public set all are taken")
    steps: int = Field(default=300, ge=1)
    batch_size: int = Field(default=64, ge=1)
    learning_rate: float = Field(default=2e-3, gt=0, le=1)


class TrainingConfig(Settings):
    rounds: int = Field(ge=0, le=10_000, description="0 = the private moments alone")
    step: Literal["summed", "local"] = Field(
        default="summed", description="one step of the sites' summed gradients a round, or local steps, then averaging"
    )
    local_steps: int = Field(default=1, ge=1, le=10_000, description="DP-SGD steps a round at each site")
    parameters: Literal["all", "modulation", "head"] = Field(
        default="modulation", description="what is trained: fewer numbers take less noise"
    )
    sample_rate: float = Field(gt=0, le=1, description="Poisson sampling probability of a record, each step")
    max_grad_norm: float = Field(default=0.1, gt=0)
    learning_rate: float = Field(default=3e-3, gt=0, le=1)
    second_moment: Literal["plain", "corrected"] = Field(
        default="plain", description="Adam's; corrected = less the variance that the noise is known to add"
    )
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
    reference_share: float = Field(
        default=0.25, ge=0, lt=1, description="the same for the real-data reference; 0 = none"
    )


class FederationConfig(Settings):
    min_sites: int = Field(default=2, ge=1)
    timeout_seconds: float = Field(default=1800, gt=0, description="longest wait for the sites' answers to one request")


class GenerationConfig(Settings):
    images: int = Field(default=1000, ge=2, le=1_000_000)
    balance: Literal["counts", "even"] = Field(
        default="counts", description="classes in proportion to the private counts, or as many of each"
    )
    sampler: Literal["ancestral", "ddim", "dpm-solver++"] = "dpm-solver++"
    steps: int = Field(default=15, ge=2, le=4000)
    temperature: float = Field(
        default=0.7, gt=0, le=1, description="of the Gaussian's variance, when images are drawn; 1 = as the moments are"
    )
    guidance: float = Field(
        default=0.0, ge=0, le=20, description="classifier-free guidance weight; 0 = conditional only"
    )
    batch_size: int = Field(default=100, ge=1)


class ValidationConfig(Settings):
    backbone: str = Field(default="test_efficientnet_gn", description="a timm model name")
    steps: int = Field(default=600, ge=1)
    batch_size: int = Field(default=128, ge=2)
    learning_rate: float = Field(default=3e-3, gt=0)
    bins: int = Field(default=24, ge=4, le=512, description="bins of each score histogram")
    reference_steps: int = Field(default=100, ge=1, description="DP-SGD steps of the real-data reference")
    reference_learning_rate: float = Field(default=3e-3, gt=0)
    reference_sample_rate: float = Field(default=0.1, gt=0, le=1)


class SimulationConfig(Settings):
    """Only read when the study is run on one machine with simulated sites."""

    sites: int = Field(default=3, ge=1, le=64)
    label_skew: float = Field(
        default=0.5, ge=0, le=1, description="0 = same class mix at every site, 1 = strongly different"
    )
    phantoms_per_site: int = Field(default=600, ge=20)
    own_reference: bool = Field(
        default=True, description="with real images: each site also trains, for itself alone, a classifier on its own"
    )


class Study(Settings):
    """One collaboration, whole."""

    study: StudyInfo
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

    @model_validator(mode="after")
    def _consistent(self) -> Study:
        net, side = self.network, self.data.image_size
        if len(net.depths) != len(net.heads):
            raise ValueError("network.depths and network.heads: must have the same length")
        if side % (net.patch_size * 2 ** (len(net.depths) - 1)):
            raise ValueError(
                f"network.patch_size: {side} px do not divide by {net.patch_size} and {len(net.depths) - 1} halvings"
            )
        for level, heads in enumerate(net.heads):
            if heads < 1 or (net.width * 2**level) % heads:
                raise ValueError(f"network.heads: {heads} heads do not divide {net.width * 2**level} channels")
        if self.moments.components >= side:
            raise ValueError(f"moments.components: not fewer than the {side} px of a side")
        if self.training.step == "summed" and self.training.local_steps != 1:
            raise ValueError('training.local_steps: must be 1 where training.step is "summed"')
        if self.training.second_moment == "corrected" and self.training.step != "summed":
            raise ValueError('training.second_moment: "corrected" goes with training.step "summed" only')
        if self.training.rounds == 0 and self.privacy.moments_share == 0:
            raise ValueError("training.rounds: with no round and no moments nothing would be learnt")
        for name in ("path", "sha256"):
            if (getattr(self.pretrain, name) is not None) != (self.pretrain.source == "npz"):
                raise ValueError(f'pretrain.{name}: goes with pretrain.source "npz", which needs path and sha256')
        if self.pretrain.source == "phantoms" and not 16 <= side <= 128:
            raise ValueError(f"pretrain.source: phantoms are drawn at 16 to 128 px, not {side}")
        if len(set(self.data.classes)) != len(self.data.classes):
            raise ValueError("data.classes: names must differ")
        if self.federation.min_sites > self.simulation.sites:
            raise ValueError("federation.min_sites: larger than simulation.sites")
        return self

    def __hash__(self) -> int:
        return hash(self.sha256)

    @property
    def symmetry(self) -> Symmetry:
        """Which changes of an image mean nothing: as the study says, or by its modality."""
        return self.data.symmetry or _SYMMETRIES[self.study.modality]

    @property
    def class_conditional(self) -> bool:
        """Whether the network is told the class: as the study says, or where nothing else holds the classes apart."""
        own = self.network.class_conditional
        return self.privacy.moments_share == 0 if own is None else own

    @property
    def network_steps(self) -> int:
        """At how many time steps, from 0, the network acts; at noisier ones the Gaussian stands alone."""
        share = self.network.time_share or (1.0 if self.privacy.moments_share == 0 else 0.5)
        return max(1, round(share * self.diffusion.timesteps))

    @property
    def sha256(self) -> str:
        """The study's name at every party: SHA-256 of its settings in canonical JSON."""
        return hashlib.sha256(canonical_json(self.model_dump(mode="json")).encode()).hexdigest()


def canonical_json(value: object) -> str:
    """JSON with sorted keys and no spaces: the same bytes for the same settings everywhere."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)


def load_study(path: Path, overrides: tuple[str, ...] = ()) -> Study:
    """Read, override and check a study file.

    Args:
        path: the TOML file.
        overrides: ``section.key=value`` each, the value in TOML syntax (a bare word is taken as a string).

    Raises:
        StudyError: the file is missing, not TOML, or a key or value cannot be used; one line, nearest key named.
    """
    try:
        raw = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise StudyError(
            f"cannot read the study file ({error.strerror})", where=str(path), remedy="Give the path of a study TOML."
        ) from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise StudyError(f"not valid TOML: {error}", where=str(path), remedy="Mend that line.") from error
    for override in overrides:
        _apply_override(raw, override)
    return parse_study(raw, where=str(path))


def parse_study(raw: dict[str, Any], *, where: str) -> Study:
    """Check settings that are already read (from TOML or from a message)."""
    try:
        return Study.model_validate(raw)
    except ValidationError as error:
        raise _study_error(error, Study, where) from error


def settings_error_line(error: ValidationError, model: type[BaseModel]) -> tuple[str, str, str]:
    """(field, what, remedy) of the first problem that pydantic found, with the nearest right key for a misspelt one."""
    problems = error.errors()  # a misspelt key also shows as a missing one: name the key that is there
    first = next((problem for problem in problems if problem["type"] == "extra_forbidden"), problems[0])
    field = ".".join(str(part) for part in first["loc"])
    if first["type"] == "extra_forbidden":
        key = str(first["loc"][-1])
        known = _keys_at(model, first["loc"][:-1])
        near = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
        remedy = f"Did you mean '{near[0]}'?" if near else f"Known keys: {', '.join(sorted(known))}."
        return field, f"unknown key '{key}'", remedy
    if first["type"] == "missing":
        return field, "missing", "Add it."
    what = first["msg"].removeprefix("Value error, ")
    if not field:  # a rule over several fields names its own field first
        field, _, what = what.partition(": ")
        return field, what, "Change one of them."
    return field, f"{what} (got {first['input']!r})", "Mend the value."


def _study_error(error: ValidationError, model: type[BaseModel], where: str) -> StudyError:
    field, what, remedy = settings_error_line(error, model)
    return StudyError(what, where=f"{where}: {field}", remedy=remedy)


def _keys_at(model: type[BaseModel], loc: tuple[int | str, ...]) -> list[str]:
    current: type[BaseModel] = model
    for part in loc:
        info = current.model_fields.get(str(part))
        if info is None:
            return []
        options = [info.annotation, *get_args(info.annotation)]
        nested = [o for o in options if isinstance(o, type) and issubclass(o, BaseModel)]
        if not nested:
            return []
        current = nested[0]
    return list(current.model_fields)


def _apply_override(raw: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    parts = key.strip().split(".")
    if not equals or len(parts) != 2 or not all(parts):
        raise StudyError(
            f"cannot read '{override}'", where="--set", remedy="Write section.key=value, as in training.rounds=2."
        )
    try:
        value = tomllib.loads(f"value = {text.strip()}")["value"]
    except tomllib.TOMLDecodeError:
        value = text.strip()
    section = raw.setdefault(parts[0], {})
    if not isinstance(section, dict):
        raise StudyError(f"'{parts[0]}' is not a section", where="--set", remedy="Write section.key=value.")
    section[parts[1]] = value


def study_toml(study: Study) -> str:
    """The settings as TOML, every default written out; reads back as the same study."""
    lines = [f"# Settings as run; SHA-256 {study.sha256}"]
    for section, values in study.model_dump(mode="json", exclude_none=True).items():
        lines.append(f"\n[{section}]")
        lines += [f"{key} = {json.dumps(value)}" for key, value in values.items()]  # JSON scalars and lists are TOML
    return "\n".join(lines) + "\n"
