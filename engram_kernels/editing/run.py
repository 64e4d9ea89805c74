"""One run of edits: batches of values, found and written one after the other."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TypeVar

import torch

from .._hashing import digest, tensor_checksum
from .._progress import Progress
from .._ranks import ALONE, Ranks
from ..covariance import Covariance
from ..errors import EngramError
from ..hf.fingerprints import note_edited, weights_checksums
from ..hf.layers import adapter_settings
from ..hf.placement import input_device
from ..hf.projection import searched_projection
from ..hf.tokens import Row
from .edit import Edit
from .health import Health, HealthCheck, spread, warn
from .methods import Method
from .reach import Reached, reached
from .saving.history import facts_in, note, standing
from .saving.journal import Journal
from .saving.result import SHOWN, EditResult
from .search.batching import EncodedEdit, encode_edit, encode_held, other_rows
from .search.gradients import Stream
from .search.room import edits_that_fit, out_of_memory
from .search.values import Value, ValueOptions, find_values, value_groups
from .writing.gradient_writes import write_gradients
from .writing.keys import MeanKey, SpreadKey
from .writing.preconditioner import LayerOperator
from .writing.records import EditedModule, EditRecord, SkippedEdit, Write
from .writing.weights import Snapshot, matrix_checksum
from .writing.writing import write_values

T = TypeVar("T")


@dataclass(frozen=True)
class Plan:
    """The settings of a run; `Editor.edit` has their meaning."""

    layers: tuple[int, ...]
    method: Method
    last_wins: bool
    skip_failures: bool
    value: ValueOptions
    key: MeanKey | SpreadKey
    texts: int | None
    forms: bool
    shorten: bool
    bare_denominator: bool
    stop_on: dict[str, float]


class Run:
    """Edits on their way into a model in evaluation mode.

    Args:
        model: a causal language model.
        tokenizer: its tokenizer.
        edits: the facts.
        plan: how to write them.
        progress: called with the name of a stage, the work done and the work there is.
        ranks: share the values, and make the same writes.
        after: what stands in the model already, whose keys the method holds.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        tokenizer,
        edits: Sequence[Edit],
        plan: Plan,
        progress: Progress | None = None,
        ranks: Ranks = ALONE,
        after: EditResult | None = None,
    ):
        self.ranks = ranks
        self.model, self.tokenizer, self.edits, self.plan = model, tokenizer, list(edits), plan
        self.after = EditResult([], [], []) if after is None else after
        self.progress = progress or (lambda *_: None)
        self.projections = [searched_projection(model, layer) for layer in plan.layers]
        self.skipped: list[SkippedEdit] = []
        # By the number of an edit; those that are skipped leave.
        self.encoded: dict[int, EncodedEdit] = {}
        self.batches: list[list[int]] = []
        # What the model said about an edit's subject before its write, by the number of the edit.
        self._said: dict[int, list[Edit]] = {}

    def begin(self) -> None:
        """Tokenise all edits by themselves, and see what the unedited model predicts.

        Raises:
            EngramError: a text cannot be used, or the model predicts NaN.
        """
        plan = repr(self.plan)
        self.ranks.check_same("edits", digest(plan, [asdict(edit) for edit in self.edits]))
        self.ranks.check_same("model", [matrix_checksum(projection) for projection in self.projections])
        asked: dict[Edit, int] = {}
        for number, edit in enumerate(self.edits):
            other = asked.pop(edit, number)
            between = self.edits[other + 1 : number]
            # Of two that are the same the first is made, unless it is contradicted before the second.
            again = other < number and any(_contradict(edit, one) for one in between)
            asked[edit] = number if again else other
            if other < number:
                twin, left = (number, other) if again else (other, number)
                self._skip(left, EngramError(f"it is the same as edit {twin}"), always=True)
        self._encode(sorted(asked.values()), ())
        rows = {number: one.rewriting[0] for number, one in self.encoded.items()}
        self._before = dict(zip(rows, self._reached(list(rows.values()), list(rows)), strict=True))
        subjects = {edit.subject for edit in self.edits}
        known = [fact for fact in facts_in(self.model) if fact.edit.subject in subjects]
        # Weights may have been put back in ways that nobody told us of.
        self._earlier = [fact for fact in known if self._says(fact.edit)]
        self.ranks.check_same("model", digest([asdict(fact.edit) for fact in self._earlier]))

    def encode(self, prefixes: Sequence[str]) -> None:
        """Tokenise all edits after every prefix, and divide them into batches.

        Raises:
            EngramError: a text cannot be used, or edits of a batch have one key.
        """
        self._prefixes = list(prefixes)
        self._encode(list(self.encoded), prefixes, self.plan.forms)
        numbers = list(self.encoded)
        size = self.plan.method.batch or max(1, len(numbers))
        self.batches = [
            part
            for start in range(0, len(numbers), size)
            for part in self._rounds(self._agreeing(numbers[start : start + size]))
        ]

    def settings(self, covariances: dict[int, Covariance]) -> dict:
        """What the result depends on, for the journal."""
        # Not all bits of them, which depend on the number of threads that inverted them.
        traces = [covariances[layer].inverse().trace().item() for layer in self.plan.layers]
        settings = asdict(self.plan)
        return {
            **settings.pop("method"),
            "preserve": repr(self.plan.method.held),  # which may be infinite
            **settings,
            "key": repr(self.plan.key),
            "edits": digest([asdict(edit) for edit in self.edits]),
            "earlier": digest([asdict(fact.edit) for fact in self._earlier]),
            "after": digest([(write.module, tensor_checksum(write.keys)) for write in self.after.writes]),
            "prefixes": digest(self._prefixes),
            "model": digest(weights_checksums(self.model), *adapter_settings(self.model)),
            "covariances": [f"{trace:.6e}" for trace in traces],
        }

    def result(self, covariances: dict[int, Covariance], journal: Journal | None) -> EditResult:
        """Find and write everything; if anything fails, the weights are put back."""
        method = self.plan.method
        operators = {layer: LayerOperator(method, covariances[layer]) for layer in self.plan.layers}
        layers = {projection.name: projection.layer for projection in self.projections}
        for write in self.after.writes:
            if write.module in layers:
                operators[layers[write.module]].remember(write.keys)
        streams = {
            write.module: Stream.of(write.stream) for write in self.after.writes if write.stream is not None
        }
        edited = [EditedModule.of(projection) for projection in self.projections]
        originals = {projection.name: Snapshot(projection) for projection in self.projections}
        values: dict[int, Value] = {}
        writes: list[Write] = []
        health: list[Health] = []
        # An earlier call's is the older one.
        bases = {module.module: module.base_checksum for module in [*edited, *self.after.edited_modules]}
        look = HealthCheck(
            self.model, self.tokenizer, self.projections, bases, self.after.writes, self.plan.stop_on,
            len(self.encoded),
        )  # fmt: skip
        try:
            for number, batch in enumerate(self.batches):
                before = list(map(Snapshot, self.projections)) if self.plan.stop_on else []
                self._hold(batch, values, writes)
                if method.values == "gradient":
                    found, written = self._by_gradients(number, batch, operators, streams, journal)
                else:
                    found = self._values(batch, len(values), journal)
                    written = self._written(number, found, operators, journal)
                if not written:
                    continue
                seen = self._look(look, writes + written, list(values), len(found))
                health.append(seen)
                passed = self.ranks.everyone.decided(lambda seen=seen: seen.past(self.plan.stop_on))
                if passed:
                    for original in before:
                        original.restore()
                    self._stop(self.batches[number:], len(values), "; ".join(passed))
                    break
                if number + 1 < len(self.batches):
                    for layer, write in zip(self.plan.layers, written, strict=True):
                        operators[layer].remember(write.keys)
                streams |= {one.module: Stream.of(one.stream) for one in written if one.stream is not None}
                values |= found
                writes += written
            self._check_any()
            for module, projection in zip(edited, self.projections, strict=True):
                module.edited_checksum = matrix_checksum(projection)
                note_edited(module.base_checksum, module.edited_checksum)
            self.ranks.check_same("model", [module.edited_checksum for module in edited])
            made = sorted(values)
            places = {number: place for place, number in enumerate(made)}
            result = EditResult(
                records=self._records(made, values, writes),
                writes=[replace(write, edits=tuple(places[i] for i in write.edits)) for write in writes],
                edited_modules=edited,
                skipped=sorted(self.skipped, key=lambda skipped: skipped.number),
                health=health,
                _originals=originals,
            )
        except BaseException:
            for original in originals.values():
                original.restore()
            raise
        result._standing = note(self.model, result.records, result.writes)
        _warn(result.records)
        warn(health)
        return result

    def _look(self, look: HealthCheck, writes: Sequence[Write], earlier: Sequence[int], made: int) -> Health:
        """The model's health after a batch; `earlier`: the edits of the batches before, in this call."""
        before = self.after.records

        def rows() -> list[Row]:
            edits = dict.fromkeys(record.edit for record in spread(before))
            known = [encode_edit(self.model, self.tokenizer, edit, ()).rewriting[0] for edit in edits]
            return known + [self.encoded[number].rewriting[0] for number in earlier]

        made += len(earlier)
        return look.look([*self.after.writes, *writes], rows, made, len(before) + made)

    def _stop(self, batches: Sequence[Sequence[int]], made: int, passed: str) -> None:
        """Leave out a batch that passed a bound, and those behind it."""
        reason = EngramError(f"stop_on: the run ended after {made} edits, as the next ones came to {passed}")
        for number in [number for batch in batches for number in batch]:
            if number in self.encoded:
                self._skip(number, reason, always=True)

    def _encode(self, numbers: Iterable[int], prefixes: Sequence[str], forms: bool = False) -> None:
        plan = self.plan
        for number in numbers:
            try:
                self.encoded[number] = encode_edit(
                    self.model, self.tokenizer, self.edits[number], prefixes, plan.texts, forms, plan.shorten
                )
            except EngramError as error:
                self._skip(number, error)
        self._check_any()

    def _reached(self, rows: Sequence[Row], numbers: Sequence[int]) -> list[Reached]:
        return reached(self.model, rows, [self.edits[number].prompt_text for number in numbers])

    def _hold(self, batch: Sequence[int], values: Mapping[int, Value], writes: Sequence[Write]) -> None:
        """Add to the edits of a batch what the model was told before about their subjects, and says now."""
        module = self.projections[-1].name
        subjects = {self.edits[number].subject for number in batch}
        alike = {
            i: (self.edits[i], one.initial_norm)
            for i, one in values.items()
            if self.edits[i].subject in subjects
        }
        # Most batches have none, and all writes need not be searched for them.
        made = standing(alike, writes) if alike else []
        for number in batch:
            edit = self.edits[number]
            known = [fact for fact in (*self._earlier, *made) if fact.edit.subject == edit.subject]
            told = [fact.edit for fact in known if fact.edit != edit]
            self._said[number] = said = [fact for fact in told if self._says(fact)]
            kept = [fact for fact in said if not _contradict(fact, edit)]
            held = encode_held(self.model, self.tokenizer, kept, self._prefixes)
            there = [fact for fact in known if fact.module == module]
            self.encoded[number] = replace(
                self.encoded[number],
                held=held,
                offset=torch.stack([fact.change for fact in there]).sum(0) if there else None,
                norm=there[0].norm if there else None,
                facts=1 + len(kept),
            )

    def _says(self, fact: Edit) -> bool:
        """Whether greedy decoding answers the fact's prompt with its target."""
        row = encode_edit(self.model, self.tokenizer, fact, ()).rewriting[0]
        return reached(self.model, [row], [fact.prompt_text])[0].said

    def _records(
        self, made: Sequence[int], values: Mapping[int, Value], writes: Sequence[Write]
    ) -> list[EditRecord]:
        """What the edits did, by what the model says now."""
        rows = [(number, row) for number in made for row in self.encoded[number].rewriting]
        after = iter(self._reached([row for _, row in rows], [number for number, _ in rows]))
        # Of several layers the last one's, where the value is.
        keys = {i: write.keys[place] for write in writes for place, i in enumerate(write.edits)}
        records = []
        for number in made:
            edit, value = self.edits[number], values[number]
            groups = [[next(after) for _ in range(count)] for count in self.encoded[number].texts]
            records.append(
                EditRecord(
                    edit=edit,
                    probability_before=math.exp(self._before[number].log_probability),
                    probability_after=math.exp(groups[0][0].log_probability),
                    took=all(group[0].said for group in groups),
                    reached=[[math.exp(one.log_probability) for one in group] for group in groups],
                    undid=[fact.text for fact in self._said[number] if not self._says(fact)],
                    losses=value.losses,
                    key_norm=keys[number].norm().item(),
                    value_norm=value.initial_norm,
                    change_norm=value.change.norm().item(),
                )
            )
        return records

    def _values(self, batch: list[int], done: int, journal: Journal | None) -> dict[int, Value]:
        """The values of a batch by number, in the order of the batch; `done`: how many were found before."""
        encoded, device = [self.encoded[i] for i in batch], input_device(self.model)
        # Ranks divide the edits alike, by the one that has least room.
        fitting = self.ranks.everyone.each(
            lambda: edits_that_fit(self.model, self.projections[-1], encoded, device)
        )
        groups = value_groups(encoded, self.plan.value, device, min(filter(None, fitting), default=None))
        costs = [len(group) * max(encoded[i].span[0] for i in group) for group in groups]

        def own() -> dict[int, Value | EngramError]:
            found: dict[int, Value | EngramError] = {}
            for task in sorted(self.ranks.mine(costs)):
                found |= self._group([batch[i] for i in groups[task]], done + len(found), journal)
            return {i: one if isinstance(one, EngramError) else self._light(one) for i, one in found.items()}

        found: dict[int, Value | EngramError] = {}
        for part in self.ranks.each(own):
            found |= part
        made = {}
        for number in batch:
            value = found[number]
            if isinstance(value, EngramError):
                self._skip(number, value)
            else:
                made[number] = value.to(self.projections[-1].matrix.device)
        return made

    def _light(self, value: Value) -> Value:
        """What a write asks of a value: over several layers only one of its keys."""
        if len(self.projections) > 1:
            value = replace(value, keys=value.keys[:1].clone())
        # Other ranks may have no such device.
        return value if self.ranks.size == 1 else value.to("cpu")

    def _group(
        self, numbers: list[int], done: int, journal: Journal | None
    ) -> dict[int, Value | EngramError]:
        """The values of edits that are optimised side by side, or why there is none."""
        projection, options = self.projections[-1], self.plan.value

        def progress(stage: str, steps: int, _total: int) -> None:
            # Steps of edits that go on for longer are beyond what was announced.
            steps = done * options.steps + min(steps, len(numbers) * options.steps)
            self.progress(stage, steps, len(self.encoded) * options.steps)

        device = torch.device("cpu") if self.ranks.mirror.size > 1 else projection.matrix.device
        kept = self.ranks.mirror.decided(
            lambda: [journal.load_value(number, device) for number in numbers] if journal else []
        )
        values: list[Value | EngramError] | None = [value for value in kept if value is not None]
        if len(values) < len(numbers):
            encoded = [self.encoded[i] for i in numbers]
            try:
                values = find_values(self.model, projection, encoded, options, progress)
            except (RuntimeError, MemoryError) as error:
                if len(numbers) == 1 or not out_of_memory(error):
                    raise
                values = None
            if values is None:
                # Outside of the handler, whose traceback holds on to what the search took.
                torch.cuda.empty_cache()
                half = len(numbers) // 2
                first = self._group(numbers[:half], done, journal)
                return first | self._group(numbers[half:], done + half, journal)
        for number, value in zip(numbers, values, strict=True):
            if isinstance(value, EngramError):
                if not self.plan.skip_failures:
                    raise value
            elif journal:
                journal.save_value(number, value)
        return dict(zip(numbers, values, strict=True))

    def _written(
        self,
        number: int,
        found: dict[int, Value],
        operators: dict[int, LayerOperator],
        journal: Journal | None,
    ) -> list[Write]:
        """The writes of a batch, one a layer; they are done. An edit whose write fails leaves `found`."""
        kept = self.ranks.everyone.decided(lambda: journal.load_writes(number)) if journal else None
        if kept is not None:
            for projection, write in zip(self.projections, kept, strict=True):
                write.apply_(projection)
            return kept
        if not found:
            return []
        encoded = [self.encoded[i] for i in found]
        if isinstance(self.plan.key, SpreadKey):
            encoded = [
                replace(one, others=other_rows(self.model, self.tokenizer, one.edit)) for one in encoded
            ]
        writes = self._tried(
            list(found),
            lambda: write_values(
                self.model, self.projections, encoded, list(found.values()),
                operators, self.plan.key, list(found), self.plan.bare_denominator, self.ranks,
            ),
        )  # fmt: skip
        if writes is None:
            found.clear()
            return []
        if journal:
            self.ranks.decided(lambda: journal.save_writes(number, writes))
        return writes

    def _tried(self, batch: Sequence[int], write: Callable[[], T]) -> T | None:
        """What a write gives; None where it failed for an edit that is alone and may be skipped."""
        alone = len(batch) == 1 and self.plan.skip_failures
        originals = list(map(Snapshot, self.projections)) if alone else []
        try:
            return write()
        except EngramError as error:
            if not alone:
                raise
            for original in originals:
                original.restore()
            self._skip(batch[0], error)
            return None

    def _by_gradients(
        self,
        number: int,
        batch: list[int],
        operators: dict[int, LayerOperator],
        streams: dict[str, Stream],
        journal: Journal | None,
    ) -> tuple[dict[int, Value], list[Write]]:
        """A batch written where its gradients lead, one write a layer; they are done."""
        device = self.projections[-1].matrix.device
        kept = self.ranks.everyone.decided(lambda: journal.load_writes(number)) if journal else None
        if kept is not None:
            known = self.ranks.everyone.decided(lambda: [journal.load_value(i, "cpu") for i in batch])
            if None not in known:
                for projection, write in zip(self.projections, kept, strict=True):
                    write.apply_(projection)
                return dict(zip(batch, known, strict=True)), kept
        written = self._tried(
            batch,
            lambda: write_gradients(
                self.model, self.projections, [self.encoded[i] for i in batch], operators,
                self.plan.method.gradient, batch, streams,
            ),
        )  # fmt: skip
        if written is None:
            return {}, []
        done = len(self._before)
        self.progress("values", min(done, (number + 1) * len(batch)), done)
        if journal:
            for i, value in zip(batch, written.values, strict=True):
                self.ranks.decided(lambda i=i, value=value: journal.save_value(i, value))
            self.ranks.decided(lambda: journal.save_writes(number, written.writes))
        return {i: value.to(device) for i, value in zip(batch, written.values, strict=True)}, written.writes

    def _agreeing(self, batch: list[int]) -> list[int]:
        """The edits of a batch of which no two ask for different targets after one prompt."""
        kept: list[int] = []
        for number in batch:
            edit = self.edits[number]
            for other in [other for other in kept if _contradict(self.edits[other], edit)]:
                first = self.edits[other]
                if not self.plan.last_wins:
                    raise EngramError(
                        "edits: expected one target after a prompt where edits are written at once, got "
                        f"{first.target!r} and {edit.target!r} after {edit.prompt_text!r}"
                    )
                kept.remove(other)
                self._skip(other, EngramError(f"a later edit has another target, {edit.text!r}"), True)
            kept.append(number)
        return kept

    def _rounds(self, batch: list[int]) -> list[list[int]]:
        """A batch cut so that each part has one fact a subject: the next one is found with it in place.

        One key cannot have two values, and texts that agree up to the end of the subject have the same key.
        The tokens are compared, and not the keys: rounding makes these differ a little, and the write huge.
        """
        rounds: list[list[int]] = []
        last: dict[object, int] = {}
        for number in batch:
            row = self.encoded[number].rewriting[0]
            marks = (self.edits[number].subject, tuple(row.ids[: row.subject + 1]))
            place = 1 + max(last.get(mark, -1) for mark in marks)
            last |= dict.fromkeys(marks, place)
            if place == len(rounds):
                rounds.append([])
            rounds[place].append(number)
        return rounds

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


def _contradict(first: Edit, second: Edit) -> bool:
    """Whether two facts have different targets after one prompt."""
    if first.subject != second.subject or first.target.strip() == second.target.strip():
        return False
    return not set(first.prompts).isdisjoint(second.prompts)


def _warn(records: Sequence[EditRecord]) -> None:
    """Say which edits did not take, and which earlier ones they undid."""
    failed = [record for record in records if not record.took]
    if failed:
        listed = "; ".join(
            f"{record.edit.text!r}, p {record.probability_before:.2g} → {record.probability_after:.2g}"
            for record in failed[:SHOWN]
        )
        still = sum(record.change_norm == 0 for record in failed)
        if still:
            listed += (
                f"; of {still} the search changed nothing, as no step lowered its loss: a smaller "
                "weight_decay or learning_rate of ValueOptions helps (`engram edit --weight-decay`)"
            )
        warnings.warn(f"{len(failed)} of {len(records)} edits did not take: {listed}", stacklevel=4)
    for record in records:
        for fact in record.undid:
            warnings.warn(f"the edit {record.edit.text!r} undid an earlier one, {fact!r}", stacklevel=4)
