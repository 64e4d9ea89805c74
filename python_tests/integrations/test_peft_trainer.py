"""Edits and grafts beside LoRA adapters; grafts and memories from transformers' Trainer."""

import copy
import json
import os
import random
import subprocess
import sys
import warnings
from functools import partial
from pathlib import Path

import model_zoo
import pytest
import torch
from editing_helpers import changed, small_editor, weights
from larimar_helpers import FACTS, encode, small_larimar
from transformers import TrainerCallback

from engram_kernels.editing import Edit, EditResult
from engram_kernels.editing.search.values import ValueOptions
from engram_kernels.errors import EngramError
from engram_kernels.grafting import Graft, graftable_parameters, localize
from engram_kernels.integrations.trainer import GraftCallback

IDS = torch.tensor([[5, 17, 200, 31, 8, 90, 41, 3]])
TOWER = Edit("The Eiffel Tower", "{} is located in the city of", "Rome")
TARGETS = {"llama": ["q_proj", "down_proj"], "gpt2": ["c_attn", "c_proj"]}
pytestmark = pytest.mark.usefixtures("one_thread")


@torch.no_grad()
def logits(model):
    return model(IDS).logits


@pytest.fixture
def make(cache):
    options = ValueOptions(steps=4, learning_rate=0.05, weight_decay=0.0)
    return partial(small_editor, cache_dir=cache, contexts=((4, 2),), value=options)


@pytest.fixture
def edited(make, tmp_path, request):
    """A base, and the folder of an edit of it."""
    editor = make(getattr(request, "param", "llama"))
    base = copy.deepcopy(editor.model)
    editor.edit(TOWER, layers=1).save_pretrained(tmp_path / "edit")
    return base, tmp_path / "edit"


def trained_lora(base, family, folder):
    """The folder of a LoRA of rank 3 with random factors, as a training would leave."""
    import peft

    settings = peft.LoraConfig(r=3, lora_alpha=6, target_modules=TARGETS[family], init_lora_weights=False)
    adapted = peft.get_peft_model(copy.deepcopy(base), settings)
    adapted.save_pretrained(folder)
    return folder


def with_sum(base, model, adapters):
    """A plain copy of the base, to whose weights the adapters' products are added, in fp64."""
    plain = copy.deepcopy(base)
    for name, module in model.get_base_model().named_modules():
        for adapter in adapters:
            if adapter in getattr(module, "lora_A", ()):
                product = module.lora_B[adapter].weight.double() @ module.lora_A[adapter].weight.double()
                weight = plain.get_submodule(name).weight
                change = module.scaling[adapter] * (product.T if module.fan_in_fan_out else product)
                with torch.no_grad():
                    weight.copy_(weight.double() + change)
    return plain


@pytest.mark.parametrize("edited", ["llama", "gpt2"], indirect=True)
def test_an_edit_beside_a_lora_is_the_sum_of_both(edited, tmp_path):
    peft = pytest.importorskip("peft")
    base, folder = edited
    family = base.config.model_type
    lora = trained_lora(base, family, tmp_path / "lora")
    model = peft.PeftModel.from_pretrained(copy.deepcopy(base), folder, adapter_name="edit")
    model.load_adapter(lora, adapter_name="style")
    model.base_model.set_adapter(["edit", "style"])
    model.eval()
    expected = logits(with_sum(base, model, ["edit", "style"]))
    alone = [logits(with_sum(base, model, [name])) for name in ("edit", "style")]
    assert min((expected - other).abs().max() for other in alone) > 1e-2
    torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-4)

    model.add_weighted_adapter(["edit", "style"], [1.0, 1.0], "both", combination_type="cat")
    model.set_adapter("both")
    torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-4)
    model.set_adapter("edit")
    torch.testing.assert_close(logits(model), alone[0], rtol=1e-4, atol=1e-4)
    model.unload()
    assert torch.equal(logits(model.get_base_model()), logits(base))


def random_graft(base, include=None, share=0.02, seed=3):
    """A graft of a model that was moved at random."""
    generator = torch.Generator().manual_seed(seed)
    pre = {name: p.detach() for name, p in graftable_parameters(base, include).items()}
    ft = {name: w + 0.3 * torch.randn(w.shape, generator=generator) for name, w in pre.items()}
    from engram_kernels import graft_top_k

    masks = graft_top_k(
        list(pre.values()), list(ft.values()), round(share * sum(map(torch.numel, pre.values())))
    )
    return Graft.from_masks(pre, ft, dict(zip(pre, masks, strict=True)))


