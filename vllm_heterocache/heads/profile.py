"""What calibration knows about every KV head of a model, and its JSON.

L layers, H KV heads; the flat index of head h of layer l is l * H + h.
"""

from __future__ import annotations

import json
import logging
import re
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from vllm_heterocache.heads.assignment import HeadAssignment, HeadRole
from vllm_heterocache.heads.cluster_files import assignment_of, is_cluster_file
from vllm_heterocache.heads.json_arrays import readable, rounded
from vllm_heterocache.refusal import Refusal

if TYPE_CHECKING:
    from collections.abc import Sequence

FORMAT = "vllm-heterocache/head-profile/1"
SCORES = ("stability", "retrieval")
# A pivot leads heads of its own layer and of the next two. Simulated at 4K (20 % budget, clusters
# from prose): in-layer clusters collapse (4 of 32 answers), 2 layers give 21, 4 layers 28; with
# clusters weighted by retrieval, 2 and 4 layers are equal within noise.
LEAD_LAYERS = 2
# A pivot must overlap this much more than chance to lead. Simulated: no margin at all scored the
# same, so the value only keeps hopeless heads from following noise.
LEAD_MARGIN = 0.1
# Chance overlap of two top sets is the share of positions in a set: calibration's `top_share`.
DEFAULT_TOP_SHARE = 0.2

_CALIBRATE = "make one with `heterocache calibrate MODEL -o FILE`"
_log = logging.getLogger("vllm.heterocache")


@dataclass(frozen=True)
class ModelIdentity:
    """Which model a profile describes, and which layers of it; None where the source does not
    say."""

    name: str
    architecture: str | None
    num_layers: int  # that the profile describes
    num_q_heads: int | None
    num_kv_heads: int
    head_dim: int | None
    weights_fingerprint: str | None = None
    layers: tuple[int, ...] | None = None
    """Indices in the model of the layers that the profile describes; None for all of them."""

    @property
    def layer_ids(self) -> Sequence[int]:
        """[num_layers] indices in the model."""
        return range(self.num_layers) if self.layers is None else self.layers

    @property
    def layers_in_words(self) -> str:
        if self.layers is None:
            return f"{self.num_layers} layers"
        return f"{self.num_layers} layers with full attention"


