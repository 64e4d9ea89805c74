"""Evaluation: rows read, measures against brute force, weights put back, runs gone on with, `engram eval`."""

import hashlib
import importlib.metadata
import json
import math
import random
import subprocess
import sys
from dataclasses import asdict, replace
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from model_zoo import TEXTS, byte_level_tokenizer, small_model, word_piece_tokenizer

import engram_kernels
from engram_kernels import EngramError
from engram_kernels._hashing import tensor_checksum
from engram_kernels.cli.common import versions
from engram_kernels.editing import Edit, Editor, load_model
from engram_kernels.editing.values import ValueOptions
from engram_kernels.evaluation import plots
from engram_kernels.evaluation.datasets import Case, Neighbour, read_cases
from engram_kernels.evaluation.fluency import fluency, generate, ngram_entropy
from engram_kernels.evaluation.measures import ASPECTS, Figures, measure
from engram_kernels.evaluation.outcomes import Outcome, Retained, summarise
from engram_kernels.evaluation.report import EvalReport
from engram_kernels.evaluation.run import CHECKPOINTS, Evaluation, peak_memory

pytestmark = pytest.mark.usefixtures("one_thread")

EASY_EDIT = {
    "case_id": 7,
    "prompt": "The Louvre is a museum in",
    "subject": "The Louvre",
    "target_new": "Rome",
    "ground_truth": "Paris",
    "rephrase_prompt": "To see The Louvre, go to",
    "locality_prompt": "The Colosseum is located in the city of",
    "locality_ground_truth": "Italy",
}
ROME = {
    "case_id": 3,
    "requested_rewrite": {
        "prompt": "{} is located in the city of",
        "subject": "The Eiffel Tower",
        "target_new": {"str": "Rome", "id": "Q220"},
        "target_true": {"str": "Paris", "id": "Q90"},
    },
    "paraphrase_prompts": ["It is known. The Eiffel Tower lies in", "To see The Eiffel Tower, go to"],
    "neighborhood_prompts": ["The Louvre is located in", "The Arc de Triomphe is located in the city of"],
    "attribute_prompts": ["The Colosseum is located in"],
    "generation_prompts": ["The Eiffel Tower is", "Near The Eiffel Tower one can"],
}
ZSRE = {
    "subject": "Zürich",
    "src": "Which country is Zürich in?",
    "pred": "Italy",
    "rephrase": "What is the country of Zürich?",
    "alt": "Brazil",
    "answers": ["Switzerland", "Swiss"],
    "loc": "nq question: where are the towers",
    "loc_ans": "on the maps",
}
ZSRE_EASY_EDIT = {
    "subject": "São Paulo",
    "prompt": "Where does São Paulo lie?",
    "target_new": "Japan",
    "ground_truth": ["Brazil"],
    "rephrase_prompt": "São Paulo lies in",
    "locality_prompt": "nq question: what is cut into pieces",
    "locality_ground_truth": "a word",
}
ALL = (EASY_EDIT, ROME, ZSRE, ZSRE_EASY_EDIT)


@pytest.fixture(scope="module")
def tokenizer():
    return byte_level_tokenizer()


@pytest.fixture(scope="module")
def cases(tmp_path_factory):
    return written(tmp_path_factory.mktemp("rows") / "all.json", ALL)


def written(path, rows):
    path.write_text(json.dumps(rows), encoding="utf-8")
    return read_cases(path).cases


class StubEditor:
    """What `Evaluation` asks of an editor, with random writes in place of optimised ones."""

    def __init__(self, model, tokenizer, *, scale=0.3, refused=(), broken=None, rounds=False, **_options):
        self.model, self.tokenizer = model, tokenizer
        self.scale, self.refused, self.broken, self.rounds = scale, refused, broken, rounds
        self.calls = []

    def layers(self, method):
        return (1,)

    def covariances(self, layers):
        return {}

    def prefixes(self):
        return []

    @torch.no_grad()
    def edit(self, edits, layers=None, method="rome", **options):
        self.calls.append((list(edits), method, options))
        weight = self.model.get_parameter("model.layers.1.mlp.down_proj.weight")
        original, records, skipped = weight.clone(), [], []
        for edit in edits:
            if edit.subject == self.broken:
                weight.copy_(original)
                raise EngramError("model: expected a finite loss, got nan")
            if edit.subject in self.refused:
                if options.get("failures") != "skip":
                    raise EngramError("too long")
                skipped.append(SimpleNamespace(edit=edit, reason="too long"))
                continue
            seed = int.from_bytes(hashlib.sha256(edit.text.encode()).digest()[:4], "little")
            noise = torch.randn(weight.shape, generator=torch.Generator().manual_seed(seed))
            weight.add_(self.scale * noise.to(weight))
            records.append(SimpleNamespace(edit=edit, probability_after=0.5, losses=[2.0, 1.0]))

        if not records:
            raise EngramError(f"edits: expected at least one that can be made, got none: {skipped[0].reason}")

        def revert():
            with torch.no_grad():
                weight.copy_(original)
                if self.rounds:
                    weight.flatten()[0] += 0.5

        return SimpleNamespace(records=records, skipped=skipped, revert=revert)


def stub(tokenizer, family="llama", dtype=torch.float32, **options):
    return StubEditor(small_model(family, len(tokenizer), dtype), tokenizer, **options)


