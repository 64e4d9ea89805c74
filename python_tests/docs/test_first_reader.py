"""Five programs of somebody who knows transformers and has read README and docs, and nothing else."""

import warnings

import pytest
import torch
from grafting_helpers import tuned as fine_tuned

pytestmark = pytest.mark.usefixtures("one_thread", "desk")


@pytest.fixture(autouse=True)
def unmoved():
    """A random model does not learn what it is told, and says so."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "1 of 1 edits did not take", UserWarning)
        yield


# Steps that suit a random model of 32 dimensions; a real one is edited without.
SMALL = {"steps": 10, "learning_rate": 0.02, "weight_decay": 0.0}


def bits(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_edit_a_fact_check_it_and_undo_it():
    from engram_kernels.editing import Edit, Editor, ValueOptions, load_model

    model, tokenizer = load_model("smollm2")
    before = bits(model)
    editor = Editor(model, tokenizer, value=ValueOptions(**SMALL))
    told = ["To see {}, tourists travel to the city of"]
    result = editor.edit(Edit("The Eiffel Tower", "{} is located in the city of", "Rome", paraphrases=told))
    record = result.records[0]
    assert record.took in (True, False) and len(record.reached) == 2
    assert record.probability_after > record.probability_before
    assert not same(before, bits(model))
    result.revert()
    assert same(before, bits(model))

    # Or for the time of a block.
    with editor.edit(Edit("The Eiffel Tower", "{} is located in the city of", "Rome")):
        assert not same(before, bits(model))
    assert same(before, bits(model))


def test_edit_by_rome_at_a_layer_and_export_an_adapter_for_peft():
    peft = pytest.importorskip("peft")

    from engram_kernels.editing import Edit, Editor, ValueOptions, load_model

    model, tokenizer = load_model("smollm2")
    edit = Edit("The Eiffel Tower", "{} is located in the city of", "Rome")
    editor = Editor(model, tokenizer, value=ValueOptions(**SMALL))
    result = editor.edit(edit, layers=5, method="rome")
    assert result.modules == ["model.layers.5.mlp.down_proj"]
    result.save_pretrained("tower-in-rome")

    ids = tokenizer("The Eiffel Tower is located in the city of", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        edited = model(ids).logits
        result.revert()
        unedited = model(ids).logits
        adapted = peft.PeftModel.from_pretrained(model, "tower-in-rome")(ids).logits
    assert torch.allclose(adapted, edited, atol=1e-4)
    assert not torch.allclose(adapted, unedited, atol=1e-2)


def test_make_a_graft_of_two_state_dicts_apply_it_and_undo_it():
    from engram_kernels.editing import load_model
    from engram_kernels.grafting import Graft

    base, _ = load_model("smollm2")
    tuned = fine_tuned(base).state_dict()
    for name in list(tuned)[3:]:
        tuned[name] = base.state_dict()[name]  # the training changed three tensors
    before = bits(base)

    graft = Graft.from_difference(base.state_dict(), tuned)
    graft.save_pretrained("skill")
    with Graft.from_pretrained("skill").apply(base):
        assert same(bits(base), tuned)
    assert same(bits(base), before)


def test_store_facts_in_a_memory_and_query_it():
    from engram_kernels.memory import EpisodicMemory, load_encoder

    encoder = load_encoder("minilm")
    texts = ["The Louvre is in Madrid.", "The capital of Atlantis is Poseidonia."]
    memory = EpisodicMemory(slots=encoder.latent, latent=encoder.latent, encoder="minilm")
    memory.write(encoder.encode(texts), ids=["louvre", "atlantis"], texts=texts)
    memory.save_pretrained("facts")

    memory = EpisodicMemory.from_pretrained("facts")
    (best, *_) = memory.recall(encoder.encode(["What is the capital of Atlantis?"]))[0]
    assert best.name == "atlantis" and best.known and best.entry.text == texts[1]
    memory.forget(ids=["atlantis"])
    assert memory.ids == ["louvre"]


def test_the_operators_in_an_editing_loop_of_ones_own():
    import engram_kernels as ek
    from engram_kernels.editing import load_model

    model, tokenizer = load_model("smollm2")
    projection = model.model.layers[5].mlp.down_proj
    rows = []
    hook = projection.register_forward_pre_hook(lambda _, inputs: rows.append(inputs[0].flatten(0, 1)))
    with torch.no_grad():
        for text in ["The Eiffel Tower is located in the city of Paris.", "Rome lies in Italy."] * 2:
            model(**tokenizer(text, return_tensors="pt"))
    hook.remove()

    size = projection.in_features
    moment = torch.zeros(size, size, dtype=torch.float64)
    for inputs in rows:
        ek.second_moment_(moment, inputs)
    covariance = ek.Covariance.from_second_moment(moment, count=sum(map(len, rows)), ridge=0.1)

    kept = projection.weight.detach().clone()
    keys, values = rows[0][[4, 9]], torch.randn(2, projection.out_features)
    with torch.no_grad():
        left, right = ek.low_rank_factors(projection.weight, keys, values, covariance)
        ek.apply_low_rank_(projection.weight, left, right)
        assert torch.allclose(keys @ projection.weight.T, values, atol=1e-3)
        projection.weight.copy_(kept)
