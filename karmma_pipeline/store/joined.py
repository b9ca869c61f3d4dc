"""Several stores as one: clips meet by id, classes by name; nothing needs to be aligned."""

import hashlib
from collections.abc import Callable, Iterable, Sequence
from functools import cached_property
from itertools import chain, combinations, islice, permutations
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt

from karmma_pipeline.errors import StoreError, counted
from karmma_pipeline.modalities import Reason, canonical
from karmma_pipeline.store.mapping import ClipLocations
from karmma_pipeline.store.reader import FeatureStore
from karmma_pipeline.store.source import MappedStore, TokenSource, check_views
from karmma_pipeline.store.spec import ClipNumbers, ModalitySpec

LabelSpaces = Literal["same", "join"]


class JoinedStore(MappedStore):
    """The union of the stores' clips and modalities, read like one `FeatureStore`.

    A clip is absent in a modality that no store has of it. Clips of one id are one clip: where
    two stores know its label, split, group or times, they must say the same, and only one of
    them may have its tokens of a modality. Order: the first store's clips, then the new ones of
    the second, and so on.

    Args:
        stores: what to join.
        label_spaces: ``same`` refuses heads of one name whose classes differ; ``join`` lets
            classes meet by name, the first store's first.

    Raises:
        StoreError: the stores contradict one another; what differs is named.
    """

    def __init__(self, stores: Sequence[FeatureStore], label_spaces: LabelSpaces = "same") -> None:
        super().__init__()
        self.stores = tuple(stores)
        self.path, self.views = self.stores[0].path, self.stores[0].views
        for other in self.stores:
            check_views(self.stores[0], other)
        self.modalities = canonical(m for s in self.stores for m in s.modalities)
        self.specs = {m: self._spec(m) for m in self.modalities}
        self.heads = _join_heads(self.stores, label_spaces)
        self.clip_ids, self._clips = _union([s.clip_ids for s in self.stores])
        self.labels = {head: self._labels(head) for head in self.heads}
        self.split = self._names("split")
        self.group = self._names("group")
        self._seconds = {column: self._join_seconds(column) for column in ("start_s", "stop_s")}
        self._owner, self.reasons = self._presence()
        self.present: npt.NDArray[np.bool_] = self.reasons == Reason.PRESENT
        self.digest = _joined_digest(self.stores, label_spaces)

    def seconds(self, column: str) -> npt.NDArray[np.float64]:
        """Return ``start_s`` or ``stop_s`` of each clip [clips]; NaN is the file's end."""
        return self._seconds[column]

    @cached_property
    def clip_digests(self) -> npt.NDArray[np.bytes_]:
        """Digest of all that a training sees of each clip, whatever order the stores came in."""
        parts: list[list[bytes]] = [[] for _ in range(len(self))]
        for store, clips in zip(self.stores, self._clips, strict=True):
            for clip, digest in zip(clips.tolist(), store.clip_digests, strict=True):
                parts[clip].append(digest)
        joined = (hashlib.sha256(b"".join(sorted(part))).hexdigest()[:32] for part in parts)
        return np.array(list(joined), "S32")

    def times_of(self, modality: str, clips: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
        """Return the sampled times of some clips [B, 2, T], NaN where absent."""
        times = np.full((len(clips), 2, self.specs[modality].frames), np.nan)
        for number, store in enumerate(self.stores):
            local = np.full(len(self), -1, np.int64)
            local[self._clips[number]] = np.arange(len(store))
            mine = self._owner[modality][clips] == number
            if mine.any():
                times[mine] = store.times_of(modality, local[clips[mine]])
        return times

    def _spec(self, modality: str) -> ModalitySpec:
        """Return how tokens of a modality look; they must look the same in all stores."""
        having = [s for s in self.stores if modality in s.modalities]
        first = having[0].spec.modalities[modality]
        for other in having[1:]:
            theirs = other.spec.modalities[modality]
            mine, its = (one.model_dump(exclude={"computed"}) for one in (first, theirs))
            for key in mine:
                if mine[key] != its[key]:
                    raise StoreError(
                        f"{having[0].path} and {other.path}: {modality}.{key} differs "
                        f"({mine[key]!r} and {its[key]!r}); only features of the same kind can be "
                        "joined; convert one."
                    )
        return first

    def _labels(self, head: str) -> npt.NDArray[np.int32]:
        """Return the labels of a head in the joined classes, [clips]."""
        number = {name: i for i, name in enumerate(self.heads[head])}

        def renumbered(store: FeatureStore) -> npt.NDArray[np.int32]:
            names = store.heads.get(head, ())
            to = np.array([*(number[name] for name in names), -1], np.int32)
            return to[store.labels[head]] if names else np.full(len(store), -1, np.int32)

        return self._agreed(np.full(len(self), -1, np.int32), -1, renumbered, head)

    def _names(self, column: Literal["split", "group"]) -> npt.NDArray[np.str_]:
        dtype = max(getattr(store, column).dtype for store in self.stores)
        return self._agreed(
            np.full(len(self), "", dtype), "", lambda store: getattr(store, column), column
        )

    def _join_seconds(self, column: str) -> npt.NDArray[np.float64]:
        """Refuse ids that are the same by accident: such clips differ in their times."""
        # Infinity is "not stated yet", for NaN already says "the file's end".
        return self._agreed(
            np.full(len(self), np.inf), np.inf, lambda store: store.seconds(column), column
        )

    def _agreed(
        self, joined: Any, unknown: Any, values: Callable[[FeatureStore], Any], what: str
    ) -> Any:
        """Fill in what the stores know of each clip [clips]; where two know it, it is the same."""
        for store, clips in zip(self.stores, self._clips, strict=True):
            before, theirs = joined[clips], values(store)
            same = (before == theirs) | ((before != before) & (theirs != theirs))  # NaN is itself
            known = theirs != unknown
            self._refuse(
                store,
                clips,
                known & (before != unknown) & ~same,
                f"a different {what} than in the previous stores",
            )
            joined[clips] = np.where(known, theirs, before)
        return joined

    def _presence(self) -> tuple[dict[str, ClipNumbers], npt.NDArray[np.uint8]]:
        """Return which store has each clip (-1 none) per modality, and reasons [clips, M]."""
        owner = {m: np.full(len(self), -1, np.int64) for m in self.modalities}
        reasons = np.full((len(self), len(self.modalities)), Reason.NOT_IN_DATASET, np.uint8)
        for number, (store, clips) in enumerate(zip(self.stores, self._clips, strict=True)):
            for column, m in enumerate(store.modalities):
                mine = self.modalities.index(m)
                here = store.present[:, column]
                twice = here & (owner[m][clips] >= 0)
                self._refuse(store, clips, twice, f"{m}, which a previous store has too")
                owner[m][clips[here]] = number
                lacking = owner[m][clips] < 0
                reasons[clips[here], mine] = Reason.PRESENT
                reasons[clips[lacking], mine] = np.asarray(store.reasons)[lacking, column]
        return owner, reasons

    def _refuse(
        self, store: FeatureStore, clips: ClipNumbers, wrong: npt.NDArray[np.bool_], what: str
    ) -> None:
        if wrong.any():
            ids = ", ".join(i.decode() for i in self.clip_ids[clips[wrong]][:3])
            raise StoreError(
                f"{store.path}: {counted(int(wrong.sum()), 'clip')} with {what}, such as {ids}; "
                "clips with the same id must be identical."
            )

    def _check_is_current(self) -> None:
        for store in self.stores:
            store._check_is_current()

    def locate(self, modality: str) -> ClipLocations:
        """Return where the clips of a modality lie among the files of all stores."""
        arrays = self.specs[modality].arrays
        joined = ClipLocations(
            {a.name: [] for a in arrays},
            np.full(len(self), -1, np.int64),
            np.zeros(len(self), np.int64),
        )
        for store, clips in zip(self.stores, self._clips, strict=True):
            if modality not in store.modalities:
                continue
            locations = store.locate(modality)
            first = len(joined.payloads[arrays[0].name])
            here = locations.file >= 0
            joined.file[clips[here]] = locations.file[here] + first
            joined.position[clips[here]] = locations.position[here]
            for name, payloads in locations.payloads.items():
                joined.payloads[name].extend(payloads)
        return joined


def _joined_digest(stores: Sequence[FeatureStore], label_spaces: LabelSpaces) -> str:
    sha = hashlib.sha256(label_spaces.encode())
    for store in stores:
        sha.update(store.digest.encode())
    return sha.hexdigest()


def _union(
    ids: Sequence[npt.NDArray[np.bytes_]],
) -> tuple[npt.NDArray[np.bytes_], list[ClipNumbers]]:
    """Return all ids without repeats in order of first appearance, and each store's locations."""
    # `np.unique` sorts; the order of first appearance is that of the first indices, and a clip's
    # place is the rank of its first index among them.
    every = np.concatenate(ids)
    _, first, inverse = np.unique(every, return_index=True, return_inverse=True)
    order = np.sort(first)
    rank = np.searchsorted(order, first[inverse])
    ends = np.cumsum([len(i) for i in ids])
    return every[order], np.split(rank.astype(np.int64), ends[:-1])


def _join_heads(
    stores: Sequence[FeatureStore], label_spaces: LabelSpaces
) -> dict[str, tuple[str, ...]]:
    heads: dict[str, tuple[str, ...]] = {}
    for store in stores:
        for head, names in store.heads.items():
            there = heads.setdefault(head, names)
            if there != names and label_spaces == "same":
                raise StoreError(
                    f"{stores[0].path} and {store.path}: head {head!r}: {_differ(there, names)}; "
                    "set loader.label_spaces=join to match classes by name."
                )
            heads[head] = there + tuple(n for n in names if n not in set(there))
    return heads


def _differ(one: tuple[str, ...], other: tuple[str, ...]) -> str:
    parts = []
    for which, names in (
        ("first", sorted(set(one) - set(other))),
        ("second", sorted(set(other) - set(one))),
    ):
        if names:
            more = ", ..." if len(names) > 5 else ""
            parts.append(f"only the {which} has {', '.join(map(repr, names[:5]))}{more}")
    return " and ".join(parts) or "the same classes in another order"


def open_joined(paths: Sequence[Path], label_spaces: LabelSpaces = "same") -> TokenSource:
    """Open one store, or several as one."""
    stores = [FeatureStore.open(path) for path in paths]
    return stores[0] if len(stores) == 1 else JoinedStore(stores, label_spaces)


def joined_digests(source: TokenSource) -> tuple[str, ...]:
    """Return the digests of the stores that a source is a union of, in order; () of one store."""
    mapped = getattr(source, "source", source)  # tokens may lie on a device
    return tuple(s.digest for s in mapped.stores) if isinstance(mapped, JoinedStore) else ()


#: Orders that are tried where none is recorded: all those of 7 stores, in under a second.
_MOST_ORDERS = 20_000


def find_joined(
    stores: Sequence[FeatureStore], digest: str, parts: Sequence[str] = ()
) -> TokenSource | None:
    """Return what has a digest: one of the stores, or several as one, given in whatever order.

    Args:
        stores: what there is.
        digest: of the store, or of several as one, that is looked for.
        parts: digests of the stores of which it is made, in order. Models of earlier versions do
            not record them: their stores are tried in every order up to seven, more of them in the
            order given and then in some others.
    """
    by_digest = {store.digest: store for store in stores}
    if digest in by_digest:
        return by_digest[digest]
    orders: Iterable[tuple[FeatureStore, ...]]
    if parts:
        known = all(part in by_digest for part in parts)
        orders = [tuple(by_digest[part] for part in parts)] if known else []
    else:
        sizes = range(len(stores), 1, -1)
        given = chain.from_iterable(combinations(stores, size) for size in sizes)
        others = chain.from_iterable(permutations(stores, size) for size in sizes)
        orders = islice(chain(given, others), _MOST_ORDERS)
    for chosen in orders:
        for label_spaces in get_args(LabelSpaces):
            if _joined_digest(chosen, label_spaces) == digest:
                return JoinedStore(chosen, label_spaces)
    return None