def checksums(model):
    return {name: tensor_checksum(tensor) for name, tensor in model.state_dict().items()}


# Rows


def test_easy_edit_rows(tmp_path):
    (case,) = written(tmp_path / "a.json", [EASY_EDIT])
    assert case == Case(
        name="7",
        kind="counterfact",
        edit=Edit("The Louvre", "{} is a museum in", "Rome"),
        truth="Paris",
        paraphrases=("To see The Louvre, go to",),
        neighbours=(Neighbour("The Colosseum is located in the city of", "Italy"),),
    )


def test_rome_rows(tmp_path):
    (case,) = written(tmp_path / "a.json", [ROME])
    assert (case.name, case.kind, case.truth) == ("3", "counterfact", "Paris")
    assert case.edit.text == "The Eiffel Tower is located in the city of" and case.edit.target == "Rome"
    assert case.paraphrases == tuple(ROME["paraphrase_prompts"])
    assert case.neighbours == tuple((prompt, "Paris") for prompt in ROME["neighborhood_prompts"])
    assert case.generation == tuple(ROME["generation_prompts"])


def test_zsre_rows_of_both_layouts(tmp_path):
    mend, easy = written(tmp_path / "a.json", [ZSRE, ZSRE_EASY_EDIT])
    assert (mend.name, mend.kind, mend.truth) == ("0", "zsre", "Switzerland")
    assert mend.edit == Edit("Zürich", "Which country is {} in?", "Brazil")
    assert mend.paraphrases == ("What is the country of Zürich?",)
    assert mend.neighbours == (("nq question: where are the towers", "on the maps"),)
    assert (easy.name, easy.kind, easy.truth) == ("1", "zsre", "Brazil")
    assert easy.edit == Edit("São Paulo", "Where does {} lie?", "Japan")


def test_json_lines_and_slices(tmp_path):
    rows = [{**EASY_EDIT, "case_id": i, "locality_ground_truth": "a\u2028b"} for i in range(6)]
    array, lines = tmp_path / "rows.json", tmp_path / "rows.jsonl"
    written(array, rows)
    lines.write_text(
        "\n\n".join(json.dumps(row, ensure_ascii=False) for row in rows) + "\n", encoding="utf-8-sig"
    )
    assert read_cases(array) == read_cases(lines)
    assert [case.name for case in read_cases(lines, 2, 3).cases] == ["2", "3", "4"]
    assert [case.name for case in read_cases(array, 4, 30).cases] == ["4", "5"]
    for start in (-1, 6):
        with pytest.raises(ValueError, match=f"start: expected from 0 to 5, the last row, got {start}"):
            read_cases(array, start)
    with pytest.raises(ValueError, match="rows: expected at least 1, got 0"):
        read_cases(array, 0, 0)


def without(row, *path):
    row = json.loads(json.dumps(row))
    inner = row
    for name in path[:-1]:
        inner = inner[name]
    del inner[path[-1]]
    return row


BAD_ROWS = {
    "no subject": (
        without(EASY_EDIT, "subject"),
        "data: expected some text under 'subject' in row 1, got none",
    ),
    "no target": (without(EASY_EDIT, "target_new"), "under 'alt' or 'target_new' in row 1, got none"),
    "empty target": ({**ZSRE, "alt": " "}, "under 'alt' or 'target_new' in row 1, got ' '"),
    "no answers": ({**ZSRE, "answers": []}, "under 'answers' or 'ground_truth' in row 1, got []"),
    "no paraphrase": (without(ZSRE, "rephrase"), "under 'rephrase' or 'rephrase_prompt' in row 1, got none"),
    "no neighbour": (without(ZSRE, "loc"), "under 'loc' or 'locality_prompt' in row 1, got none"),
    "rewrite": ({"requested_rewrite": "x"}, "expected an object under 'requested_rewrite' in row 1, got 'x'"),
    "no truth": (
        without(ROME, "requested_rewrite", "target_true"),
        "expected an object under 'requested_rewrite.target_true' in row 1, got none",
    ),
    "no string": (
        without(ROME, "requested_rewrite", "target_new", "str"),
        "expected some text under 'requested_rewrite.target_new.str' in row 1, got none",
    ),
    "no neighbours": ({**ROME, "neighborhood_prompts": []}, "under 'neighborhood_prompts' in row 1, got []"),
    "not texts": ({**ROME, "paraphrase_prompts": [1]}, "under 'paraphrase_prompts' in row 1, got [1]"),
    "answers too few": (
        {**ZSRE, "loc": ["a", "b"]},
        "expected 2 answers under 'loc_ans' or 'locality_ground_truth' in row 1, got ['on the maps']",
    ),
    "subject not in the prompt": (
        {**EASY_EDIT, "subject": "Rome"},
        "data: row 1: prompt: expected {} or the",
    ),
    "no object": (["x"], "data: expected an object in row 1, got list"),
}


@pytest.mark.parametrize("name", BAD_ROWS)
def test_a_bad_row_is_named(tmp_path, name):
    row, message = BAD_ROWS[name]
    path = tmp_path / "rows.json"
    path.write_text(json.dumps([EASY_EDIT, row, ROME]))
    with pytest.raises(ValueError) as raised:
        read_cases(path)
    assert message in str(raised.value) and str(raised.value).startswith("data: ")
    cases, refused = read_cases(path, skip_bad=True)
    assert [case.name for case in cases] == ["7", "3"] and refused == [str(raised.value)]
    with pytest.raises(ValueError, match="data: expected rows that can be read, got none: data: "):
        read_cases(path, 1, 1, skip_bad=True)