@pytest.mark.parametrize("first", ["graft", "adapter"])
def test_an_edits_adapter_and_a_graft_come_and_go_in_any_order(edited, first):
    """The adapter leaves the base's weights alone, so neither minds the other."""
    peft = pytest.importorskip("peft")
    base, folder = edited
    graft, before, plain = random_graft(base), weights(base), copy.deepcopy(base)
    if first == "graft":
        applied = graft.apply(base)
        model = peft.PeftModel.from_pretrained(base, folder)
    else:
        model = peft.PeftModel.from_pretrained(base, folder)
        applied = graft.apply(model.get_base_model())
    model.eval()
    grafted = copy.deepcopy(plain)
    graft.merge_and_unload(grafted)
    torch.testing.assert_close(
        logits(model), logits(with_sum(grafted, model, ["default"])), rtol=1e-4, atol=1e-4
    )
    if first == "graft":
        applied.revert()
        torch.testing.assert_close(
            logits(model), logits(with_sum(plain, model, ["default"])), rtol=1e-4, atol=1e-4
        )
        base = model.unload()
    else:
        base = model.unload()
        assert torch.equal(logits(base), logits(grafted))
        applied.revert()
    assert not changed(before, base)


def test_a_graft_under_a_merged_adapter_is_not_undone(edited):
    peft = pytest.importorskip("peft")
    base, folder = edited
    applied = random_graft(base, share=0.5).apply(base)
    model = peft.PeftModel.from_pretrained(base, folder)
    model.merge_adapter()
    merged = weights(model)
    with pytest.raises(EngramError, match="expected the grafted weights as the graft left them"):
        applied.revert()
    assert not changed(merged, model) and applied.applied


def test_an_edit_in_the_weights_and_a_graft_elsewhere_come_and_go_in_any_order(edited):
    base, folder = edited
    before = weights(base)
    graft, edit = random_graft(base, ["*self_attn*"]), EditResult.from_pretrained(folder)
    for order in ((0, 1), (1, 0)):
        applied = graft.apply(base)
        edit.apply(base)
        undo = [applied.revert, edit.revert]
        for number in order:
            undo[number]()
        assert not changed(before, base)


def test_an_edit_and_a_graft_of_one_matrix_are_undone_the_last_one_first(edited, make):
    base, folder = edited
    before, edit = weights(base), EditResult.from_pretrained(folder)
    graft = random_graft(base, ["*layers.1.mlp.down_proj*"], share=0.5)
    applied = graft.apply(base)
    grafted = weights(base)
    with pytest.raises(EngramError, match="the weights that the edit was made for, got others"):
        edit.apply(base)
    assert not changed(grafted, base)

    result = make(model=base).edit(TOWER, layers=1)  # made for the grafted weights
    both = weights(base)
    with pytest.raises(EngramError, match="expected the grafted weights as the graft left them"):
        applied.revert()
    assert not changed(both, base)
    result.revert()
    applied.revert()
    assert not changed(before, base)

    edit.apply(base)
    written = weights(base)
    with pytest.raises(EngramError, match="the weights that the graft was made for, got others"):
        graft.apply(base)
    assert not changed(written, base)
    over = graft.apply(base, force=True)
    both = weights(base)
    with pytest.raises(EngramError, match="as this edit left it, got it changed since"):
        edit.revert()
    assert not changed(both, base)
    over.revert()
    edit.revert()
    assert not changed(before, base)


# -- grafts of a training ------------------------------------------------------------------------------------


def rows(count=16, length=10, seed=4):
    generator = random.Random(seed)
    drawn = [[generator.randrange(1, 400) for _ in range(length)] for _ in range(count)]
    return [{"input_ids": torch.tensor(ids), "labels": torch.tensor(ids)} for ids in drawn]


def loader(data, size=4):
    return torch.utils.data.DataLoader(data, batch_size=size)


