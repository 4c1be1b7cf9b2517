# SPDX-License-Identifier: Apache-2.0
"""From a configuration to the train, valid and test sets.

Each set's plan is fixed when a run starts, returned in `Splits.epochs`, kept in the checkpoint and given back on
resume: GPT-NeoX shuffles all epochs of a run together, so the number of epochs is part of the order. If a resumed run
needs more samples than its plan holds, freshly shuffled ones are appended and `Splits.notes` says so.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from libneox.data.blend import normalized, samples_of_each, weights_by_documents
from libneox.data.documents import DocumentSamples, check_packing, usable
from libneox.data.mmap import MMapDataset, strip_suffix
from libneox.data.order import epochs_for, samples_in, split_bounds
from libneox.data.samples import BlendedSamples, HashedSamples, PackedSamples, PairedSamples, SampleSet
from libneox.errors import DataError, UsageError

if TYPE_CHECKING:
    from libneox.config import NeoxConfig

NAMES = ("train", "valid", "test")
ORDERS = ("neox", "hash")
Plan = list[list[int]]


@dataclass(frozen=True)
class Sources:
    """The pairs of one set.

    Attributes:
        paths: prefixes; the preferred answers if `rejected` is given.
        weights: one for each path; None for equal ones.
        labels, rewards: prefixes that go with `paths`, or empty.
        rejected, rejected_labels: the other side of preference pairs.
    """

    paths: tuple[str, ...]
    weights: tuple[float, ...] | None = None
    labels: tuple[str, ...] = ()
    rewards: tuple[str, ...] = ()
    rejected: tuple[str, ...] = ()
    rejected_labels: tuple[str, ...] = ()


@dataclass(frozen=True)
class DataSpec:
    """The keys of a configuration that decide the data, as plain values; see the configuration for their meaning.

    Either `data_path` and `split`, or `sources` by set name.
    """

    seq_length: int
    seed: int = 1234
    data_path: str | None = None
    split: str = "969, 30, 1"
    sources: Mapping[str, Sources] = field(default_factory=dict)
    packing: str = "packed"
    order: str = "neox"
    allow_chopped: bool = True
    train_epochs: int | None = None
    weight_by_num_documents: bool = False
    weighted_sampler_alpha: float = 1.0

    def __post_init__(self) -> None:
        check_packing(self.packing)
        if self.order not in ORDERS:
            raise UsageError(f"order: {self.order!r} is unknown; it is one of {', '.join(ORDERS)}")
        if self.order == "hash" and self.packing != "packed":
            raise UsageError(f"order: hash works with pack_impl: packed, not {self.packing}")
        if (self.data_path is None) == (not self.sources):
            raise UsageError("no data: give either data_path, or train_data_paths and the like")
        if self.order == "neox" and not 0 <= self.seed < 2**32:
            raise UsageError(f"seed: {self.seed} is not between 0 and 4294967295, as order: neox needs it")
        if self.seq_length < 1:
            raise UsageError(f"seq_length: {self.seq_length} is not above 0")
        for name, sources in self.sources.items():
            self._check_sources(name, sources)

    def _check_sources(self, name: str, sources: Sources) -> None:
        for key in ("weights", "labels", "rewards", "rejected", "rejected_labels"):
            values = getattr(sources, key)
            if values and len(values) != len(sources.paths):
                raise UsageError(f"{name} data: {len(values)} {key} for {len(sources.paths)} paths")
        if sources.rejected and self.packing == "packed":
            raise UsageError("preference pairs need pack_impl: unpacked or pack_until_overflow")
        if sources.rejected and bool(sources.labels) != bool(sources.rejected_labels):
            raise UsageError(f"{name} data: give label paths for both sides of the preference pairs, or for none")
        if sources.rewards and (self.packing != "unpacked" or sources.rejected):
            raise UsageError("reward data needs pack_impl: unpacked and dataset_impl: gpt2")
        if self.train_epochs is not None and sources.weights is not None and len(set(sources.weights)) > 1:
            raise UsageError(
                f"{name} data: train_epochs passes over every dataset equally often; leave out the weights"
            )

    @classmethod
    def from_config(cls, config: NeoxConfig) -> DataSpec:
        """Take the keys from a configuration.

        Raises:
            UsageError: they contradict each other, or name no data.
        """
        pairwise = config.get("dataset_impl") == "pairwise"
        sources = {name: found for name in NAMES if (found := _sources(config, name, pairwise)) is not None}
        return cls(
            seq_length=config.seq_length or 0,
            seed=config.get("seed"),
            data_path=config.get("data_path"),
            split=str(config.get("split")),
            sources=sources,
            packing=config.get("pack_impl"),
            order=config.get("order"),
            allow_chopped=config.get("allow_chopped"),
            train_epochs=config.get("train_epochs"),
            weight_by_num_documents=config.get("weight_by_num_documents"),
            weighted_sampler_alpha=config.get("weighted_sampler_alpha"),
        )


@dataclass(frozen=True)
class Splits:
    """The sets of a run.

    Attributes:
        train, valid, test: None where there is no data, or none is wanted.
        epochs: the plan of each set, JSON-able; store it and give it to `build_splits` on resume.
        notes: what the user should be told, a line each.
        prefixes: the token pairs in use; their manifests name the tokenizer.
    """

    train: SampleSet | None
    valid: SampleSet | None
    test: SampleSet | None
    epochs: dict[str, Plan]
    notes: tuple[str, ...] = ()
    prefixes: tuple[Path, ...] = ()


def samples_wanted(train_iters: int, batch: int, eval_interval: int, eval_iters: int) -> tuple[int, int, int]:
    """Samples of train, valid and test that GPT-NeoX asks for; `batch` is the global one (train_batch_size)."""
    evaluations = train_iters // eval_interval + 1 if eval_interval else 0
    return train_iters * batch, evaluations * eval_iters * batch, eval_iters * batch


def build_splits(
    spec: DataSpec | NeoxConfig,
    *,
    train_samples: int | None,
    valid_samples: int | None = 0,
    test_samples: int | None = 0,
    seq_length: int | None = None,
    epochs: Mapping[str, Sequence[Sequence[int]]] | None = None,
) -> Splits:
    """Open the data and lay out the sets; nothing but lengths is read yet.

    Args:
        spec: what to open.
        train_samples, valid_samples, test_samples: how many are wanted: 0 leaves the set out, None asks for one pass
            over the data, or `train_epochs` passes if the configuration says so.
        seq_length: in place of the configuration's.
        epochs: `Splits.epochs` of the run that is resumed.

    Raises:
        InputMissing, DataError: a pair is missing or damaged.
        UsageError: the configuration asks for something that its data cannot give.
    """
    if not isinstance(spec, DataSpec):
        spec = DataSpec.from_config(spec)
    if seq_length is not None:
        spec = replace(spec, seq_length=seq_length)
    builder = _Builder(spec, epochs or {})
    wanted = dict(zip(NAMES, (train_samples, valid_samples, test_samples), strict=True))
    sets = {name: builder.build(name, wanted[name]) if wanted[name] != 0 else None for name in NAMES}
    if sets["train"] is None and wanted["train"] != 0:
        raise UsageError("no training data: the split leaves no document for it, or train_data_paths is missing")
    plans = {name: found.plan for name, found in sets.items() if found is not None}
    return Splits(sets["train"], sets["valid"], sets["test"], plans, tuple(builder.notes), tuple(builder.pairs))


class _Builder:
    """Opens each pair once, however often it is named."""

    def __init__(self, spec: DataSpec, epochs: Mapping[str, Sequence[Sequence[int]]]):
        self._spec, self._stored = spec, epochs
        self._opened: dict[Path, MMapDataset] = {}
        self.pairs: dict[Path, None] = {}  # an ordered set
        self.notes: list[str] = []

    def build(self, name: str, samples: int | None) -> SampleSet | None:
        """One set, or None if there is no data for it."""
        if self._spec.data_path is not None:
            text = self._text(self._spec.data_path)
            bounds = split_bounds(self._spec.split, len(text))
            lo, hi = bounds[NAMES.index(name)], bounds[NAMES.index(name) + 1]
            return self._one(name, 0, text, lo, hi, samples) if hi > lo else None
        sources = self._spec.sources.get(name)
        return self._mixture(name, sources, samples) if sources is not None else None

    def _mixture(self, name: str, sources: Sources, samples: int | None) -> SampleSet:
        texts = [self._text(path) for path in sources.paths]
        if self._spec.weight_by_num_documents:
            weights = weights_by_documents([len(text) for text in texts], self._spec.weighted_sampler_alpha)
        else:
            weights = normalized(sources.weights or [1.0] * len(texts))
        each: Sequence[int | None] = [None] * len(texts) if samples is None else _of_each(weights, samples)
        sets = [
            self._one(name, number, text, 0, len(text), wanted, sources)
            for number, (text, wanted) in enumerate(zip(texts, each, strict=True))
        ]
        if len(sets) == 1:
            return sets[0]
        if samples is None:  # one pass: every dataset lasts as long as the others
            samples = sum(len(found) for found in sets)
            weights = normalized([len(found) for found in sets])
        return BlendedSamples(sets, weights, samples)

    def _one(
        self,
        name: str,
        number: int,
        text: MMapDataset,
        lo: int,
        hi: int,
        samples: int | None,
        sources: Sources | None = None,
    ) -> SampleSet:
        """The samples of one pair."""
        spec = self._spec
        labels = self._open(sources.labels[number]) if sources and sources.labels else None
        common: dict[str, Any] = {"seed": spec.seed, "seq_length": spec.seq_length}
        tokens = int(text.sizes[lo:hi].sum(dtype=np.int64))
        if tokens == 0:
            raise DataError(f"{text.prefix}: its documents {lo}:{hi}, the {name} set, hold no tokens")
        if sources and sources.rejected:
            return self._preferences(name, number, text, sources, samples)
        if spec.packing != "packed":
            rewards = self._open(sources.rewards[number]) if sources and sources.rewards else None
            common |= {"packing": spec.packing, "allow_chopped": spec.allow_chopped, "labels": labels}
            one_pass = hi - lo
            segments = self._segments(name, number, samples, lambda n: n, one_pass)
            return DocumentSamples(text, lo, hi, segments=segments, rewards=rewards, **common)
        if spec.order == "hash":
            per_epoch = samples_in(1, spec.seq_length, tokens)
            samples = per_epoch * (spec.train_epochs or 1) if samples is None else samples
            return HashedSamples(text, lo, hi, samples=samples, labels=labels, **common)

        def epochs(wanted: int) -> int:
            return epochs_for(wanted, spec.seq_length, tokens)

        def held(epochs: int) -> int:
            return samples_in(epochs, spec.seq_length, tokens)

        segments = self._segments(name, number, samples, epochs, 1, held)
        return PackedSamples(text, lo, hi, segments=segments, labels=labels, **common)

    def _preferences(
        self, name: str, number: int, text: MMapDataset, sources: Sources, samples: int | None
    ) -> SampleSet:
        other = self._open(sources.rejected[number])
        if len(other) != len(text):
            raise DataError(
                f"{other.prefix}: {len(other)} documents, but {text.prefix} has {len(text)}; pairs need as many"
            )
        spec, hi = self._spec, len(text)
        labels = [self._open(paths[number]) if paths else None for paths in (sources.labels, sources.rejected_labels)]
        kept = [
            usable(side, 0, hi, spec.seq_length, allow_chopped=spec.allow_chopped, labels=label)
            for side, label in zip((text, other), labels, strict=True)
        ]
        common: dict[str, Any] = {
            "packing": spec.packing,
            "seed": spec.seed,
            "seq_length": spec.seq_length,
            "allow_chopped": spec.allow_chopped,
            "segments": self._segments(name, number, samples, lambda n: n, hi),
            "kept": np.intersect1d(*kept),
            "lengths": np.maximum(text.sizes, other.sizes),
        }
        sides = [
            DocumentSamples(side, 0, hi, labels=label, **common)
            for side, label in zip((text, other), labels, strict=True)
        ]
        return PairedSamples(*sides)

    def _segments(
        self, name: str, number: int, samples: int | None, needed: Any, one_pass: int, held: Any = lambda n: n
    ) -> list[int]:
        """The stored plan of one pair, with what is missing appended.

        Args:
            needed: units (epochs or samples) that hold so many samples.
            one_pass: units of one pass over the data.
            held: samples in so many units.
        """
        plans = self._stored.get(name)
        if plans is not None and number >= len(plans):
            raise UsageError(
                f"the checkpoint's {name} data had {len(plans)} datasets; keep them, in their order, to resume"
            )
        segments = [int(units) for units in plans[number]] if plans is not None else []
        if samples is None:
            passes = self._spec.train_epochs or 1
            return segments + [one_pass] * (passes - len(segments))
        missing = samples - sum(held(units) for units in segments)
        if not segments:
            return [needed(samples)]
        if missing > 0:
            segments.append(needed(missing))
            kind = "epochs" if self._spec.packing == "packed" else "samples"
            self.notes.append(
                f"{name} dataset {number}: the run is longer than planned; {segments[-1]} {kind}, freshly shuffled, "
                f"are appended to the {sum(segments[:-1])} of its plan"
            )
        return segments

    def _text(self, path: str) -> MMapDataset:
        text = self._open(path)
        if len(text) == 0:
            raise DataError(f"{text.prefix}: holds no documents")
        if text.dtype.kind == "f":
            raise DataError(f"{text.prefix}: holds {text.dtype.name} numbers, not tokens")
        self.pairs[text.prefix] = None
        return text

    def _open(self, path: str) -> MMapDataset:
        prefix = strip_suffix(Path(path).expanduser())
        if prefix not in self._opened:
            self._opened[prefix] = MMapDataset(prefix)
        return self._opened[prefix]


def _of_each(weights: Sequence[float], samples: int) -> list[int]:
    """At least one sample each: GPT-NeoX's rule can draw once from a dataset of weight 0."""
    return [max(1, count) for count in samples_of_each(weights, samples)]


def _sources(config: NeoxConfig, name: str, pairwise: bool) -> Sources | None:
    side = f"pos_{name}" if pairwise else name
    paths = config.get(f"{side}_data_paths")
    if not paths:
        return None

    def strings(key: str) -> tuple[str, ...]:
        return tuple(config.get(key) or ())

    weights = config.get(f"{name}_data_weights")
    return Sources(
        paths=tuple(paths),
        weights=tuple(weights) if weights else None,
        labels=strings(f"{side}_label_data_paths"),
        rewards=() if pairwise else strings(f"{name}_reward_data_paths"),
        rejected=strings(f"neg_{name}_data_paths") if pairwise else (),
        rejected_labels=strings(f"neg_{name}_label_data_paths") if pairwise else (),
    )
