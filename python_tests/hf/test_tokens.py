"""Where the subject and the target lie among the tokens, for every kind of tokenizer."""

import pytest

pytest.importorskip("transformers")

import model_zoo

from engram_kernels.cli.edit import _answers
from engram_kernels.editing.search.prefixes import sample_prefixes
from engram_kernels.grafting import PromptTask
from engram_kernels.hf.tokens import encode_row, open_ids, pad_rows
from engram_kernels.larimar import ScopedModel

CASES = [
    ("Eiffel Tower", "The {} is located in the city of", "Rome", ""),
    ("The Eiffel Tower", "{} is located in the city of", "Rome", ""),
    ("東京", "{} lies in", "Japan", "I think. "),
    ("São Paulo", "{}, lies in", "unbelievable", "The maps show. "),
    ("Rome", "Where is {}? In ", "Italy", ""),
    ("Zürich", "The city {}'s maps show", "São Paulo", "{ and } and {}. "),
]


@pytest.fixture(scope="module", params=model_zoo.TOKENIZERS)
def tokenizer(request):
    return model_zoo.TOKENIZERS[request.param]()


def squeezed(tokenizer, ids):
    """Decoded text without what a tokenizer may change: spaces, case and accents."""
    text = tokenizer.decode(ids, skip_special_tokens=True).lower()
    for accented, plain in (("ã", "a"), ("ü", "u")):
        text = text.replace(accented, plain)
    return "".join(text.split())


def plain(text):
    return "".join(text.lower().replace("ã", "a").replace("ü", "u").split())


@pytest.mark.parametrize("subject, prompt, target, prefix", CASES)
def test_subject_ends_where_the_text_says(tokenizer, subject, prompt, target, prefix):
    row = encode_row(tokenizer, subject, prompt, target, prefix)
    assert plain(subject) in squeezed(tokenizer, row.ids[: row.subject + 1])
    assert plain(subject) not in squeezed(tokenizer, row.ids[: row.subject])


@pytest.mark.parametrize("subject, prompt, target, prefix", CASES)
def test_target_is_the_tail(tokenizer, subject, prompt, target, prefix):
    row = encode_row(tokenizer, subject, prompt, target, prefix)
    assert squeezed(tokenizer, row.ids[row.target :]) == plain(target)
    assert row.subject < row.target < len(row.ids)


def test_no_target_leaves_the_prompt_open(tokenizer):
    row = encode_row(tokenizer, "Rome", "{} is a")
    assert row.target == len(row.ids)
    assert squeezed(tokenizer, row.ids).endswith("romeisa")


def test_beginning_of_text_token_stays_and_closing_token_goes(tokenizer):
    row = encode_row(tokenizer, "Rome", "{} is a", "city")
    ids = tokenizer("Rome is a city")["input_ids"]
    assert row.ids[0] == ids[0]
    assert row.ids[-1] != tokenizer.eos_token_id


def test_open_ids_are_the_beginning_and_the_text(tokenizer):
    for text in ("Rome is a", "東京 lies in", "The"):
        plain = tokenizer(text, add_special_tokens=False)["input_ids"]
        begin = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
        assert open_ids(tokenizer, text) == begin + plain


def test_open_ids_of_nothing_are_the_beginning():
    tokenizer = model_zoo.word_piece_tokenizer()
    assert open_ids(tokenizer, "") == [tokenizer.bos_token_id]


def test_a_space_at_the_end_is_no_closing_token():
    """Some tokenizers leave spaces out of their offsets, so that such a token seems empty."""
    from tokenizers import processors

    tokenizer = model_zoo.byte_level_tokenizer()
    tokenizer.backend_tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    assert open_ids(tokenizer, "Rome ") == tokenizer("Rome ")["input_ids"]


def prefixes_read(model, tokenizer, text):
    sample_prefixes(model, tokenizer, [(5, 1)], seed=0)


def answers_read(model, tokenizer, text):
    _answers(model, tokenizer, open_ids(tokenizer, text))


def task_reads(model, tokenizer, text):
    task = PromptTask(tokenizer, "{}", ["a", "the"])
    task.logits(model, task.batches([(0, text)], 1)[0])


def scoped_reads(model, tokenizer, text):
    generate = model.generate
    model.generate = lambda *inputs, readout, **options: generate(*inputs, **options)
    ScopedModel(model, tokenizer, None, None).generate([text], None, max_new_tokens=1)


@pytest.mark.parametrize("reads", [prefixes_read, answers_read, task_reads, scoped_reads])
def test_no_closing_token_is_read(reads):
    tokenizer, text = model_zoo.word_piece_tokenizer(), "The"
    model, seen = model_zoo.small_model(vocabulary=len(tokenizer)), []
    model.base_model.register_forward_pre_hook(
        lambda _module, _inputs, given: seen.append(given["input_ids"]), with_kwargs=True
    )
    reads(model, tokenizer, text)
    plain = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert seen[0].tolist() == [[tokenizer.bos_token_id, *plain]]


def test_padding_side_of_the_tokenizer_does_not_matter():
    tokenizer = model_zoo.byte_level_tokenizer()
    right = encode_row(tokenizer, *CASES[0][:3])
    tokenizer.padding_side = "left"
    tokenizer.pad_token = tokenizer.eos_token
    assert encode_row(tokenizer, *CASES[0][:3]) == right


def test_character_of_several_tokens_ends_with_its_last_byte():
    tokenizer = model_zoo.byte_level_tokenizer()
    row = encode_row(tokenizer, "東京", "{} lies in", "Japan")
    assert row.subject == 5


def test_slow_tokenizer_merging_over_the_end_of_the_subject():
    tokenizer = model_zoo.slow_tokenizer()
    row = encode_row(tokenizer, "Tower", "{} is", "Rome")
    # "Tower" is cut as "To", "we", "r ": the last one reaches beyond it.
    assert tokenizer.decode([row.ids[row.subject]]) == "r "


def test_a_slow_tokenizers_empty_text_keeps_what_begins_it():
    tokenizer = model_zoo.slow_tokenizer()
    assert open_ids(tokenizer, "") == list(tokenizer("")["input_ids"])[:1]


def test_pad_rows():
    ids, mask = pad_rows([[1, 2, 3], [4]])
    assert ids.tolist() == [[1, 2, 3], [4, 0, 0]]
    assert mask.tolist() == [[1, 1, 1], [1, 0, 0]]