def trainer(model, folder, callbacks, **settings):
    from transformers import Trainer, TrainingArguments

    arguments = TrainingArguments(
        **{
            "output_dir": str(folder),
            "per_device_train_batch_size": 4,
            "max_steps": 4,
            "learning_rate": 1e-2,
            "save_steps": 2,
            "report_to": [],
            "disable_tqdm": True,
            "use_cpu": True,
            "seed": 0,
            **settings,
        }
    )
    return Trainer(model=model, args=arguments, train_dataset=rows(), callbacks=callbacks)


def frozen_outside(model):
    """Only what a graft may change is trained."""
    inside = {id(parameter) for parameter in graftable_parameters(model).values()}
    for parameter in model.parameters():
        parameter.requires_grad_(id(parameter) in inside)
    return model


def largest(before, after, names, share):
    """The positions of the largest changes, by a plain sort in fp64."""
    changes = {name: (after[name].double() - before[name].double()).abs().flatten() for name in names}
    everything = torch.cat(list(changes.values()))
    count = round(share * len(everything))
    least = everything.sort(descending=True).values[count - 1]
    return {name: (change >= least).nonzero().flatten() for name, change in changes.items()}


def test_the_graft_of_a_training_holds_its_largest_changes(tmp_path):
    model = frozen_outside(model_zoo.small_model())
    before, base = weights(model), copy.deepcopy(model)
    callback = GraftCallback(sparsity=0.01, every=2, base_model="small")
    trainer(model, tmp_path, [callback], max_steps=8).train()
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*/graft")) == ["graft"] * 2
    assert not (tmp_path / "checkpoint-2" / "graft").exists()
    names = list(graftable_parameters(model))
    for folder, after in (
        (tmp_path / "graft", weights(model)),
        (tmp_path / "checkpoint-8" / "graft", weights(model)),
        (tmp_path / "checkpoint-4" / "graft", weights(base.from_pretrained(tmp_path / "checkpoint-4"))),
    ):
        graft = Graft.from_pretrained(folder)
        expected = largest(before, after, names, 0.01)
        assert graft.recipe == {"name": "largest", "sparsity": 0.01} and graft.base_model == "small"
        for name, at in expected.items():
            assert graft.indices.get(name, at[:0]).tolist() == at.tolist()
            if at.numel():
                assert torch.equal(graft.values[name], after[name].flatten()[at])
    assert Graft.from_pretrained(tmp_path / "graft").metrics == {"global_step": 8}
    assert callback.graft.size == round(0.01 * sum(before[name].numel() for name in names))
    with callback.graft.apply(base):
        assert changed(before, base)
    assert not changed(before, base)
    assert not list(tmp_path.glob("**/.*graft*"))


def test_a_graft_of_all_changes_is_the_trained_model(tmp_path):
    model = frozen_outside(model_zoo.small_model("gpt2"))
    base = copy.deepcopy(model)
    trainer(model, tmp_path, [GraftCallback(sparsity=1.0)]).train()
    Graft.from_pretrained(tmp_path / "graft").apply(base)
    assert not changed(weights(model), base)


@pytest.mark.parametrize("kind", ["model", "mapping", "folder", "text"])
def test_the_base_may_be_given(tmp_path, kind):
    model = frozen_outside(model_zoo.small_model())
    base = copy.deepcopy(model)
    base.save_pretrained(tmp_path / "base")
    given = {
        "model": base,
        "mapping": weights(base),
        "folder": tmp_path / "base",
        "text": str(tmp_path / "base"),
    }
    callback = GraftCallback(given[kind], sparsity=0.01)
    trainer(model, tmp_path / "out", [callback], save_strategy="no").train()
    expected = largest(weights(base), weights(model), list(graftable_parameters(model)), 0.01)
    assert {name: at.tolist() for name, at in callback.graft.indices.items()} == {
        name: at.tolist() for name, at in expected.items() if at.numel()
    }