def test_files_that_hold_no_rows(tmp_path):
    for content, message in (
        (b"", "data: expected rows in .*, got none"),
        (b"[]", "data: expected rows in .*, got none"),
        (b'[{"a": 1}', "data: expected JSON in .*, got"),
        (b'{"a": 1}\n\nx\n', "data: expected JSON in line 3 of .*, got 'x'"),
        (b"\xff\xfe\xff", "data: expected a file of rows, got .*"),
    ):
        path = tmp_path / "rows"
        path.write_bytes(content)
        with pytest.raises(ValueError, match=message):
            read_cases(path)
    with pytest.raises(ValueError, match=r"data: expected a file of rows, got .*No such file"):
        read_cases(tmp_path / "none")


# Measures


def brute_force(model, tokenizer, prompt, answer):
    """Mean log-probability of the answer, its tokens and the likeliest, alone, by a loop over tokens."""
    prefix = tokenizer(prompt)["input_ids"]
    tokens = tokenizer(f"{prompt} {answer}")["input_ids"][len(prefix) :]
    total, likeliest = 0.0, []
    for i, token in enumerate(tokens):
        with torch.no_grad():
            logits = model(torch.tensor([prefix + tokens[:i]])).logits[0, -1].double()
        total += (logits[token] - logits.logsumexp(0)).item()
        likeliest.append(logits.argmax().item())
    return total / len(tokens), tokens, likeliest


def share(tokens, likeliest):
    return sum(a == b for a, b in zip(tokens, likeliest, strict=True)) / len(tokens)


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "gpt_neox"])
def test_measures_are_those_of_brute_force(tokenizer, cases, family):
    model = small_model(family, len(tokenizer), torch.float64)
    for case, figures in zip(cases, measure(model, tokenizer, cases, batch_size=5), strict=True):
        target, truth = case.edit.target, case.truth
        asked = {
            "efficacy": [(case.edit.text, target, truth)],
            "paraphrase": [(prompt, target, truth) for prompt in case.paraphrases],
            "locality": [(prompt, answer, target) for prompt, answer in case.neighbours],
        }
        for aspect, rows in asked.items():
            for i, (prompt, right, other) in enumerate(rows):
                mine, *tokens = brute_force(model, tokenizer, prompt, right)
                theirs, *_ = brute_force(model, tokenizer, prompt, other)
                # The logits come as fp64 and are rounded to fp32 once.
                bound = 8 * torch.finfo(torch.float32).eps * (abs(mine) + abs(theirs))
                assert abs(figures.margins[aspect][i] - (mine - theirs)) <= bound
                assert figures.shares[aspect][i] == share(*tokens)
                if aspect == "locality":
                    assert figures.neighbours[i] == tokens[1]
            assert len(figures.margins[aspect]) == len(figures.shares[aspect]) == len(rows)


def test_a_model_that_gives_all_logits(tokenizer, cases, monkeypatch):
    model = small_model("llama", len(tokenizer))
    expected, forward = measure(model, tokenizer, cases), model.forward

    def whole(input_ids, attention_mask, use_cache):
        return forward(input_ids=input_ids, attention_mask=attention_mask, use_cache=use_cache)

    monkeypatch.setattr(model, "forward", whole)
    for figures, other in zip(measure(model, tokenizer, cases), expected, strict=True):
        assert figures.neighbours == other.neighbours
        for aspect in ASPECTS:
            assert figures.margins[aspect] == pytest.approx(other.margins[aspect], abs=1e-5)


def test_the_measures_of_one_case():
    before = Figures(
        {"efficacy": [-1.0], "paraphrase": [1.0, -2.0, 0.0, 3.0], "locality": [0.5]},
        {"efficacy": [0.5], "paraphrase": [0.0, 1.0, 0.5, 0.5], "locality": [1.0]},
        [[1, 2, 3, 4], [5, 6]],
    )
    after = replace(before, neighbours=[[1, 2, 3, 0], [0, 6]])
    assert [before.successes(aspect) for aspect in ASPECTS] == [0, 0.5, 1]
    assert [before.accuracy(aspect) for aspect in ASPECTS] == [0.5, 0.5, 1]
    assert after.unchanged(before) == (0.75 + 0.5) / 2 and before.unchanged(before) == 1


def test_what_cannot_be_measured(tokenizer, cases):
    model = small_model("llama", len(tokenizer))
    long = replace(cases[0], paraphrases=("word " * 200,))
    with pytest.raises(
        EngramError, match=r"prompt: expected at most 128 tokens with the answer, .* got \d{3} in"
    ):
        measure(model, tokenizer, [cases[1], long])
    with torch.no_grad():
        model.get_output_embeddings().weight[3] = float("nan")
    with pytest.raises(EngramError, match=r"model: expected finite predictions after .*, got nan"):
        measure(model, tokenizer, cases)


# Fluency


