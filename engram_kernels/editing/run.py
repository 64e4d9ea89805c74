"""One run of edits: batches of values, found and written one after the other."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace

import torch
from torch import Tensor

from .._hashing import digest, weights_checksums
from .._progress import Progress
from ..covariance import Covariance
from ..errors import EngramError
from ..hf.layers import adapter_settings
from ..hf.projection import output_projection
from .batching import EncodedEdit, encode_edit
from .edit import Edit
from .journal import Journal
from .methods import Method
from .preconditioner import LayerOperator
from .records import EditedModule, EditRecord, SkippedEdit, Write
from .result import EditResult
from .values import Value, ValueOptions, find_values, target_log_probabilities, value_groups
from .weights import Snapshot, matrix_checksum
from .writing import write_values


@dataclass(frozen=True)
class Plan:
    """The settings of a run; `Editor.edit` has their meaning."""

    layers: tuple[int, ...]
    method: Method
    last_wins: bool
    skip_failures: bool
    value: ValueOptions
    bare_prompt_weight: float | None
    bare_denominator: bool


class Run:
    """Edits on their way into a model in evaluation mode.

    Args:
        model: a causal language model.
        tokenizer: its tokenizer.
        edits: the facts.
        plan: how to write them.
        progress: called with the name of a stage, the work done and the work there is.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        tokenizer,
        edits: Sequence[Edit],
        plan: Plan,
        progress: Progress | None = None,
    ):
        self.model, self.tokenizer, self.edits, self.plan = model, tokenizer, list(edits), plan
        self.progress = progress or (lambda *_: None)
        self.projections = [output_projection(model, layer) for layer in plan.layers]
        self.skipped: list[SkippedEdit] = []
        # By the number of an edit; those that are skipped leave.
        self.encoded: dict[int, EncodedEdit] = {}
        self.batches: list[list[int]] = []

    def begin(self) -> None:
        """Tokenise all edits by themselves, and see what the unedited model predicts.

        Raises:
            EngramError: a text cannot be used, or the model predicts NaN.
        """
        self._encode(range(len(self.edits)), ())
        self._before = self._log_probabilities(self.encoded)

    def encode(self, prefixes: Sequence[str]) -> None:
        """Tokenise all edits after every prefix, and divide them into batches.

        Raises:
            EngramError: a text cannot be used, or edits of a batch have one key.
        """
        self._prefixes = list(prefixes)
        self._weights = _context_weights(len(prefixes), self.plan.bare_prompt_weight)
        self._encode(list(self.encoded), prefixes)
        numbers = list(self.encoded)
        size = self.plan.method.batch or max(1, len(numbers))
        self.batches = [self._apart(numbers[i : i + size]) for i in range(0, len(numbers), size)]

    def settings(self, covariances: dict[int, Covariance]) -> dict:
        """What the result depends on, for the journal."""
        # Not all bits of them, which depend on the number of threads that inverted them.
        traces = [covariances[layer].inverse().trace().item() for layer in self.plan.layers]
        settings = asdict(self.plan)
        return {
            **settings.pop("method"),
            "preserve": repr(self.plan.method.held),  # which may be infinite
            **settings,
            "edits": digest([asdict(edit) for edit in self.edits]),
            "prefixes": digest(self._prefixes),
            "model": digest(weights_checksums(self.model), *adapter_settings(self.model)),
            "covariances": [f"{trace:.6e}" for trace in traces],
        }

    def result(self, covariances: dict[int, Covariance], journal: Journal | None) -> EditResult:
        """Find and write everything; if anything fails, the weights are put back."""
        method = self.plan.method
        operators = {layer: LayerOperator(method, covariances[layer]) for layer in self.plan.layers}
        edited = [EditedModule.of(projection) for projection in self.projections]
        originals = {projection.name: Snapshot(projection) for projection in self.projections}
        values: dict[int, Value] = {}
        writes: list[Write] = []
        try:
            for number, batch in enumerate(self.batches):
                found = self._values(batch, len(values), journal)
                written = self._written(number, found, operators, journal)
                if written and number + 1 < len(self.batches):
                    for layer, write in zip(self.plan.layers, written, strict=True):
                        operators[layer].remember(write.keys)
                values |= found
                writes += written
            self._check_any()
            after = self._log_probabilities(values)
            for module, projection in zip(edited, self.projections, strict=True):
                module.edited_checksum = matrix_checksum(projection)
            made = sorted(values)
            places = {number: place for place, number in enumerate(made)}
            return EditResult(
                records=[_record(self.edits[i], values[i], self._before[i], after[i]) for i in made],
                writes=[replace(write, edits=tuple(places[i] for i in write.edits)) for write in writes],
                edited_modules=edited,
                skipped=sorted(self.skipped, key=lambda skipped: skipped.number),
                _originals=originals,
            )
        except BaseException:
            for original in originals.values():
                original.restore()
            raise

    def _encode(self, numbers: Iterable[int], prefixes: Sequence[str]) -> None:
        for number in numbers:
            try:
                self.encoded[number] = encode_edit(self.model, self.tokenizer, self.edits[number], prefixes)
            except EngramError as error:
                self._skip(number, error)
        self._check_any()

    def _log_probabilities(self, numbers: Iterable[int]) -> dict[int, float]:
        """`log p(target | prompt)` of some edits, by number."""
        numbers = list(numbers)
        encoded = [self.encoded[number] for number in numbers]
        return dict(zip(numbers, target_log_probabilities(self.model, encoded), strict=True))

    def _values(self, batch: list[int], done: int, journal: Journal | None) -> dict[int, Value]:
        """The values of a batch by number, in the order of the batch; `done`: how many were found before."""
        encoded, device = [self.encoded[i] for i in batch], self.model.get_input_embeddings().weight.device
        found: dict[int, Value] = {}
        for group in value_groups(encoded, self.plan.value, device):
            found |= self._group([batch[i] for i in group], done + len(found), journal)
        return {number: found[number] for number in batch if number in found}

    def _group(self, numbers: list[int], done: int, journal: Journal | None) -> dict[int, Value]:
        """The values of edits that are optimised side by side; those without one are skipped."""
        projection, options = self.projections[-1], self.plan.value

        def progress(stage: str, steps: int, _total: int) -> None:
            self.progress(stage, done * options.steps + steps, len(self.encoded) * options.steps)

        kept = [journal.load_value(number, projection.matrix.device) for number in numbers] if journal else []
        values: list[Value | EngramError] = [value for value in kept if value is not None]
        if len(values) < len(numbers):
            encoded = [self.encoded[i] for i in numbers]
            values = find_values(self.model, projection, encoded, self._weights, options, progress)
        found = {}
        for number, value in zip(numbers, values, strict=True):
            if isinstance(value, EngramError):
                self._skip(number, value)
                continue
            if journal:
                journal.save_value(number, value)
            found[number] = value
        return found

    def _written(
        self,
        number: int,
        found: dict[int, Value],
        operators: dict[int, LayerOperator],
        journal: Journal | None,
    ) -> list[Write]:
        """The writes of a batch, one a layer; they are done. An edit whose write fails leaves `found`."""
        kept = journal.load_writes(number) if journal else None
        if kept is not None:
            for projection, write in zip(self.projections, kept, strict=True):
                write.apply_(projection)
            return kept
        if not found:
            return []
        alone = len(found) == 1 and self.plan.skip_failures
        originals = list(map(Snapshot, self.projections)) if alone else []
        try:
            writes = write_values(
                self.model, self.projections, [self.encoded[i] for i in found], list(found.values()),
                operators, self._weights, list(found), self.plan.bare_denominator,
            )  # fmt: skip
        except EngramError as error:
            if not alone:
                raise
            for original in originals:
                original.restore()
            ((failed, _),) = found.items()
            found.clear()
            self._skip(failed, error)
            return []
        if journal:
            journal.save_writes(number, writes)
        return writes

    def _apart(self, batch: list[int]) -> list[int]:
        """The edits of a batch whose keys differ.

        Texts that agree up to the end of the subject have the same key, which cannot have two values. The
        tokens are compared, and not the keys: rounding makes these differ a little, and the write huge.
        """
        owners: dict[tuple[int, ...], int] = {}
        for number in batch:
            row = self.encoded[number].rewriting[0]
            key = tuple(row.ids[: row.subject + 1])
            if key in owners:
                first, second = self.edits[owners[key]], self.edits[number]
                if not self.plan.last_wins:
                    raise EngramError(
                        "edits: expected texts that differ up to the end of the subject where they are "
                        f"written at once, got {first.text!r} and {second.text!r} with the subjects "
                        f"{first.subject!r} and {second.subject!r}"
                    )
                self._skip(
                    owners[key], EngramError(f"its key is that of a later edit, {second.text!r}"), True
                )
            owners[key] = number
        return sorted(owners.values())

    def _skip(self, number: int, error: EngramError, always: bool = False) -> None:
        if not (always or self.plan.skip_failures):
            raise error
        self.skipped.append(SkippedEdit(number, self.edits[number], str(error)))
        self.encoded.pop(number, None)

    def _check_any(self) -> None:
        if not self.encoded:
            raise EngramError(
                f"edits: expected at least one that can be made, got {len(self.skipped)} that cannot; "
                f"the first: {self.skipped[0].reason}"
            )


def _record(edit: Edit, value: Value, before: float, after: float) -> EditRecord:
    return EditRecord(
        edit=edit,
        probability_before=math.exp(before),
        probability_after=math.exp(after),
        losses=value.losses,
        key_norm=value.key.norm().item(),
        value_norm=value.initial_norm,
        change_norm=value.change.norm().item(),
    )


def _context_weights(prefixes: int, bare: float | None) -> Tensor:
    """`[1 + prefixes]`, the weights of the bare prompt and of each prefixed one in a key."""
    if bare is None or prefixes == 0:
        return torch.full((prefixes + 1,), 1.0 / (prefixes + 1), dtype=torch.float32)
    return torch.tensor([bare] + [(1 - bare) / prefixes] * prefixes, dtype=torch.float32)
