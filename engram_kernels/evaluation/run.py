"""Edit many cases, measure each before and after, and put every weight back."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING

import torch

from .. import _checks as check
from .._hashing import digest, tensor_checksum
from .._progress import Progress
from ..editing.methods import method_of
from ..errors import EngramError
from ..hf.eval_mode import eval_mode
from ..hf.fingerprints import weights_checksums
from .cases import Case
from .conditions import settled, with_passes
from .drift import Drift
from .fluency import fluency
from .judge import Judge, judged
from .measures import Figures, measure
from .outcomes import Outcome, Retained

if TYPE_CHECKING:
    from ..editing import Edit, Editor
    from ..editing.writing.records import EditRecord

CHECKPOINTS = (10, 50, 100)
# Cases measured between two reports of progress.
CHUNK = 64


class Evaluation:
    """Edits cases with an editor, measures what the edits do, and reverts them.

    Args:
        editor: an `Editor`, or another library's with the same `edit`, such as `integrations.EasyEdit`.
        options: of `Editor.edit`, such as `{"method": "memit", "layers": [4, 5, 6]}`.
        fluency_tokens: to write after each generation prompt; 0: fluency is not measured.
        batch_size: texts measured at a time.
        seed: of the texts that are sampled for the fluency.
        chat: ask by the tokenizer's chat template.
        drift: measured with every state of the model; None: nothing is.
        judge: gives its word on every answer.
        progress: called as `progress(stage, done, total)`.

    Example:
        >>> cases, _ = read_cases("counterfact.json", rows=20)
        >>> evaluation = Evaluation(Editor(*load_model("smollm2")), {"method": "rome"})
        >>> summarise(evaluation.each(cases))["aspects"]["paraphrase"]["begins"]
    """

    def __init__(
        self,
        editor: Editor,
        options: Mapping | None = None,
        *,
        fluency_tokens: int = 100,
        batch_size: int = 32,
        seed: int = 0,
        chat: bool = False,
        drift: Drift | None = None,
        judge: Judge | None = None,
        progress: Progress | None = None,
    ):
        check.expect(fluency_tokens >= 0, "fluency_tokens", "at least 0", fluency_tokens)
        check.expect(batch_size >= 1, "batch_size", "at least 1", batch_size)
        self.editor = editor
        self.options = dict(options or {})
        self.fluency_tokens = fluency_tokens
        self.batch_size = batch_size
        self.seed = seed
        self.chat = chat
        self.drift = drift
        self.judge = judge
        self.progress = progress
        self._checksums = weights_checksums(editor.model)

    def __repr__(self) -> str:
        options = ", ".join(f"{name}={value!r}" for name, value in self.options.items() if value is not None)
        return f"Evaluation(of {type(self.editor.model).__name__}, {options or 'the editor defaults'})"

    def prepare(self) -> None:
        """Collect the statistics and sample the contexts, which are no part of an edit's seconds."""
        method, layers = self.options.get("method", "engram"), self.options.get("layers")
        layers = self.editor.layers(method) if layers is None else layers
        self.editor.covariances([layers] if isinstance(layers, int) else layers)
        self.editor.prefixes()

    def each(
        self,
        cases: Sequence[Case],
        done: Sequence[Outcome] = (),
        keep: Callable[[list[Outcome]], None] | None = None,
    ) -> list[Outcome]:
        """Edit, measure and revert every case by itself.

        Args:
            cases: all cases.
            done: outcomes of the first of them, from a run that was interrupted.
            keep: called with all outcomes so far whenever a case is finished.

        Raises:
            EngramError: a case cannot be edited, unless the options say to skip it, or not be measured.
        """
        outcomes = list(done)
        for number, case in enumerate(cases[len(outcomes) :], len(outcomes) + 1):
            outcomes.append(self._one(case))
            if keep:
                keep(outcomes)
            self._report("cases", number, len(cases))
        return outcomes

    def together(
        self,
        cases: Sequence[Case],
        checkpoints: Sequence[int] = CHECKPOINTS,
        directory: str | os.PathLike | None = None,
        standing: Callable[[], None] | None = None,
    ) -> tuple[list[Outcome], list[Retained]]:
        """Edit all cases, measure them, and revert.

        Where edits are written one after the other and do not know of each other, as the method "rome" does
        it, the editor is called up to each checkpoint, and the first edits are measured there. Otherwise all
        edits are one call, and measured at its end.

        Args:
            cases: all cases.
            checkpoints: numbers of edits after which retention is measured, over as many of the first edits;
                the number of all cases is always one of them.
            directory: where the editor keeps its run, to continue it after an interruption; None: nowhere.
            standing: called when all edits stand and are measured, before they are reverted.

        Raises:
            EngramError: a case cannot be edited, unless the options say to skip it, or not be measured.
        """
        cases = self._settled(cases)
        stops = sorted({stop for stop in checkpoints if 0 < stop < len(cases)} | {len(cases)})
        ends = stops if self._one_by_one() else stops[-1:]
        outcomes = [
            Outcome(case.name, _line(case), figures)
            for case, figures in zip(cases, self._figures(cases, "unedited"), strict=True)
        ]
        records: dict[Edit, EditRecord] = {}
        edited: list[Outcome] = []
        skipped: dict[Edit, str] = {}
        results, seconds, replayed = [], 0.0, False
        retained: list[Retained] = []
        versions = self._versions()
        try:
            for start, end in zip([0, *ends], ends, strict=False):
                folder = None if directory is None else Path(directory, f"{start:06d}")
                # What was done before a cut is not done again, and took nobody knows how long.
                replayed = replayed or (folder is not None and folder.is_dir())
                started = time.perf_counter()
                result, reasons = self._edit(cases[start:end], folder)
                seconds += time.perf_counter() - started
                skipped |= reasons
                if result is not None:
                    results.append(result)
                    records |= {record.edit: record for record in result.records}
                retained += self._retained(cases, [stop for stop in stops if stop <= end], records)
                self._report("edits", end, len(cases))
            after = self._figures(cases, "edited")
            if standing is not None:
                standing()
        finally:
            for result in reversed(results):
                result.revert()
        exact = self._as_before(self._written_since(versions))
        for case, outcome, figures in zip(cases, outcomes, after, strict=True):
            reason = next((skipped[edit] for edit in case.edits if edit in skipped), None)
            if reason is None:
                share = None if replayed else seconds / len(records) * len(case.edits)
                edited.append(_finished(outcome, figures, records[case.edit], share, exact))
            else:
                edited.append(replace(outcome, skipped=reason))
        return edited, retained

    @property
    def weights(self) -> str:
        """A digest of every weight of the model when this object was made."""
        return digest(self._checksums)

    def weights_as_before(self) -> bool:
        """Whether every weight of the model is as it was when this object was made, bit for bit."""
        return self._as_before(self._checksums)

    def _one(self, case: Case) -> Outcome:
        (case,) = self._settled([case])
        # Alone as after the edit: another batch would round otherwise, and might tip a close decision.
        (before,) = self._figures([case])
        versions = self._versions()
        started = time.perf_counter()
        result, reasons = self._edit([case])
        seconds = time.perf_counter() - started
        outcome = Outcome(case.name, _line(case), before)
        if reasons:
            if result is not None:
                result.revert()
            return replace(outcome, skipped=next(iter(reasons.values())))
        try:
            (after,) = self._figures([case])
        finally:
            result.revert()
        exact = self._as_before(self._written_since(versions))
        return _finished(outcome, after, result.records[0], seconds, exact)

    def _edit(self, cases: Sequence[Case], directory: Path | None = None):
        """The editor's result, None where it could make no edit, and why those that are skipped are."""
        edits = [edit for case in cases for edit in case.edits]
        kept = {} if directory is None else {"directory": directory}
        try:
            result = self.editor.edit(edits, **self.options, **kept)
        except EngramError as error:
            if self.options.get("failures") != "skip":
                raise
            return None, dict.fromkeys(edits, str(error))
        # What is asked for twice is made once, and stands for both.
        made = {record.edit for record in result.records}
        return result, {item.edit: item.reason for item in result.skipped if item.edit not in made}

    def _one_by_one(self) -> bool:
        """Whether many calls of the editor do what one does: with one layer, whose keys stay the same."""
        method, layers = self.options.get("method", "engram"), self.options.get("layers")
        one_layer = layers is None or isinstance(layers, int) or len(layers) == 1
        single = method in ("engram", "rome") and (self.options.get("batch") or method_of(method).batch) == 1
        return single and one_layer and not self.options.get("preserve")

    def _settled(self, cases: Sequence[Case]) -> list[Case]:
        """The cases without what is only asked of a model that knows more than this one."""
        with eval_mode(self.editor.model):
            return settled(self.editor.model, self.editor.tokenizer, cases, self.batch_size, self.chat)

    def _figures(self, cases: Sequence[Case], stage: str | None = None) -> list[Figures]:
        model, tokenizer = self.editor.model, self.editor.tokenizer
        figures: list[Figures] = []
        for at in range(0, len(cases), CHUNK):
            chunk = cases[at : at + CHUNK]
            with eval_mode(model):
                found = measure(model, tokenizer, chunk, self.batch_size, self.chat)
                found = with_passes(model, tokenizer, chunk, found, self.batch_size, self.chat)
                if self.fluency_tokens:
                    bits = fluency(model, tokenizer, chunk, self.fluency_tokens, self.seed, self.batch_size)
                    found = [replace(one, fluency=entropy) for one, entropy in zip(found, bits, strict=True)]
            figures += found
            if stage:
                self._report(stage, len(figures), len(cases))
        if self.drift is not None:
            with eval_mode(model):
                drift = self.drift.measure(model)
            figures = [replace(one, drift=drift) for one in figures]
        return figures if self.judge is None else judged(figures, self.judge)

    def _retained(self, cases: Sequence[Case], stops: Sequence[int], records: Mapping) -> list[Retained]:
        """Of the first edits, as many as each stop says, the share answered now; without the skipped."""
        first = [case for case in cases[: max(stops)] if case.edit in records]
        model, tokenizer = self.editor.model, self.editor.tokenizer
        with eval_mode(model):
            found = measure(model, tokenizer, [_alone(case) for case in first], self.batch_size, self.chat)
        stands = {case.edit: one.answers[0].begins for case, one in zip(first, found, strict=True)}
        firsts = {stop: [stands[case.edit] for case in cases[:stop] if case.edit in stands] for stop in stops}
        return [Retained(max(stops), stop, fmean(first)) for stop, first in firsts.items() if first]

    def _report(self, stage: str, done: int, total: int) -> None:
        if self.progress is not None:
            self.progress(stage, done, total)

    def _state(self) -> dict[str, torch.Tensor]:
        return self.editor.model.state_dict()

    def _versions(self) -> dict[str, int]:
        """How often each tensor was written in place."""
        return {name: tensor._version for name, tensor in self._state().items()}

    def _written_since(self, versions: Mapping[str, int]) -> list[str]:
        return [name for name, version in self._versions().items() if version != versions[name]]

    def _as_before(self, names: Sequence[str]) -> bool:
        state = self._state()
        return all(tensor_checksum(state[name]) == self._checksums[name] for name in names)


def peak_memory(device: torch.device) -> int | None:
    """The most memory in bytes that PyTorch held on a GPU, or the whole process on a CPU.

    None where the system does not say, as on Windows.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource
    except ModuleNotFoundError:
        return None

    # Kilobytes, but on macOS bytes.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _finished(outcome: Outcome, after: Figures, record, seconds: float | None, exact: bool) -> Outcome:
    losses = getattr(record, "losses", None)
    return replace(
        outcome,
        after=after,
        seconds=seconds,
        probability=getattr(record, "probability_after", None),
        took=getattr(record, "took", None),
        steps=len(losses) if losses else None,
        loss=losses[-1] if losses else None,
        reverted_exactly=exact,
    )


def _alone(case: Case) -> Case:
    """The edit's own prompt and nothing else."""
    return replace(case, paraphrases=(), neighbours=(), generation=(), portability=())


def _line(case: Case) -> str:
    more = f" and {len(case.further)} more" if case.further else ""
    return f"{case.prompt} → {case.edit.target}{more}"