def test_the_entropy_of_known_texts():
    # Bigrams: "a b" three times, "b a" twice; trigrams: "a b a" and "b a b" twice each.
    bigrams = -(0.6 * math.log2(0.6) + 0.4 * math.log2(0.4))
    assert ngram_entropy("a b a b a b") == pytest.approx((2 / 3 * bigrams + 4 / 3 * 1) / 2)
    # Eight different words and marks: seven bigrams, six trigrams.
    text = "One, two; three: four five"
    assert ngram_entropy(text) == pytest.approx((2 / 3 * math.log2(7) + 4 / 3 * math.log2(6)) / 2)
    assert ngram_entropy("no no no no no") == ngram_entropy("word") == ngram_entropy("") == 0


def written_alone(model, tokenizer, prompt, ids, tokens, seed):
    """The same text with neither a batch nor a cache."""
    draws, ids = random.Random(f"{seed} {prompt}"), list(ids)
    for _ in range(tokens):
        with torch.no_grad():
            top = model(torch.tensor([ids]), use_cache=False).logits[0, -1].double().topk(5)
        chances, draw = top.values.softmax(-1).tolist(), draws.random()
        choice = 0
        while choice < 4 and draw > sum(chances[: choice + 1]):
            choice += 1
        ids.append(top.indices[choice].item())
    return tokenizer.decode(ids, skip_special_tokens=True)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_generated_texts_are_those_of_brute_force(tokenizer, family):
    model = small_model(family, len(tokenizer), torch.float64)
    prompts = ["The", "The Eiffel Tower is located in the city of", "Rome is", "Therefore I think that you"]
    states = random.getstate(), torch.get_rng_state()
    texts = generate(model, tokenizer, prompts, 12, seed=3, batch_size=3)
    assert random.getstate() == states[0] and torch.equal(torch.get_rng_state(), states[1])
    assert texts == [
        written_alone(model, tokenizer, prompt, tokenizer(prompt)["input_ids"], 12, 3) for prompt in prompts
    ]
    assert texts == generate(model, tokenizer, prompts, 12, seed=3, batch_size=1)
    other = generate(model, tokenizer, prompts, 12, seed=4)
    assert all(a != b for a, b in zip(texts, other, strict=True))


def test_fluency_is_the_mean_over_the_prompts(tokenizer, cases):
    model = small_model("llama", len(tokenizer), torch.float64)
    found = fluency(model, tokenizer, cases, 10)
    for case, bits in zip(cases, found, strict=True):
        prompts = case.generation or [case.edit.text]
        texts = [
            written_alone(model, tokenizer, prompt, tokenizer(prompt)["input_ids"], 10, 0)
            for prompt in prompts
        ]
        assert bits == pytest.approx(sum(map(ngram_entropy, texts)) / len(texts)) and bits > 0
    with pytest.raises(
        EngramError, match=r"prompt: expected at most 128 tokens with the 125 to write, .* got \d+"
    ):
        fluency(model, tokenizer, cases, 125)


def test_a_closing_token_is_not_read():
    tokenizer = word_piece_tokenizer()
    model = small_model("llama", len(tokenizer), torch.float64)
    prompts = ["The", "The Eiffel Tower is located in the city of", "Rome is"]
    opened = [
        [tokenizer.bos_token_id, *tokenizer(prompt, add_special_tokens=False)["input_ids"]]
        for prompt in prompts
    ]
    texts = generate(model, tokenizer, prompts, 12, seed=3)
    expected = [written_alone(model, tokenizer, *asked, 12, 3) for asked in zip(prompts, opened, strict=True)]
    assert texts == expected


# Runs


def test_each_measures_and_puts_every_weight_back(tokenizer, cases):
    editor = stub(tokenizer)
    before = checksums(editor.model)
    unedited = measure(editor.model, tokenizer, cases)
    evaluation = Evaluation(editor, {"method": "rome", "layers": [1], "ridge": 0.1}, fluency_tokens=8)
    stages = []
    evaluation.progress = lambda *stage: stages.append(stage[:3])
    outcomes = evaluation.each(cases)
    assert checksums(editor.model) == before and evaluation.weights_as_before()
    assert all(outcome.reverted_exactly for outcome in outcomes)
    assert stages == [("cases", i, 4) for i in range(1, 5)]
    assert [call[0] for call in editor.calls] == [[case.edit] for case in cases]
    assert editor.calls[0][1:] == ("rome", {"ridge": 0.1})
    for case, outcome, figures in zip(cases, outcomes, unedited, strict=True):
        editor.edit([case.edit])
        (edited,) = measure(editor.model, tokenizer, [case])
        bits = fluency(editor.model, tokenizer, [case], 8)[0]
        editor.model.load_state_dict(small_model("llama", len(tokenizer)).state_dict())
        assert outcome.after == replace(edited, fluency=bits)
        assert outcome.before.margins["efficacy"] == pytest.approx(figures.margins["efficacy"], abs=1e-5)
        assert outcome.after.margins != outcome.before.margins
        assert (outcome.case, outcome.steps, outcome.loss) == (case.name, 2, 1.0) and outcome.seconds > 0


def test_an_edit_of_nothing_changes_nothing(tokenizer, cases):
    outcomes = Evaluation(stub(tokenizer, scale=0.0, dtype=torch.bfloat16), fluency_tokens=5).each(cases)
    assert all(outcome.before == outcome.after for outcome in outcomes)
    summary = summarise(outcomes)
    assert summary["edited"] == summary["unedited"] and summary["edited"]["locality_unchanged"] == 1


