"""A small training of a memory model, for a launcher: `accelerate launch train_memory.py out`."""

import json
import sys
from pathlib import Path

import model_zoo
import torch
from larimar_helpers import FACTS, encode, small_larimar
from transformers import Trainer, TrainingArguments

from engram_kernels.integrations.trainer import GraftCallback
from engram_kernels.larimar import EpisodeCollator, FactEpisodes, Objective


def main(out: Path) -> None:
    torch.manual_seed(0)
    model = small_larimar(moved=False, train_decoder=True)
    model.objective = Objective(autoencoding=0.5, kl=1e-4, plain=0.5)
    episodes = FactEpisodes(FACTS, encode, sizes=(1, 3))
    collator = EpisodeCollator(model_zoo.byte_level_tokenizer())
    arguments = TrainingArguments(
        output_dir=str(out),
        per_device_train_batch_size=2,
        max_steps=8,
        learning_rate=1e-2,
        save_steps=4,
        eval_strategy="steps",
        eval_steps=4,
        load_best_model_at_end=True,
        remove_unused_columns=False,
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
        seed=0,
    )
    batches = [collator([episodes[i] for i in range(len(FACTS))])]
    graft = GraftCallback(sparsity=0.01, batches=batches, every=1, include=["decoder.model.layers.*"])
    trainer = Trainer(
        model=model,
        args=arguments,
        train_dataset=episodes,
        eval_dataset=episodes,
        data_collator=collator,
        callbacks=[graft],
    )
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    after = trainer.evaluate()["eval_loss"]
    trainer.accelerator.unwrap_model(trainer.model).save_pretrained(
        out / "model", is_main_process=trainer.accelerator.is_main_process
    )
    weights = sum(weight.double().sum().item() for weight in trainer.model.parameters())
    report = {"processes": arguments.world_size, "before": before, "after": after, "weights": weights}
    (out / f"report-{arguments.process_index}.json").write_text(json.dumps(report))
    if torch.distributed.is_initialized():
        # Together: a process that ends while another still talks to it is aborted.
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
