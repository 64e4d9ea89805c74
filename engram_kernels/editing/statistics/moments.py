"""The covariances of layers' keys: from memory, from the cache on disk, or from one pass over a corpus."""

from __future__ import annotations

import hashlib
import os
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import torch

from ... import _checks as check
from ..._hashing import tensor_bytes
from ..._progress import Progress
from ..._ranks import ALONE, Ranks
from ...covariance import Covariance
from ...errors import EngramError
from ...hf.fingerprints import states_fingerprint
from ...hf.loading import writable_directory
from ...hf.projection import Projection, output_projection, searched_projection
from ...hf.tokens import check_known
from . import corpus as corpora
from . import statistics

TOKENS_PER_DIMENSION = 20
CHECKPOINT_SECONDS = 30.0


class Moments:
    """The second moments of a model's keys, and the covariances made of them.

    A layer's moment is that of the model without the edits that this process made below it, if it is in
    memory or on disk, as ROME's and MEMIT's code takes those of the unedited model. Else it is of the model
    as it is.

    One pass over the corpus, up to the deepest layer, computes what several layers lack. Now and then it
    writes its sums (8 `in`² bytes a layer) to the cache: a pass that was cut off goes on from there, to the
    same bits.

    Args:
        model: a Hugging Face causal language model.
        tokenizer: its tokenizer.
        corpus: a file, an iterable of strings, or one of mappings with a column `text`, endless or not; None:
            the Wikipedia articles in the package `gensim`, else text sampled from the model.
        cache: the folder under which moments are kept.
        tokens: how many tokens of the corpus are used; None: twenty a dimension of the key.
        ridge: added to each covariance, as a share of its mean diagonal.
        seed: of the sampled text.
        progress: called with "statistics", the tokens seen and their number.
        checkpoint_seconds: between two writes of the running sums.
        ranks: each sees its part of the corpus; the first one's cache counts.

    Example:
        >>> moments = Moments(*load_model("smollm2"), None, Path("cache"))
        >>> moments.covariances([4, 5, 6])[6].solve(keys)
    """

    def __init__(
        self,
        model: torch.nn.Module,
        tokenizer,
        corpus: str | os.PathLike | Iterable[str | Mapping] | None,
        cache: Path,
        *,
        tokens: int | None = None,
        ridge: float = 0.0,
        seed: int = 0,
        progress: Progress | None = None,
        checkpoint_seconds: float = CHECKPOINT_SECONDS,
        ranks: Ranks = ALONE,
    ):
        self.model = model
        self.tokenizer = tokenizer
        self.corpus = corpus
        self.folder = Path(cache) / "moments"
        self.tokens = tokens
        self.ridge = ridge
        self.seed = seed
        self.progress = progress
        self.checkpoint_seconds = checkpoint_seconds
        self.ranks = ranks
        self._stream: corpora.TokenStream | None = None
        # By their number, the tokens and what tells them from others.
        self._sources: dict[int, tuple[torch.Tensor | None, str]] = {}
        # By layer: the name of its moment (`_names`), and what it gave.
        self._computed: dict[int, tuple[str, Covariance]] = {}
        self._given: dict[int, Covariance] = {}

    def covariances(self, layers: Sequence[int], anew: bool = True) -> dict[int, Covariance]:
        """The covariance of each layer, on its device; the model is in evaluation mode.

        Args:
            layers: by index.
            anew: compute again what the cache holds in a spoilt file.

        Raises:
            TypeError: `layers` is no sequence of integers.
            ValueError: a layer is out of range.
            EngramError: a layer cannot be edited, the corpus is empty, too small for the dimension of the
                key or cannot be read, the inputs of a layer are not finite, or a file of the cache is spoilt
                and `anew` False.
        """
        if not isinstance(layers, Iterable) or isinstance(layers, str):
            raise TypeError(f"layers: expected a sequence of integers, got {type(layers).__name__}")
        projections = {layer: searched_projection(self.model, layer) for layer in layers}
        groups: dict[int, list[Projection]] = {}
        for layer, projection in projections.items():
            if layer not in self._given:
                count = self.tokens or TOKENS_PER_DIMENSION * projection.matrix.shape[1]
                groups.setdefault(count, []).append(projection)
        for count, group in groups.items():
            ids, source = self._source(count)
            names = {projection.layer: self._names(projection, source) for projection in group}
            self.ranks.check_same("model", names)
            known = self.ranks.everyone.each(
                lambda: {layer: name for layer, (name, _) in self._computed.items()}
            )
            missing = [
                one for one in group if any(has.get(one.layer) not in names[one.layer] for has in known)
            ]
            for layer, name, moment, seen in self._moments(missing, names, ids, count, anew):
                covariance = Covariance.from_second_moment(moment, seen, self.ridge, overwrite=True)
                self._computed[layer] = name, covariance
        return {
            layer: self._placed(projection) if layer in self._given else self._computed[layer][1]
            for layer, projection in projections.items()
        }

    def use(self, layer: int, covariance: Covariance | None) -> None:
        """Take a covariance made elsewhere for a layer, whatever its weights become; None: no longer.

        Raises:
            TypeError: `covariance` is none, or `layer` no integer.
            ValueError: its dimension is not the key's, or `layer` is out of range.
            EngramError: the layer cannot be edited.
        """
        width = output_projection(self.model, layer).matrix.shape[1]
        if covariance is None:
            self._given.pop(layer, None)
            return
        if not isinstance(covariance, Covariance):
            raise TypeError(f"covariance: expected a Covariance or None, got {type(covariance).__name__}")
        expected, got = [width, width], list(covariance.inverse().shape)
        check.expect(got == expected, "covariance", f"shape {expected} for layer {layer}", got)
        self._given[layer] = covariance

    def _placed(self, projection: Projection) -> Covariance:
        """The covariance given for a layer, on the layer's device."""
        given = self._given[projection.layer]
        if given.inverse().device != projection.matrix.device:
            given = self._given[projection.layer] = given.to(projection.matrix.device)
        return given

    def _moments(
        self,
        projections: list[Projection],
        names: dict[int, tuple[str, str]],
        ids: torch.Tensor | None,
        count: int,
        anew: bool,
    ) -> Iterator[tuple[int, str, torch.Tensor, int]]:
        """`(layer, name, moment, number of tokens)` of each: what is on disk first, then the rest."""
        missing = []
        for projection in projections:
            for name in dict.fromkeys(names[projection.layer]):
                cached = self._cached(self._file(name), projection, anew)
                if cached is not None:
                    yield projection.layer, name, *cached
                    break
            else:
                missing.append(projection)
        if not missing:
            return
        self.ranks.own(lambda: writable_directory(self.folder, "cache_dir"))
        # Named for all that were asked for: some may be finished when the next run comes.
        own = {projection.layer: names[projection.layer][1] for projection in projections}
        named = sorted(own.values())
        # Of several ranks each keeps the sums of its own part.
        part = [f"{self.ranks.rank}/{self.ranks.size}"] if self.ranks.size > 1 else []
        joint = hashlib.sha256(" ".join([*named, str(statistics.BATCH), *part]).encode())
        checkpoint = statistics.Checkpoint(
            self.folder / f"{joint.hexdigest()[:32]}{statistics.PARTIAL}", self.checkpoint_seconds
        )
        sums, seen = self.ranks.own(lambda: self._pass(missing, ids, count, checkpoint))
        for moment in sums.values():
            self.ranks.sum_(moment)
        files = {layer: self._file(own[layer]) for layer in sums}
        self.ranks.decided(lambda: self._save(files, sums, seen))
        checkpoint.remove()
        for projection in missing:
            yield projection.layer, own[projection.layer], sums.pop(projection.layer), seen

    def _cached(self, path: Path, projection: Projection, anew: bool) -> tuple[torch.Tensor, int] | None:
        """What the first rank has on disk, on all of them."""
        ranks = self.ranks.everyone
        loaded = statistics.load_moment(path, anew) if ranks.rank == 0 else None
        count = ranks.decided(lambda: None if loaded is None else loaded[1])
        if count is None:
            return None
        if loaded is None:
            matrix = projection.matrix
            moment = torch.empty((matrix.shape[1],) * 2, dtype=torch.float64, device=matrix.device)
        else:
            moment = loaded[0].to(projection.matrix.device)
        return ranks.broadcast_(moment), count

    def _save(self, files: Mapping[int, Path], sums: Mapping[int, torch.Tensor], seen: int) -> None:
        try:
            for layer, moment in sums.items():
                statistics.save_moment(files[layer], moment, seen)
        except OSError as error:
            raise EngramError(
                f"cache_dir: expected room for the statistics in {str(self.folder)!r}, got none "
                f"({error.strerror})"
            ) from error

    def _pass(
        self,
        projections: list[Projection],
        ids: torch.Tensor | None,
        count: int,
        checkpoint: statistics.Checkpoint,
    ) -> tuple[dict[int, torch.Tensor], int]:
        """The sums by layer and their number of tokens, from where an earlier pass was cut off."""
        begun = checkpoint.load(projections)
        # Ranks that divide the model go on from one place.
        places = self.ranks.mirror.each(lambda: begun and begun[1])
        if begun is not None and len(set(places)) == 1:
            sums, seen, ids = begun
        else:
            sums, seen = statistics.zeros(projections), 0
            ids = corpora.sample_ids(self.model, self.tokenizer, count, self.seed) if ids is None else ids

        def after(stage: str, done: int, total: int) -> None:
            if done < total:
                checkpoint.save_when_due(sums, done, ids)
            if self.progress:
                self.progress(stage, done, total)

        sums = statistics.second_moments(self.model, projections, ids, after, sums, seen, self.ranks)
        return sums, len(ids)

    def _source(self, count: int) -> tuple[torch.Tensor | None, str]:
        """The tokens, or None where they are to be sampled, and what tells them from others."""
        corpus = self.corpus if self.corpus is not None else corpora.wikipedia_file()
        if corpus is None:
            return None, f"sampled {count} {self.seed}"
        if count not in self._sources:
            if self._stream is None:
                self._stream = corpora.TokenStream(self.tokenizer, corpus)
            ids = self._stream.first(count)
            check_known(self.model, [int(ids.max())], "the corpus")
            if self.tokens is not None and len(ids) < count:
                warnings.warn(f"corpus: expected {count} tokens, got {len(ids)}", stacklevel=5)
            self._sources[count] = ids, hashlib.sha256(tensor_bytes(ids)).hexdigest()
        return self._sources[count]

    def _file(self, name: str) -> Path:
        return self.folder / f"{name}.safetensors"

    def _names(self, projection: Projection, source: str) -> tuple[str, str]:
        """Of a moment without this process's edits, and with them: what it depends on, digested."""
        states = (states_fingerprint(self.model, projection, unedited) for unedited in (True, False))
        texts = (f"{state} {projection.name} {source} {statistics.CHUNK}" for state in states)
        without, within = (hashlib.sha256(text.encode()).hexdigest()[:32] for text in texts)
        return without, within