@dataclass(frozen=True, eq=False)
class HeadProfile:
    """Calibration of one model: scores in [0, 1] per KV head and similarities between heads."""

    model: ModelIdentity
    settings: dict[str, Any]  # how it was measured; `top_share` is read here (see `chance`)
    provenance: dict[str, Any]  # who, when, with what; never read
    stability: np.ndarray | None = None  # [L, H] float32, median overlap with the prefill's set
    retrieval: np.ndarray | None = None  # [L, H] float32, attention mass on needles
    similarity: np.ndarray | None = None  # [1 + d_max, L, H, H] float32: entry [d, l, h, g] is the
    # median top-set overlap of head (l, h) and head (l + d, g); NaN where l + d >= L
    assignment: HeadAssignment | None = None

    def __post_init__(self) -> None:
        shape = (self.model.num_layers, self.model.num_kv_heads)
        _top_share(self.settings)
        for name in SCORES:
            array = getattr(self, name)
            if array is not None and array.shape != shape:
                raise ValueError(f"{name} has shape {array.shape}, the model has {shape} KV heads")
            if array is not None and (array < 0).any():  # weights of budgets are made of scores
                raise ValueError(f"{name} has the score {np.nanmin(array):g}, which is below 0")
        for name in (*SCORES, "similarity"):
            array = getattr(self, name)
            if array is not None and np.isinf(array).any():
                raise ValueError(f"{name} has a score beyond the range of 32-bit floats")
        if self.similarity is not None and (
            self.similarity.ndim != 4 or self.similarity.shape[1:] != (*shape, shape[1])
        ):
            raise ValueError(f"similarity has shape {self.similarity.shape} for {shape} KV heads")
        if self.assignment is not None:
            if self.assignment.roles.shape != shape:
                raise ValueError(f"roles have shape {self.assignment.roles.shape}, not {shape}")
            self.assignment.validate()

    @property
    def chance(self) -> float:
        """Overlap that two unrelated heads reach."""
        return _top_share(self.settings)

    def lead_similarity(self, lead_layers: int = LEAD_LAYERS) -> np.ndarray:
        """[L*H, L*H] float64: entry [c, j] says how well head c could lead head j.

        NaN where c's layer is after j's or more than `lead_layers` before it; 1 on the diagonal.
        """
        num_layers, num_kv_heads = self.model.num_layers, self.model.num_kv_heads
        pairs = np.full((num_layers, num_kv_heads, num_layers, num_kv_heads), np.nan)
        if self.similarity is not None:
            for d in range(min(lead_layers + 1, len(self.similarity), num_layers)):
                for layer in range(num_layers - d):
                    pairs[layer, :, layer + d, :] = self.similarity[d, layer]
        similarity = pairs.reshape(num_layers * num_kv_heads, -1)
        np.fill_diagonal(similarity, 1.0)
        return similarity

    def nearest_pivots(self, pivots: np.ndarray, lead_layers: int = LEAD_LAYERS) -> np.ndarray:
        """[L, H] int32: flat index of the most similar admissible pivot of each head.

        -1 where no pivot beats chance by LEAD_MARGIN; ties go to the lowest index.
        `pivots` is [L, H] bool.
        """
        pairs = self.lead_similarity(lead_layers)
        pairs[np.isnan(pairs) | ~pivots.reshape(-1, 1)] = -np.inf
        nearest = pairs.argmax(axis=0)
        # 1e-6: a stored 0.3 is a little less than 0.2 + 0.1
        good = pairs.max(axis=0) >= self.chance + LEAD_MARGIN - 1e-6
        return np.where(good, nearest, -1).astype(np.int32).reshape(pivots.shape)

    def select(self, layers: range, kv_heads: Sequence[int]) -> HeadProfile:
        """The profile of one TP/PP rank, which holds `layers` and `kv_heads` of the described ones.

        A stored satellite whose leader is on another rank follows the most similar pivot of this
        rank, or becomes an anchor.
        """
        heads = np.ix_(layers, kv_heads)
        q_heads = self.model.num_q_heads
        if q_heads is not None:
            q_heads = q_heads // self.model.num_kv_heads * len(kv_heads)
        of_rank = self.model.layers and tuple(self.model.layers[layer] for layer in layers)
        model = replace(
            self.model,
            num_layers=len(layers),
            num_kv_heads=len(kv_heads),
            num_q_heads=q_heads,
            layers=of_rank,
        )
        arrays = {name: getattr(self, name) for name in SCORES}
        scores: dict[str, Any] = {n: None if a is None else a[heads] for n, a in arrays.items()}
        rank = replace(
            self,
            model=model,
            **scores,
            similarity=self._select_similarity(layers, kv_heads),
            assignment=None,
        )
        if self.assignment is None:
            return rank
        return replace(rank, assignment=_select_assignment(self.assignment, heads, rank))

    def _select_similarity(self, layers: range, kv_heads: Sequence[int]) -> np.ndarray | None:
        if self.similarity is None:
            return None
        distances = range(len(self.similarity))
        similarity = self.similarity[np.ix_(distances, layers, kv_heads, kv_heads)]
        for d in distances:
            similarity[d, max(len(layers) - d, 0) :] = np.nan
        return similarity

    def check_model(self, identity: ModelIdentity, source: str | Path = "data") -> None:
        """Raise Refusal, naming option `profile` and its `source`, where the profile is of another
        model, or of other layers than those that HeteroCache serves."""
        self._check_layers(identity, source)
        for field in ("num_layers", "num_kv_heads", "num_q_heads", "head_dim"):
            ours, theirs = getattr(self.model, field), getattr(identity, field)
            if None not in (ours, theirs) and ours != theirs:
                raise Refusal(
                    f"profile {source} describes {self.model.name!r} with {field} {ours}, but "
                    f"{identity.name!r} has {theirs}",
                    f'use profile "auto" or {_CALIBRATE}',
                )
        prints = (self.model.weights_fingerprint, identity.weights_fingerprint)
        if None not in prints and prints[0] != prints[1]:
            _log.warning("profile %s was calibrated on other weights: %s", source, self.model.name)

    def _check_layers(self, identity: ModelIdentity, source: str | Path) -> None:
        ours, theirs = self.model, identity
        if list(ours.layer_ids) == list(theirs.layer_ids) or ours.layers is theirs.layers is None:
            return
        raise Refusal(
            f"profile {source} describes {_in_words(ours.layer_ids)} of {ours.name!r}, but "
            f"HeteroCache serves {_in_words(theirs.layer_ids)} of {theirs.name!r}, those with full "
            "attention",
            f'use profile "auto" or {_CALIBRATE}',
        )

    def to_json(self) -> dict[str, Any]:
        """JSON-able dict; arrays as nested lists with 5 digits, NaN as None."""
        data: dict[str, Any] = {"format": FORMAT, "model": asdict(self.model)}
        data |= {"settings": self.settings, "provenance": self.provenance}
        for name in (*SCORES, "similarity"):
            array = getattr(self, name)
            data[name] = None if array is None else rounded(array)
        data["assignment"] = None if self.assignment is None else self.assignment.to_json()
        return data

    @classmethod
    def from_json(cls, data: Any, source: str = "profile data") -> HeadProfile:
        """Parse this project's JSON or the reference repository's cluster JSON.

        `source` names the data in errors. Raises Refusal for anything else.
        """
        try:
            if is_cluster_file(data):
                return _from_reference(data, source)
            found = data.get("format") if isinstance(data, dict) else None
            if found != FORMAT:
                raise ValueError(f'its format is {found!r}, not "{FORMAT}"')
            return cls._from_own(data)
        except (
            KeyError,
            TypeError,
            ValueError,
            IndexError,
            AttributeError,
            OverflowError,
        ) as error:
            reason = (
                f"{error.args[0]!r} is missing or unknown" if isinstance(error, KeyError) else error
            )
            raise Refusal(
                f"profile {source} is not a usable head profile ({reason})", _CALIBRATE
            ) from error

    @classmethod
    def _from_own(cls, data: dict[str, Any]) -> HeadProfile:
        model = _identity(data["model"])
        with np.errstate(over="ignore"):  # infinities are refused with their name
            arrays = {
                name: None if data[name] is None else np.array(data[name], np.float32)
                for name in (*SCORES, "similarity")
            }
        stored = data["assignment"]
        assignment = None if stored is None else HeadAssignment.from_json(stored)
        return cls(model, data["settings"], data["provenance"], **arrays, assignment=assignment)

    def save(self, path: str | Path) -> None:
        Path(path).write_text(readable(self.to_json()) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: str | Path) -> HeadProfile:
        """Read either format from a file; Refusal names the file and the fix."""
        try:
            data = json.loads(Path(path).read_text(encoding="utf-8"))
        except OSError as error:
            raise Refusal(
                f"profile {path} cannot be read ({error.strerror})",
                f'give the path of a head profile, use "auto", or {_CALIBRATE}',
            ) from error
        except (ValueError, RecursionError) as error:
            raise Refusal(f"profile {path} is not JSON ({error})", _CALIBRATE) from error
        return cls.from_json(data, str(path))

    @classmethod
    def load_for(cls, path: str | Path, identity: ModelIdentity) -> HeadProfile:
        """`load` a profile of this model. Raises Refusal as `check_model` does, too."""
        profile = cls.load(path)
        profile.check_model(identity, path)
        return profile


