"""ALBERT in Hugging Face's Trainer: its LR tuned at N = 1, swept over N, and a checkpoint that is loaded again.

    python albert.py     # N is num_hidden_layers: ALBERT applies one layer again and again
"""

import sysconfig
from pathlib import Path

import torch
from transformers import AlbertConfig, AlbertForMaskedLM, Trainer, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint

import looptransfer as lt

MASK, STEPS = 64, 60


def rows(count: int, seed: int) -> list[dict[str, torch.Tensor]]:
    """A number again and again, half of it noise; every fourth place is hidden, and is what the model has to tell."""
    generator, hidden = torch.Generator().manual_seed(seed), torch.arange(16) % 4 == 2
    number, noise = (torch.randint(64, (count, places), generator=generator) for places in (1, 16))
    texts = torch.where(torch.rand(count, 16, generator=generator) < 0.5, number, noise)
    return [{"input_ids": x.masked_fill(hidden, MASK), "labels": x.masked_fill(~hidden, -100)} for x in texts]


def train(run) -> float:
    torch.manual_seed(run.seed)
    sizes = {"embedding_size": 16, "hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2,
             "initializer_range": 0.1}
    model = AlbertForMaskedLM(AlbertConfig(vocab_size=65, num_hidden_layers=run.loops, **sizes))
    data, held_out = rows(1024, run.seed), rows(256, 10**6)
    lt.parametrize(model, {"input_ids": data[0]["input_ids"][None]}, run.rule)  # looptransfer
    groups = lt.param_groups(model, torch.optim.AdamW, lr=run.lr, weight_decay=0.01)  # looptransfer
    settings = TrainingArguments(
        run.directory, max_steps=STEPS, per_device_train_batch_size=16, warmup_steps=5, seed=run.seed, save_steps=20,
        save_total_limit=1, logging_strategy="no", report_to="none", disable_tqdm=True, use_cpu=run.device == "cpu",
    )  # fmt: skip
    # Given an optimizer, Trainer leaves its groups alone; its schedules multiply the LR of each.
    trainer = Trainer(model, settings, train_dataset=data, eval_dataset=held_out,
                      optimizers=(torch.optim.AdamW(groups), None))  # fmt: skip
    trainer.train(resume_from_checkpoint=get_last_checkpoint(run.directory))  # goes on where a killed run was
    trainer.save_model(run.directory)  # the plan is in its config.json
    return trainer.evaluate()["eval_loss"]


if __name__ == "__main__":
    best = lt.tune(train, loops=1, seeds=2, ledger="albert.db")
    results = lt.sweep(train, [1, 2, 4], around=best, octaves=[-1, 0, 1], seeds=2, ledger="albert.db")
    print(lt.check(results, transferred_lr=best.lr))
    run = lt.Trial("factored", 4, best.lr, 0, "cpu", Path("albert"))
    loss = train(run)
    model = AlbertForMaskedLM.from_pretrained("albert")  # warns: a plain model, as transformers alone knows it
    lt.apply_plan(model)
    trainer = Trainer(model, TrainingArguments("again", report_to="none"), eval_dataset=rows(256, 10**6))
    print(f"loss {loss:.6f} as trained, {trainer.evaluate()['eval_loss']:.6f} as loaded")