def test_positions_may_be_learned(tmp_path):
    """What the callback finds in the midst of a training is what `localize` finds of the two models."""
    base = frozen_outside(model_zoo.small_model())
    settings = {"sparsity": 0.01, "steps": 5, "seed": 7}
    batches = list(loader(rows(8, seed=5)))
    plain = copy.deepcopy(base)
    trainer(plain, tmp_path / "plain", []).train()

    model = copy.deepcopy(base)
    shuffled = torch.utils.data.DataLoader(rows(8, seed=5), batch_size=8, shuffle=True)
    callback = GraftCallback(batches=shuffled, every=1, **settings)
    trainer(model, tmp_path / "out", [callback]).train()
    assert not changed(weights(plain), model)  # the training went on as if nothing had been looked for
    assert all(p.grad is None or p.requires_grad for p in model.parameters())

    model = copy.deepcopy(base)
    callback = GraftCallback(batches=batches, **settings)
    trainer(model, tmp_path / "again", [callback]).train()
    expected = localize(base, model, batches, **settings)
    assert callback.graft.indices.keys() == expected.indices.keys()
    for name, at in expected.indices.items():
        assert torch.equal(callback.graft.indices[name], at)
        assert torch.equal(callback.graft.values[name], expected.values[name])
    assert callback.graft.checksums == expected.checksums
    assert callback.graft.recipe == expected.recipe
    assert changed(weights(base), model)


def test_a_training_that_goes_on_needs_its_base(tmp_path):
    model = frozen_outside(model_zoo.small_model())
    base = copy.deepcopy(model)
    trainer(model, tmp_path, [], max_steps=2).train()
    again = copy.deepcopy(base)
    with pytest.raises(
        EngramError, match=r"base: expected the weights from before the training, .* step 2, got None"
    ):
        trainer(again, tmp_path, [GraftCallback(sparsity=0.01)]).train(resume_from_checkpoint=True)
    callback = GraftCallback(base, sparsity=0.01)
    trainer(again, tmp_path, [callback]).train(resume_from_checkpoint=True)
    whole = copy.deepcopy(base)
    trainer(whole, tmp_path / "whole", [from_start := GraftCallback(sparsity=0.01)]).train()
    assert callback.graft.checksums == from_start.graft.checksums
    callback.graft.apply(base)
    assert changed(weights(whole), base)


def test_an_earlier_graft_is_replaced_and_nothing_else(tmp_path):
    for steps in (1, 2):
        model = frozen_outside(model_zoo.small_model())
        trainer(model, tmp_path, [GraftCallback(sparsity=0.01)], max_steps=steps, save_strategy="no").train()
    assert Graft.from_pretrained(tmp_path / "graft").metrics == {"global_step": 2}
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "mine.txt").write_text("kept")
    callback = GraftCallback(sparsity=0.01, folder="notes")
    model = frozen_outside(model_zoo.small_model())
    before = weights(model)
    with pytest.raises(EngramError, match="folder: expected a new one, or a graft to replace, got"):
        trainer(model, tmp_path, [callback]).train()
    assert not changed(before, model) and (tmp_path / "notes" / "mine.txt").read_text() == "kept"


def test_what_is_trained_and_not_grafted_is_told(tmp_path):
    with pytest.warns(
        UserWarning, match="without [0-9]+ of the [0-9]+ parameters that are trained, such as 'lm_"
    ):
        trainer(
            model_zoo.small_model(), tmp_path, [GraftCallback(sparsity=0.01)], max_steps=1, save_strategy="no"
        ).train()
    model = frozen_outside(model_zoo.small_model())
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="the graft will be without")
        trainer(model, tmp_path, [GraftCallback(sparsity=0.01)], max_steps=1, save_strategy="no").train()


def other_shape(model):
    return {name: torch.zeros(2, 2) for name in dict(model.named_parameters())}


@pytest.mark.parametrize(
    ("base", "message"),
    [
        (lambda model: model, "base: expected weights that stay, got in .* those that are trained"),
        (lambda model: "nowhere", "base: expected safetensors at 'nowhere', got none that can be read"),
        (lambda model: {}, "base: expected a tensor 'model.layers.0.self_attn.q_proj.weight', got none"),
        (other_shape, r"base: expected \[32, 32\] of torch.float32 in .*, got \[2, 2\] of torch.float32"),
        (
            lambda model: copy.deepcopy(model).bfloat16(),
            r"base: expected \[32, 32\] of torch.float32 in .*, got \[32, 32\] of torch.bfloat16",
        ),
    ],
    ids=["the model itself", "nowhere", "empty", "another shape", "another dtype"],
)
def test_bases_that_are_not_there_stop_the_training_before_it_begins(tmp_path, base, message):
    model = frozen_outside(model_zoo.small_model())
    before = weights(model)
    with pytest.raises(EngramError, match=message):
        trainer(model, tmp_path, [GraftCallback(base(model))]).train()
    assert not changed(before, model) and not list(tmp_path.glob("*graft*"))