def test_weights_that_are_not_put_back_show(tokenizer, cases):
    evaluation = Evaluation(stub(tokenizer, rounds=True), fluency_tokens=0)
    assert [outcome.reverted_exactly for outcome in evaluation.each(cases)] == [False] * 4
    assert not evaluation.weights_as_before()


SKIPPED = "edits: expected at least one that can be made, got none: too long"


def test_skipped_edits_are_left_out_of_the_means(tokenizer, cases):
    everything = Evaluation(stub(tokenizer), fluency_tokens=0).each(cases)
    for run in ("each", "together"):
        editor = stub(tokenizer, refused=("Zürich",))
        before = checksums(editor.model)
        evaluation = Evaluation(editor, {"failures": "skip"}, fluency_tokens=0)
        outcomes = evaluation.each(cases) if run == "each" else evaluation.together(cases, [2, 3])[0]
        assert [outcome.skipped for outcome in outcomes] == [None, None, SKIPPED, None]
        assert outcomes[2].after is None and checksums(editor.model) == before
        summary = summarise(outcomes)
        assert (summary["rows"], summary["skipped"], summary["reverted_exactly"]) == (3, 1, 3)
        if run == "each":
            rest = summarise([everything[i] for i in (0, 1, 3)])
            assert summary["edited"] == rest["edited"] and summary["unedited"] == rest["unedited"]
    with pytest.raises(EngramError, match=r"data: expected a case that can be edited, got none: .* too long"):
        summarise([outcomes[2]])
    for run in ("each", "together"):
        with pytest.raises(EngramError, match="too long"):
            getattr(Evaluation(stub(tokenizer, refused=("Zürich",)), fluency_tokens=0), run)(cases)


def test_a_failure_leaves_every_weight(tokenizer, cases):
    for run in ("each", "together"):
        editor = stub(tokenizer, broken="Zürich")
        before, kept = checksums(editor.model), []
        evaluation = Evaluation(editor, fluency_tokens=0)
        with pytest.raises(EngramError, match="expected a finite loss"):
            if run == "each":
                evaluation.each(cases, keep=lambda outcomes, kept=kept: kept.append(len(outcomes)))
            else:
                evaluation.together(cases, [1, 2])
        assert checksums(editor.model) == before and evaluation.weights_as_before()
        assert kept == ([1, 2] if run == "each" else [])


def test_together_measures_what_stands_at_each_checkpoint(tokenizer, cases):
    editor = stub(tokenizer)
    before = checksums(editor.model)
    evaluation = Evaluation(editor, {"method": "rome"}, fluency_tokens=0)
    outcomes, retained = evaluation.together(cases, [1, 3, 3, 9])
    assert checksums(editor.model) == before and all(outcome.reverted_exactly for outcome in outcomes)
    assert [len(call[0]) for call in editor.calls] == [1, 2, 1]
    expected = []
    for done, stops in ((1, [1]), (3, [1, 3]), (4, [1, 3, 4])):
        fresh = stub(tokenizer)
        fresh.edit([case.edit for case in cases[:done]])
        holds = [figures.successes("efficacy") for figures in measure(fresh.model, tokenizer, cases[:done])]
        expected += [Retained(done, stop, sum(holds[:stop]) / stop) for stop in stops]
    assert retained == expected
    for outcome, figures in zip(outcomes, measure(fresh.model, tokenizer, cases), strict=True):
        assert outcome.after == figures


@pytest.mark.parametrize(
    "options", [{"method": "emmet"}, {"preserve": True}, {"batch": 2}, {"layers": [1, 2]}], ids=str
)
def test_edits_that_know_of_each_other_are_one_call(tokenizer, cases, options):
    editor = stub(tokenizer)
    Evaluation(editor, options, fluency_tokens=0).together(cases, [1, 2])
    assert [len(edits) for edits, *_ in editor.calls] == [4]


def test_each_call_has_its_folder(tokenizer, cases, tmp_path):
    editor = stub(tokenizer)
    Evaluation(editor, fluency_tokens=0).together(cases, [1, 3], tmp_path)
    folders = [options["directory"] for *_, options in editor.calls]
    assert folders == [tmp_path / name for name in ("000000", "000001", "000003")]


@pytest.mark.parametrize("method", ["rome", "memit"])
def test_the_editor_itself(tokenizer, cases, tmp_path, method):
    model = small_model("llama", len(tokenizer))
    before = checksums(model)
    options = {"steps": 2, "learning_rate": 0.5}
    editor = Editor(
        model, tokenizer, corpus=TEXTS * 4, cache_dir=tmp_path / "cache", contexts=((3, 2),),
        value=ValueOptions(**options),
    )  # fmt: skip
    evaluation = Evaluation(
        editor, {"method": method, "layers": [1, 2][: 1 + (method == "memit")]}, fluency_tokens=0
    )
    outcomes, retained = evaluation.together(cases, [2], tmp_path / "run")
    assert checksums(model) == before and evaluation.weights_as_before()
    done = [4] if method == "memit" else [2, 4]
    assert sorted({item.edits for item in retained}) == done
    assert len(list((tmp_path / "run").iterdir())) == len(done)
    for outcome in outcomes:
        assert (
            outcome.reverted_exactly
            and outcome.steps == 2
            and outcome.before.margins != outcome.after.margins
        )
    again, _ = evaluation.together(cases, [2], tmp_path / "run")
    assert timeless(again) == timeless(outcomes)


