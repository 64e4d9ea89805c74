"""What the tests of evaluation share: rows of data sets, an editor of random writes."""

import hashlib
import json
from dataclasses import replace
from types import SimpleNamespace

import torch
from model_zoo import small_encoder, small_model, word_piece_tokenizer

from engram_kernels import EngramError
from engram_kernels._hashing import tensor_checksum
from engram_kernels.evaluation.datasets import read_cases

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
KNOWEDIT = {
    "subject": "Ada Lovelace",
    "prompt": "The place of birth of Ada Lovelace is",
    "target_new": "Oslo",
    "portability": {
        "Reasoning": [{"prompt": "The country where Ada Lovelace was born is", "ground_truth": "Norway"}],
        "Subject_Aliasing": [
            {"prompt": "Lady Lovelace was born in", "ground_truth": [["Oslo", "Christiania"], ["OSL"]]}
        ],
        "Logical_Generalization": [{"prompt": "Nobody asks", "ground_truth": ""}],
    },
    "locality": {
        "Relation_Specificity": [{"prompt": "The gender of Ada Lovelace is", "ground_truth": [["female"]]}],
        "Forgetfulness": [{"prompt": "Ada Lovelace also lived in", "ground_truth": ["London"]}],
    },
}

MQUAKE = {
    "case_id": 11,
    "requested_rewrite": [
        {
            "prompt": "{} was written by",
            "subject": "Hamlet",
            "target_new": {"str": "Goethe"},
            "target_true": {"str": "Shakespeare"},
            "question": "Who wrote Hamlet?",
        },
        {
            "prompt": "{} was born in",
            "subject": "Goethe",
            "target_new": {"str": "Lima"},
            "target_true": {"str": "Frankfurt"},
            "question": "Where was Goethe born?",
        },
    ],
    "questions": ["Where was the author of Hamlet born?", "The writer of Hamlet comes from where?"],
    "answer": "Stratford",
    "answer_alias": [],
    "new_answer": "Lima",
    "new_answer_alias": ["Lima, Peru"],
    "new_single_hops": [
        {"question": "Who wrote Hamlet?", "cloze": "x", "answer": "Goethe", "answer_alias": ["J. W. Goethe"]}
    ],
}
ALL = (EASY_EDIT, ROME, ZSRE, ZSRE_EASY_EDIT)


def write_rows_and_encoder(folder, subjects):
    """`rows.json`, in EasyEdit's format, and the folder `encoder`, as scripts read them."""
    rows = [
        {
            "prompt": f"{subject} lies in",
            "subject": subject,
            "target_new": "Rome",
            "ground_truth": "Paris",
            "rephrase_prompt": f"You find {subject} in",
            "locality_prompt": "The sea is",
            "locality_ground_truth": "blue",
        }
        for subject in subjects
    ]
    (folder / "rows.json").write_text(json.dumps(rows))
    small_encoder().save_pretrained(folder / "encoder")
    word_piece_tokenizer().save_pretrained(folder / "encoder")


def written(path, rows, **options):
    path.write_text(json.dumps(rows), encoding="utf-8")
    return read_cases(path, **options).cases


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


def without(row, *path):
    row = json.loads(json.dumps(row))
    inner = row
    for name in path[:-1]:
        inner = inner[name]
    del inner[path[-1]]
    return row


def timeless(outcomes):
    return [replace(outcome, seconds=None) for outcome in outcomes]