def test_models_that_cannot_be_grafted_stop_the_training_before_it_begins(tmp_path):
    peft = pytest.importorskip("peft")
    frozen = model_zoo.small_model().requires_grad_(False)
    frozen.lm_head.weight.requires_grad_(True)
    adapted = peft.get_peft_model(model_zoo.small_model(), peft.LoraConfig(target_modules=["q_proj"]))
    sharded = model_zoo.small_model()
    sharded.model.layers[0].mlp.down_proj.weight.ds_shape = (32, 64)
    for model, message in (
        (frozen, "model: expected graftable weights that are trained, got all of them frozen"),
        (adapted, "model: expected plain weights, got an adapter on .*q_proj"),
        (sharded, "model: expected whole weights in every process, got a part of .*layers.0.mlp.down_proj"),
    ):
        with pytest.raises(EngramError, match=message):
            trainer(model, tmp_path, [GraftCallback(sparsity=0.01)]).train()
    with pytest.raises(ValueError, match="sparsity: expected one weight or more, got 1e-09, which is none"):
        trainer(frozen_outside(model_zoo.small_model()), tmp_path, [GraftCallback(sparsity=1e-9)]).train()


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"sparsity": 2.0}, ValueError, "sparsity: expected at most 1, got 2.0"),
        ({"sparsity": "all"}, TypeError, "sparsity: expected a number, got str"),
        ({"every": 0}, ValueError, "every: expected at least 1, got 0"),
        ({"every": 1.5}, TypeError, "every: expected an integer, got float"),
        ({"folder": "../graft"}, ValueError, "folder: expected a name without folders, got '../graft'"),
        ({"folder": ""}, ValueError, "folder: expected a name without folders, got ''"),
        ({"folder": ".."}, ValueError, "folder: expected a name without folders, got '..'"),
        (
            {"batches": [], "pace": 3},
            TypeError,
            "options: expected some of accumulate, group, l1, .*, got pace",
        ),
        ({"steps": 3}, TypeError, "batches: expected some, as there are options of localize, got none"),
    ],
    ids=str,
)
def test_arguments_that_cannot_be_used(arguments, error, message):
    with pytest.raises(error, match=message):
        GraftCallback(**arguments)


# -- memories ------------------------------------------------------------------------------------------------

HELPERS = Path(model_zoo.__file__).parent
LAUNCHERS = {
    1: ["accelerate.commands.accelerate_cli", "launch", "--cpu", "--num_processes", "1"],
    2: ["torch.distributed.run", "--standalone", "--nproc_per_node", "2"],
}


@pytest.mark.slow
@pytest.mark.parametrize("processes", LAUNCHERS)
def test_a_memory_is_trained_under_a_launcher(tmp_path, processes):
    """In several processes alike, with evaluation, checkpoints, the best one at the end, and grafts."""
    pytest.importorskip("accelerate")
    from engram_kernels.larimar.model import LarimarModel

    script = Path(__file__).with_name("train_memory.py")
    command = [sys.executable, "-m", *LAUNCHERS[processes], str(script), str(tmp_path)]
    # The script needs the helpers, and a launcher knows nothing of pytest's path.
    path = os.pathsep.join(filter(None, (str(HELPERS), os.environ.get("PYTHONPATH"))))
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": path}
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    reports = [json.loads(path.read_text()) for path in sorted(tmp_path.glob("report-*.json"))]
    assert len(reports) == processes
    for report in reports:
        assert report["processes"] == processes and report["after"] < 0.9 * report["before"]
        assert report["weights"] == reports[0]["weights"]
    model = LarimarModel.from_pretrained(tmp_path / "model")
    best = LarimarModel.from_pretrained(tmp_path / "checkpoint-8")
    assert not changed(weights(best), model)
    for folder in ("graft", "checkpoint-4/graft", "checkpoint-8/graft"):
        graft = Graft.from_pretrained(tmp_path / folder)
        assert graft.size and all(name.startswith("decoder.model.layers.") for name in graft.shapes)
    for name, at in graft.indices.items():
        assert torch.equal(model.get_parameter(name).detach().flatten()[at], graft.values[name])