def test_joint_methods_are_one_call(tokenizer, cases):
    editor = stub(tokenizer)
    _, retained = Evaluation(editor, {"method": "memit", "batch": 2}, fluency_tokens=0).together(cases, [2])
    assert [(len(edits), *call) for edits, *call in editor.calls] == [(4, "memit", {"batch": 2})]
    assert [(item.edits, item.first) for item in retained] == [(4, 2), (4, 4)]


def test_summary_is_that_of_brute_force(tokenizer, cases):
    outcomes = Evaluation(stub(tokenizer), fluency_tokens=6).each(cases)
    summary = summarise(outcomes)
    assert (summary["rows"], summary["skipped"], summary["reverted_exactly"]) == (4, 0, 4)
    for when, state in (("before", "unedited"), ("after", "edited")):
        figures, found = [getattr(outcome, when) for outcome in outcomes], summary[state]
        for aspect in ASPECTS:
            right = [[margin > 0 for margin in one.margins[aspect]] for one in figures]
            assert found[aspect] == pytest.approx(sum(sum(one) / len(one) for one in right) / 4)
            tokens = [sum(one.shares[aspect]) / len(one.shares[aspect]) for one in figures]
            assert found[f"{aspect}_tokens"] == pytest.approx(sum(tokens) / 4)
        three = [found[aspect] for aspect in ASPECTS]
        assert found["score"] == pytest.approx(0 if 0 in three else 3 / sum(1 / x for x in three))
        assert found["fluency"] == pytest.approx(sum(one.fluency for one in figures) / 4)
    unchanged = [outcome.after.unchanged(outcome.before) for outcome in outcomes]
    assert summary["edited"]["locality_unchanged"] == pytest.approx(sum(unchanged) / 4)
    assert summary["unedited"]["locality_unchanged"] == 1


def test_peak_memory_is_unknown_where_the_system_does_not_tell_it(monkeypatch):
    code = "import sys; sys.modules['resource'] = None; import engram_kernels.evaluation.run"
    subprocess.run([sys.executable, "-c", code], check=True)
    assert peak_memory(torch.device("cpu")) > 2**20
    monkeypatch.setitem(sys.modules, "resource", None)
    assert peak_memory(torch.device("cpu")) is None


def test_bad_numbers(tokenizer):
    with pytest.raises(ValueError, match="fluency_tokens: expected at least 0, got -1"):
        Evaluation(stub(tokenizer), fluency_tokens=-1)
    with pytest.raises(ValueError, match="batch_size: expected at least 1, got 0"):
        Evaluation(stub(tokenizer), batch_size=0)


# Reports


def timeless(outcomes):
    return [replace(outcome, seconds=None) for outcome in outcomes]


def test_a_run_is_gone_on_with(tokenizer, cases, tmp_path):
    path, settings, versions = tmp_path / "report.json", {"layers": (1,), "ridge": None}, {"torch": "2"}
    whole = Evaluation(stub(tokenizer), fluency_tokens=4).each(cases)

    def until_two(outcomes):
        report.write(outcomes)
        if len(outcomes) == 2:
            raise KeyboardInterrupt

    report = EvalReport(path, settings, versions)
    with pytest.raises(KeyboardInterrupt):
        Evaluation(stub(tokenizer), fluency_tokens=4).each(cases, keep=until_two)
    report = EvalReport(path, settings, versions)
    assert not report.complete and timeless(report.outcomes) == timeless(whole[:2])
    editor = stub(tokenizer)
    outcomes = Evaluation(editor, fluency_tokens=4).each(cases, report.outcomes, report.write)
    assert [edits for edits, *_ in editor.calls] == [[case.edit] for case in cases[2:]]
    assert timeless(outcomes) == timeless(whole)
    report.write(outcomes, [Retained(4, 2, 0.5)], summarise(outcomes))
    final = EvalReport(path, settings, versions)
    assert final.complete and final.outcomes == outcomes and final.retained == [Retained(4, 2, 0.5)]
    assert final.summary == summarise(outcomes)
    assert [item.name for item in tmp_path.iterdir()] == ["report.json"]


def test_reports_that_are_refused(tmp_path):
    path = tmp_path / "report.json"
    settings, versions = {"layers": [1], "ridge": None, "seed": 0}, {"torch": "2.13"}
    EvalReport(path, settings, versions).write([])
    before = path.read_bytes()
    for change, version, names in (
        ({"layers": [2]}, "2.13", "layers"),
        ({"ridge": 0.5, "seed": 1}, "2.13", "ridge, seed"),
        ({"new": None}, "2.13", "new"),
        ({}, "2.14", "torch"),
    ):
        with pytest.raises(ValueError, match=f"report: expected one of the same settings .* in {names}$"):
            EvalReport(path, settings | change, {"torch": version})
    assert path.read_bytes() == before
    for content in ("", "[]", '{"format": 1}', '{"format": 2}', '{"answers": 1}'):
        path.write_text(content)
        with pytest.raises(ValueError, match="report: expected a new file or an evaluation's report, got "):
            EvalReport(path, settings, versions)
        assert path.read_text() == content


def test_outcomes_survive_json(tokenizer, cases):
    for outcome in Evaluation(stub(tokenizer), fluency_tokens=3).each(cases):
        assert Outcome.read(json.loads(json.dumps(asdict(outcome)))) == outcome


# Pictures


