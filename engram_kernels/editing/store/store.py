"""A store of edits that lives: added to over months and processes, each edit taken out again when asked."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ... import _checks as check
from ..._hashing import digest
from ...errors import EngramError, naming
from ...hf.fingerprints import weights_checksums
from ..edit import Edit
from ..editor import Editor
from ..health import Health
from ..methods import Method, check_values, method_of
from ..saving.result import EditResult
from ..writing.records import EditRecord
from .joint import joint_writes
from .store_folder import StoreFolder, method_from, method_plain

if TYPE_CHECKING:
    from ...hf.tokens import Tokenizer

# Of the editor, on which the values depend.
_SETTINGS = ("contexts", "bare_prompt_weight", "consistent_key", "ridge", "value", "seed", "tokens")


@dataclass(frozen=True)
class StoredEdit:
    """An edit of a store.

    Attributes:
        id: its number, which no other edit of the store ever has.
        record: the fact, and what the edit did when it was made.
    """

    id: int
    record: EditRecord

    @property
    def edit(self) -> Edit:
        """The fact."""
        return self.record.edit


class EditStore:
    """Edits of one base model in a folder, which a process adds to, and others later.

    Each edit is found in the model as edited so far, and holds the keys of those before it, as if all had
    been asked for in one call: where edits are made one by one, sixty calls of one give the weights of one
    call of sixty, bit for bit. The statistics are the base model's, read once. The folder is whole at any
    time, whatever is killed, and a lock keeps a second writer waiting.

    | in the folder | is |
    |---|---|
    | `store.json` | the base model's digest, the method, and which folders hold which edits |
    | `edits/` | saved edits, a folder a call, in the order of their writes |
    | `statistics/` | the base model's second moments, a file a layer |
    | `pending/` | the run of a call that was cut off: the same call goes on from there |

    Used as a context manager it puts the model back at the end of the block.

    Args:
        directory: of the store, or a new one.
        model: the base model, without edits; the store's are applied to it. None: to list and export alone.
        tokenizer: its tokenizer.
        method: of a new store, a name: that method one edit at a time, each of which holds the earlier ones
            (one by gradients: in its batches); or settings, which are taken as they are. None: the store's
            own, of a new one `"engram"`.
        layers: which are written, of a new store; None: by the method.
        values: of a new store, how answers are found, as for `Editor.edit`; None: by the method.
        timeout: seconds to wait for another writer.
        options: of the `Editor`, the same at every call.

    Raises:
        EngramError: the folder holds something else, cannot be written, or is another model's.
        TypeError, ValueError: an argument is of the wrong kind or out of range.

    Example:
        >>> with EditStore("facts", *load_model("smollm2")) as store:
        ...     store.add(Edit("The Eiffel Tower", "{} is located in the city of", "Rome"))
        ...     print(store)
        ...     store.remove(1)
    """

    def __init__(
        self,
        directory: str | os.PathLike,
        model: torch.nn.Module | None = None,
        tokenizer: Tokenizer | None = None,
        *,
        method: str | Method | None = None,
        layers: int | Sequence[int] | None = None,
        values: str | None = None,
        timeout: float = 60.0,
        **options: Any,
    ):
        check.number("timeout", timeout, at_least=0)
        given = (model is None) == (tokenizer is None)
        check.expect(given, "tokenizer", "one with a model, and none without", "one of them")
        if model is None and not (Path(directory) / "store.json").exists():
            raise EngramError(f"directory: expected a store, or a model to begin one, got {str(directory)!r}")
        self.model = model
        self._editor: Editor | None = None
        self._applied: list[EditResult] = []
        # The entries that are applied.
        self._seen: list[dict] = []
        self._folder = StoreFolder(Path(directory), timeout)
        with self._folder.locked():
            if model is not None:
                self._open(model, tokenizer, method, layers, values, options)

    def _open(self, model, tokenizer, method, layers, values, options) -> None:
        """Bind the model, which must be the base, and bring it to where the store is."""
        folder = self._folder
        # The editor's cache is a folder of the store.
        with naming("directory", "cache_dir"):
            editor = Editor(model, tokenizer, cache_dir=folder.path / "statistics", **options)
        base = digest(weights_checksums(model))
        settings = {name: repr(getattr(editor, name)) for name in _SETTINGS}
        check_values(values)
        if folder.manifest is None:
            chosen = stored_method("engram" if method is None else method)
            chosen = replace(chosen, values=values or chosen.values)
            layers = editor.layers(chosen) if layers is None else layers
            layers = [layers] if isinstance(layers, int) else list(layers)
            folder.begin(base=base, method=method_plain(chosen), layers=layers, editor=settings)
        elif folder.manifest["base"] != base:
            raise EngramError(
                f"model: expected the one of {str(folder.path)!r}, without edits, got other weights"
            )
        else:
            asked = self.method if method is None else stored_method(method)
            asked = replace(asked, values=values or asked.values)
            if asked != self.method:
                name = "method" if values in (None, self.method.values) else "values"
                raise EngramError(f"{name}: expected the store's, {self.method}, or None, got {asked}")
        for name, value in folder.manifest["editor"].items():
            if settings.get(name) != value:
                raise EngramError(f"{name}: expected the store's, {value}, got {settings.get(name)}")
        # Of the unedited model, before anything is applied to it.
        editor.prefixes()
        with naming("directory", "cache_dir"):
            covariances = editor.covariances(self.layers, anew=False)
        for layer, covariance in covariances.items():
            editor.use_covariance(layer, covariance)
        self._editor = editor
        self._sync()

    # -- what it holds ---------------------------------------------------------------------------------------

    @property
    def directory(self) -> Path:
        """Its folder."""
        return self._folder.path

    @property
    def method(self) -> Method:
        """The settings of its writes."""
        return method_from(self._folder.manifest["method"])

    @property
    def layers(self) -> tuple[int, ...]:
        """The layers that are written."""
        return tuple(self._folder.manifest["layers"])

    def __len__(self) -> int:
        return len(self._folder.ids)

    def __iter__(self) -> Iterator[StoredEdit]:
        records = [record for result in self._results() for record in result.records]
        return map(StoredEdit, self._folder.ids, records)

    def __getitem__(self, id: int) -> StoredEdit:
        """The edit of that number.

        Raises:
            KeyError: there is none.
        """
        for stored in self:
            if stored.id == id:
                return stored
        raise KeyError(id)

    def __repr__(self) -> str:
        applied = bool(self._applied)
        return (
            f"EditStore({str(self.directory)!r}, edits={len(self)}, layers={self.layers}, applied={applied})"
        )

    def _results(self) -> list[EditResult]:
        """What the folder holds now, an `EditResult` an entry."""
        with self._folder.locked():
            return list(map(self._folder.load, self._folder.entries))

    @property
    def health(self) -> list[Health]:
        """How the model fared after each batch that a call has made, the oldest first."""
        return [health for result in self._results() for health in result.health]

    def result(self) -> EditResult | None:
        """All edits as one `EditResult` that is not applied; None where there are no edits."""
        results = self._results()
        return EditResult.merge(results) if results else None

    def export(self, directory: str | os.PathLike, rank: int | None = None) -> dict[str, float]:
        """Write all edits as one folder: a LoRA adapter, and what `EditResult.from_pretrained` needs.

        Args:
            directory: a new or empty one.
            rank: for serving: an adapter alone, of at most that rank a matrix; None: every edit as it is.

        Returns:
            By module, which share of what answers to the edits' keys change by is lost, as Frobenius norms.

        Raises:
            TypeError, ValueError: `rank` is no positive integer.
            EngramError: there are no edits, or the directory is not empty or cannot be written.
        """
        result = self.result()
        if result is None:
            raise EngramError(f"directory: expected a store with edits, got {str(self.directory)!r} without")
        if rank is not None:
            return result.save_adapter(directory, rank)
        result.save_pretrained(directory)
        return dict.fromkeys(result.modules, 0.0)

    def verify(self) -> int:
        """Read everything, and with a model rebuild it from the base and compare every bit.

        Returns:
            The number of edits.

        Raises:
            EngramError: something is missing, spoilt, or comes out otherwise.
        """
        with self._folder.locked():
            self._folder.check_statistics()
            results = self._results()
            if self._editor is not None and results:
                self.revert()
                self._sync()
                last = {edited.module: edited for result in results for edited in result.edited_modules}
                for edited in self._applied[-1].edited_modules:
                    if edited.edited_checksum != last[edited.module].edited_checksum:
                        raise EngramError(
                            f"model: expected {edited.module!r} as the edits left it, got other bits"
                        )
            return len(self)

    # -- what changes it -------------------------------------------------------------------------------------

    def add(self, edits: Edit | Iterable[Edit], **options: Any) -> list[StoredEdit]:
        """Make edits in the model as edited so far, and keep them.

        Args:
            edits: the facts.
            options: `conflicts`, `failures` and `stop_on` of `Editor.edit`.

        Returns:
            The edits that were made; they stand in the model now.

        Raises:
            EngramError: the store has no model, another writer holds it, or as `Editor.edit` says; nothing is
                changed then.
        """
        edits = [edits] if isinstance(edits, Edit) else list(edits)
        with self._writing() as folder:
            asked = digest([asdict(edit) for edit in edits], folder.entries, options)[:16]
            after = EditResult.merge(self._applied) if self._applied else None
            result = self._editor.edit(
                edits,
                self.layers,
                self.method,
                directory=folder.path / "pending" / asked,
                after=after,
                **options,
            )
            first = folder.manifest["next"]
            ids = list(range(first, first + len(result)))
            try:
                folder.keep(folder.entries, ids, result)
            except BaseException:
                result.revert()
                raise
            self._applied.append(result)
            self._seen = folder.entries
        return list(map(StoredEdit, ids, result.records))

    def remove(self, id: int) -> None:
        """Take one edit out, and write the others anew.

        Where the method weighs earlier keys by 1/λ, as the store's own does, all edits together are the ridge
        solution of one least-squares problem, and what is written is that of the others, as if the edit had
        never been made: only the values of later ones were found with it in place. Else its own write is left
        out, as `EditResult.remove` does.

        Args:
            id: of the edit.

        Raises:
            ValueError: there is no such edit.
            EngramError: the store has no model, or another writer holds it; nothing is changed then.
        """
        with self._writing() as folder:
            ids = folder.ids
            check.expect(id in ids, "id", "that of an edit of the store", repr(id))
            if len(ids) == 1:
                self._become(None, [])
                return
            whole = EditResult.merge(self._applied)
            self._take_out(whole, ids.index(id))
            self._become(whole, [number for number in ids if number != id])

    def compact(self) -> None:
        """Put all edits into one folder; their writes, and so the weights, stay the same.

        Raises:
            EngramError: the store has no model, or another writer holds it.
        """
        with self._writing() as folder:
            if len(folder.entries) > 1:
                self._become(EditResult.merge(self._applied), folder.ids)

    def revert(self) -> None:
        """Put the model back to the base, bit for bit; the store keeps its edits."""
        while self._applied:
            self._applied.pop().revert()
        self._seen = []

    def __enter__(self) -> EditStore:
        return self

    def __exit__(self, *_exception: object) -> None:
        self.revert()

    # -- the model -------------------------------------------------------------------------------------------

    @contextmanager
    def _writing(self) -> Iterator[StoreFolder]:
        """Hold the lock, with the model as the folder says now."""
        if self._editor is None:
            raise EngramError("model: expected the base model to edit, got none: open the store with it")
        with self._folder.locked():
            self._sync()
            yield self._folder

    def _sync(self) -> None:
        """Bring the model to what the folder holds."""
        if self._seen != self._folder.entries:
            self.revert()
            self._apply(map(self._folder.load, self._folder.entries))
            self._seen = self._folder.entries

    def _apply(self, results: Iterable[EditResult]) -> None:
        for result in results:
            self._applied.append(result.apply(self.model))

    def _become(self, whole: EditResult | None, ids: list[int]) -> None:
        """Put one result in the place of all, in the model and in the folder."""
        previous = list(self._applied)
        self.revert()
        try:
            self._apply([] if whole is None else [whole])
            self._folder.keep([], ids, whole)
        except BaseException:
            self.revert()
            self._apply(previous)
            raise
        finally:
            self._seen = self._folder.entries

    def _take_out(self, whole: EditResult, place: int) -> None:
        """Take an edit out of a result that is not applied."""
        method = self.method
        beside = (method.renew, method.neurons, method.suppress, method.ideal)
        if not (method.ridge > 0 and method.held == 1.0 / method.ridge) or any(beside):
            whole.remove(place)
            return
        covariances = self._editor.covariances(self.layers)
        modules = {edited.module: covariances[edited.layer] for edited in whole.edited_modules}
        whole.writes = joint_writes(whole.writes, modules, method, place)
        written = {write.module for write in whole.writes}
        whole.edited_modules = [edited for edited in whole.edited_modules if edited.module in written]
        del whole.records[place]


def stored_method(method: str | Method) -> Method:
    """A method as a store writes it.

    A name whose answers are searched: one edit after the other, each of which holds the earlier ones, so that
    it does not matter which call an edit came by; with a ridge, so that all of them together are the solution
    of one least-squares problem, out of which any can be taken. Gradients are for thousands at a time, and
    keep their batches.

    Raises:
        ValueError: there is no such method.
    """
    chosen = method_of(method)
    if isinstance(method, Method) or chosen.values == "gradient":
        return chosen
    return replace(chosen, batch=1, ridge=chosen.ridge or 1.0, preserve=chosen.preserve or True)