def _in_words(layers: Sequence[int]) -> str:
    first, last = layers[0], layers[-1]
    if len(layers) > 2 and list(layers) == list(range(first, last + 1)):
        return f"layers {first} to {last}"
    return f"layers {list(layers)}"


def _top_share(settings: Any) -> float:
    """What the settings hold as such; raises ValueError where they hold something else."""
    if not isinstance(settings, dict):
        raise ValueError(f"settings are {type(settings).__name__}, not an object")
    share = settings.get("top_share", DEFAULT_TOP_SHARE)
    if type(share) not in (int, float) or not 0 < share <= 1:
        raise ValueError(f"settings.top_share is {share!r:.40}, not a number above 0, up to 1")
    return float(share)


def _identity(data: dict[str, Any]) -> ModelIdentity:
    """Raises ValueError for counts that are no whole numbers."""
    known = {field.name for field in fields(ModelIdentity)}
    model = ModelIdentity(**{k: v for k, v in data.items() if k in known})
    if model.layers is not None:
        model = replace(model, layers=_layers(model.layers, model.num_layers))
    for name in ("num_layers", "num_kv_heads", "num_q_heads", "head_dim"):
        count = getattr(model, name)
        may_lack = name in ("num_q_heads", "head_dim")
        if not (count is None and may_lack) and (type(count) is not int or count < 1):
            raise ValueError(f"model.{name} is {count!r:.40}, not a whole number above 0")
    return model


def _layers(found: Any, num_layers: int) -> tuple[int, ...]:
    """Raises ValueError for anything but one index, in order, of each described layer."""
    if (
        not isinstance(found, list)
        or any(type(layer) is not int or layer < 0 for layer in found)
        or sorted(set(found)) != found
        or len(found) != num_layers
    ):
        raise ValueError(f"model.layers is {found!r:.40}, not {num_layers} indices of layers")
    return tuple(found)


def _select_assignment(
    whole: HeadAssignment, heads: tuple[np.ndarray, ...], rank: HeadProfile
) -> HeadAssignment:
    roles, old_leaders = whole.roles[heads].copy(), whole.leaders[heads]
    flat = np.arange(whole.num_heads).reshape(whole.roles.shape)[heads].reshape(-1)
    new_index = np.full(whole.num_heads, -1, np.int32)
    new_index[flat] = np.arange(len(flat))
    leaders = np.where(old_leaders >= 0, new_index[old_leaders], -1)
    orphans = (roles == HeadRole.SATELLITE) & (leaders < 0)
    leaders[orphans] = rank.nearest_pivots(roles == HeadRole.PIVOT)[orphans]
    roles[orphans & (leaders < 0)] = HeadRole.ANCHOR
    return HeadAssignment(roles, leaders.astype(np.int32), whole.weights[heads])


def _from_reference(data: dict[str, Any], source: str) -> HeadProfile:
    """Roles from a cluster file of the reference repository (github ponytaill/HeteroCache)."""
    assignment = assignment_of(data)
    num_layers, num_kv_heads = assignment.roles.shape
    stem = Path(source).stem
    named = re.match(r"Head_Analysis_(.+?)_topk", stem)
    model = ModelIdentity(
        named.group(1) if named else stem, None, num_layers, None, num_kv_heads, None
    )
    provenance = {"source": "reference repository cluster file", "file": Path(source).name}
    return HeadProfile(model, {}, provenance, assignment=assignment)