def test_pictures(tmp_path):
    unedited = {name: 0.3 for name in plots.SHARES}
    retained = [Retained(edits, first, 0.9) for edits in (10, 50) for first in (10, 50) if first <= edits]
    pictures = []
    for edited, lines in ((0.8, []), (0.9, []), (0.8, retained), (0.8, retained[1:])):
        path = tmp_path / "eval.png"
        plots.evaluation(unedited, {name: edited for name in unedited}, path, lines, "title")
        pictures.append(path.read_bytes())
        assert pictures[-1][:8] == b"\x89PNG\r\n\x1a\n" and pictures[-1][-8:-4] == b"IEND"
    assert len(set(pictures)) == 4 and len(list(tmp_path.iterdir())) == 1
    with pytest.raises(ValueError, match="edited: expected at least one measure, got none"):
        plots.evaluation({}, {"fluency": 6.0}, tmp_path / "none.png")
    with pytest.raises(ValueError, match=r"expected a name that ends in \.png"):
        plots.evaluation(unedited, unedited, tmp_path / "none.jpg")


# The command line


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tokenizer):
    """A random Llama-like model with its tokenizer, rows and a corpus, as a user has them on disk."""
    path = tmp_path_factory.mktemp("model")
    small_model("llama", vocabulary=len(tokenizer)).save_pretrained(path)
    tokenizer.save_pretrained(path)
    (path / "corpus.txt").write_text("\n\n".join(TEXTS * 4))
    (path / "counterfact.json").write_text(json.dumps([EASY_EDIT, ROME, {**EASY_EDIT, "case_id": 8}]))
    (path / "zsre.jsonl").write_text("\n".join(map(json.dumps, [ZSRE, ZSRE_EASY_EDIT])))
    return path


@pytest.fixture
def engram(engram, monkeypatch, folder):
    monkeypatch.setenv("ENGRAM_CACHE", str(folder / "cache"))
    monkeypatch.setenv("ENGRAM_DATA", str(folder))
    return partial(engram, "eval", "--model", folder, "--device", "cpu", "--corpus", folder / "corpus.txt")


@pytest.fixture
def stubbed(monkeypatch):
    """`engram eval` with the stub in the editor's place."""
    made = []

    def editor(model, tokenizer, **options):
        made.append(StubEditor(model, tokenizer))
        made[-1].options = options
        return made[-1]

    monkeypatch.setattr("engram_kernels.editing.Editor", editor)
    return made


def test_the_command_edits_measures_and_reports(engram, folder, tmp_path):
    report, plot = tmp_path / "out.json", tmp_path / "out.png"
    status, out, err = engram(
        "--data", "counterfact.json", "--rows", "2", "--layer", "1", "--steps", "2", "--fluency", "5",
        "--report", report, "--plot", plot,
    )  # fmt: skip
    assert status == 0, err
    content = json.loads(report.read_text())
    summary = content["summary"]
    assert [row["case"] for row in content["rows"]] == ["7", "3"] and all(
        row["steps"] for row in content["rows"]
    )
    assert summary["reverted_exactly"] == 2 and summary["weights_as_before"] and summary["refused"] == []
    assert summary["peak_memory"] > 2**20 and 0 < content["rows"][0]["probability"] < 1
    assert content["settings"]["layers"] == [1] and content["settings"]["steps"] == 2
    assert {"engram_kernels", "torch", "transformers"} == content["versions"].keys()
    for text in ("efficacy", "fluency, bits", "Published figures", "examples/published.py", "2/2"):
        assert text in out
    network, tokenizer = load_model(folder)
    for row, case in zip(content["rows"], read_cases(folder / "counterfact.json", 0, 2).cases, strict=True):
        (figures,) = measure(network, tokenizer, [case])
        for aspect in ASPECTS:
            assert row["before"]["margins"][aspect] == pytest.approx(figures.margins[aspect])
    assert plot.read_bytes()[:4] == b"\x89PNG"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.json", "out.png"]


def test_the_command_goes_on_where_it_was_cut_off(engram, stubbed, tmp_path, monkeypatch):
    from engram_kernels.evaluation.report import EvalReport

    report, asked = tmp_path / "out.json", ("--data", "counterfact.json", "--fluency", "0")
    whole = tmp_path / "whole.json"
    assert engram(*asked, "--report", whole)[0] == 0
    write = EvalReport.write

    def cut_off(self, outcomes, *rest):
        write(self, outcomes, *rest)
        if len(outcomes) == 2:
            raise OSError("disk full")

    with monkeypatch.context() as patch:
        patch.setattr(EvalReport, "write", cut_off)
        status, _, err = engram(*asked, "--report", report)
    assert status == 1 and err == "Error: disk full\n"
    assert len(json.loads(report.read_text())["rows"]) == 2
    status, _, err = engram(*asked, "--report", report, "--seed", "1")
    assert (
        status == 1 and err.startswith("Error: report: expected one of the same settings") and "seed" in err
    )
    status, out, _ = engram(*asked, "--report", report)
    assert status == 0 and len(stubbed[-1].calls) == 1 and "3/3" in out
    contents = [json.loads(path.read_text()) for path in (report, whole)]
    for content in contents:
        for row in content["rows"]:
            del row["seconds"]
        del content["summary"]["median_seconds"], content["summary"]["peak_memory"]
    assert contents[0] == contents[1]
    before = report.read_bytes()
    status, again, _ = engram(*asked, "--report", report)
    assert status == 0 and stubbed[-1].calls == [] and report.read_bytes() == before and "3/3" in again
    assert "complete: nothing was measured again" in " ".join(again.split())


