"""mergekit's own joining of saved tensors, in a process of its own: it asks for other versions than ours.

python run_mergekit.py FOLDER: `base.safetensors`, `0.safetensors`, … and `cases.json` there are read, and one
file is written for each case.
"""

import json
import sys
import time
from pathlib import Path

import torch
from mergekit.architecture import WeightInfo
from mergekit.common import ImmutableMap, ModelReference
from mergekit.merge_methods.generalized_task_arithmetic import GTATask
from mergekit.merge_methods.registry import REGISTERED_MERGE_METHODS
from mergekit.sparsify import RescaleNorm, magnitude
from safetensors.torch import load_file, save_file


def join(case: dict, base: dict, others: list[dict]) -> dict:
    known, joined = REGISTERED_MERGE_METHODS[case["method"]], {}
    references = [ModelReference.model_validate(f"model-{i}") for i in range(len(others) + 1)]
    torch.manual_seed(case["seed"])
    for name, tensor in base.items():
        own = {"density": case["density"]}
        if case["method"].startswith("della"):
            own["epsilon"] = case["epsilon"]
        told = zip(references[1:], case["weights"], strict=True)
        task = GTATask.model_construct(
            method=known,
            tensors=None,
            base_model=references[0],
            weight_info=WeightInfo(name=name),
            tensor_parameters=ImmutableMap({r: ImmutableMap({"weight": w, **own}) for r, w in told}),
            int8_mask=False,
            lambda_=case["scale"],
            rescale_norm=RescaleNorm.l1 if known.default_rescale else None,
            normalize=known.default_normalize,
        )
        given = [tensor, *(other[name] for other in others)]
        joined[name] = task.execute(dict(zip(references, given, strict=True))).contiguous()
    return joined


def main(folder: Path) -> None:
    base = load_file(folder / "base.safetensors")
    others = [load_file(folder / f"{i}.safetensors") for i in range(len(list(folder.glob("[0-9].*"))))]
    for number, case in enumerate(json.loads((folder / "cases.json").read_text())):
        start = time.perf_counter()
        if case["method"] == "trim":
            joined = {name: magnitude(others[0][name] - base[name], case["density"]) for name in base}
        else:
            joined = join(case, base, others)
        seconds = time.perf_counter() - start
        save_file(joined, folder / f"joined-{number}.safetensors", {"seconds": str(seconds)})


main(Path(sys.argv[1]))