def test_a_memory_is_evaluated_and_predicts_under_the_trainer(tmp_path):
    from transformers import Trainer, TrainingArguments

    from engram_kernels.larimar import EpisodeCollator, FactEpisodes

    model, episodes = small_larimar(), FactEpisodes(FACTS, encode, sizes=(1, 3))
    collator = EpisodeCollator(model_zoo.byte_level_tokenizer())
    settings = {"remove_unused_columns": False, "report_to": [], "disable_tqdm": True, "use_cpu": True}
    arguments = TrainingArguments(str(tmp_path), per_device_eval_batch_size=5, **settings)
    found = Trainer(model=model, args=arguments, data_collator=collator).predict(episodes)
    with torch.no_grad():
        expected = model(**collator([episodes[i] for i in range(len(FACTS))]))
    assert found.metrics["test_loss"] == pytest.approx(expected.loss.item(), rel=1e-6)
    torch.testing.assert_close(torch.from_numpy(found.predictions), expected.logits)


def test_only_the_main_process_writes_a_memory(tmp_path):
    small_larimar().save_pretrained(tmp_path / "model", is_main_process=False)
    assert not (tmp_path / "model").exists()


class Unfreezing(TrainerCallback):
    """Trains the last layer alone at first, and all of them from the second step on."""

    def on_train_begin(self, args, state, control, model, **_kwargs):
        model.model.layers[:-1].requires_grad_(False)

    def on_step_begin(self, args, state, control, model, **_kwargs):
        if state.global_step == 1:
            for layer in model.model.layers:
                layer.requires_grad_(True)


def test_weights_that_are_unfrozen_on_the_way_have_their_base(tmp_path):
    model = frozen_outside(model_zoo.small_model())
    base = copy.deepcopy(model)
    callbacks = [Unfreezing(), GraftCallback(sparsity=1.0)]
    trainer(model, tmp_path, callbacks, max_steps=3, save_strategy="no").train()
    assert any(name.startswith("model.layers.0.") for name in changed(weights(base), model))
    Graft.from_pretrained(tmp_path / "graft").apply(base)
    assert not changed(weights(base), model)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"recipe": "nope"}, "recipe: expected one of"),
        ({"steps": 0}, "steps: expected at least"),
        ({"batches": 5}, "batches: expected some, got int"),
        ({"batches": iter([{}]), "steps": 1, "every": 1}, "batches: expected some that can be gone through"),
        ({"folder": "checkpoint-4"}, "folder: expected a name that is not checkpoint's"),
    ],
)
def test_what_the_end_would_refuse_is_refused_at_once(options, message):
    with pytest.raises((TypeError, ValueError), match=message):
        GraftCallback(**{"batches": [{}], **options})


def test_an_earlier_training_leaves_no_graft_in_a_checkpoint(tmp_path):
    for every in (1, 2):
        model = frozen_outside(model_zoo.small_model())
        callback = GraftCallback(sparsity=0.01, every=every)
        trainer(model, tmp_path, [callback], max_steps=2, save_strategy="steps", save_steps=1).train()
    assert not (tmp_path / "checkpoint-1" / "graft").exists()
    assert Graft.from_pretrained(tmp_path / "checkpoint-2" / "graft").metrics == {"global_step": 2}


def test_files_beside_a_grafts_own_are_not_deleted(tmp_path):
    (tmp_path / "graft").mkdir()
    for name in ("graft_config.json", "notes.txt"):
        (tmp_path / "graft" / name).write_text("mine")
    with pytest.raises(EngramError, match="folder: expected a new one, or a graft to replace"):
        trainer(frozen_outside(model_zoo.small_model()), tmp_path, [GraftCallback(sparsity=0.01)]).train()
    assert (tmp_path / "graft" / "notes.txt").read_text() == "mine"


def test_a_training_that_changes_nothing_leaves_no_graft(tmp_path):
    model = frozen_outside(model_zoo.small_model())
    with pytest.warns(UserWarning, match="no graft was saved at step .*: ft: expected values that differ"):
        trainer(model, tmp_path, [callback := GraftCallback(sparsity=0.01)], learning_rate=0.0).train()
    assert callback.graft is None and not list(tmp_path.glob("*graft*"))