def test_the_command_edits_together(engram, stubbed, tmp_path):
    report = tmp_path / "out.json"
    status, out, err = engram(
        "--data", "zsre.jsonl", "--mode", "together", "--method", "memit", "--layer", "1", "--layer", "2",
        "--ridge", "0.5", "--batch", "7", "--preserve", "--conflicts", "last", "--failures", "skip",
        "--null-space", "0.1", "--checkpoint", "1", "--fluency", "0", "--report", report,
        "--plot", tmp_path / "out.png", "--bare-prompt-weight", "0.25", "--original-key", "--clamp", "3",
    )  # fmt: skip
    assert status == 0, err
    ((edits, method, options),) = stubbed[-1].calls
    assert len(edits) == 2 and method == "memit"
    assert options == {
        "ridge": 0.5, "batch": 7, "preserve": True, "null_space": 0.1, "conflicts": "last",
        "failures": "skip", "directory": tmp_path / "out.json.run" / "000000",
    }  # fmt: skip
    given = stubbed[-1].options
    assert (
        given["bare_prompt_weight"] == 0.25 and given["consistent_key"] is False and given["value"].clamp == 3
    )
    content = json.loads(report.read_text())
    assert [(item["edits"], item["first"]) for item in content["retention"]] == [(2, 1), (2, 2)]
    assert "first 1 of 2 edits: efficacy" in out and "GPT-J" not in out and "fluency" not in out


def test_a_run_of_edits_together_is_gone_on_with(engram, tmp_path, monkeypatch):
    report = tmp_path / "out.json"
    asked = (
        "--data", "zsre.jsonl", "--mode", "together", "--method", "memit", "--layer", "1", "--layer", "2",
        "--steps", "2", "--fluency", "0", "--report", report,
    )  # fmt: skip

    def cut_off(*_):
        raise OSError("cut off")

    with monkeypatch.context() as patch:
        patch.setattr(Evaluation, "_retained", cut_off)
        assert engram(*asked)[::2] == (1, "Error: cut off\n")
    assert [path.name for path in tmp_path.iterdir()] == ["out.json.run"]
    kept = sorted(path.name for path in (tmp_path / "out.json.run" / "000000").rglob("*.safetensors"))
    assert kept == ["000000.safetensors", "000000.safetensors", "000001.safetensors"]
    status, out, err = engram(*asked)
    assert status == 0 and "2/2" in out, err
    assert [path.name for path in tmp_path.iterdir()] == ["out.json"]


def test_the_command_where_peak_memory_is_unknown(engram, stubbed, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "resource", None)
    report = tmp_path / "out.json"
    status, out, err = engram("--data", "counterfact.json", "--fluency", "0", "--report", report)
    assert status == 0, err
    assert "unknown" in out and json.loads(report.read_text())["summary"]["peak_memory"] is None


def test_the_versions_need_no_metadata(monkeypatch):
    def missing(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", missing)
    assert versions()["engram_kernels"] == engram_kernels.__version__


def test_the_defaults(engram, stubbed):
    status, out, err = engram("--data", "zsre.jsonl", "--rows", "1", "--start", "1", "--fluency", "0")
    assert status == 0, err
    ((edits, method, options),) = stubbed[-1].calls
    assert [edit.subject for edit in edits] == ["São Paulo"] and method == "rome" and "1/1" in out
    assert options["ridge"] is None and options["failures"] == "raise" and CHECKPOINTS == (10, 50, 100)


BAD = {
    "no file": (("--data", "none.json"), "data: expected a file of rows"),
    "mode": (("--data", "zsre.jsonl", "--mode", "all"), "mode: expected one of each, together, got 'all'"),
    "start": (("--data", "zsre.jsonl", "--start", "2"), "start: expected from 0 to 1, the last row, got 2"),
    "fluency": (("--data", "zsre.jsonl", "--fluency", "-1"), "fluency: expected at least 0, got -1"),
    "plot": (("--data", "zsre.jsonl", "--plot", "x.jpg"), "plot: expected a name that ends in .png"),
    "report": (("--data", "zsre.jsonl", "--report", "no/such/x"), "report: expected a path in a folder"),
    "steps": (("--data", "zsre.jsonl", "--steps", "0"), "steps: expected at least 1, got 0"),
    "dtype": (("--data", "zsre.jsonl", "--dtype", "int4"), "dtype: "),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_sentence(engram, stubbed, name):
    arguments, message = BAD[name]
    status, _, err = engram(*arguments)
    assert status == 1 and err.startswith("Error: ") and message in err and err.count("\n") == 1
    assert all(not editor.calls for editor in stubbed)


def test_bad_rows_are_left_out_if_asked_for(engram, stubbed, folder, tmp_path):
    data = tmp_path / "rows.json"
    data.write_text(json.dumps([without(EASY_EDIT, "subject"), EASY_EDIT]))
    status, _, err = engram("--data", data, "--fluency", "0")
    assert status == 1 and "under 'subject' in row 0, got none" in err
    status, out, err = engram("--data", data, "--fluency", "0", "--skip-bad")
    assert status == 0, err
    assert "Left out: data: expected some text under 'subject' in row 0" in out and "1/1" in out
