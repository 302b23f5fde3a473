"""ALBERT in Hugging Face's Trainer: its LR tuned at N = 1 and swept over N, watched, its checkpoint loaded again.

python albert.py     # N is num_hidden_layers: ALBERT applies one layer again and again
"""

from pathlib import Path

import torch
from transformers import AlbertConfig, AlbertForSequenceClassification, PrinterCallback, Trainer, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint

import looptransfer as lt


def rows(count: int, seed: int) -> list[dict[str, torch.Tensor]]:
    """Sixteen numbers below 64, about half of them of one remainder modulo 8: the class of the row."""
    generator = torch.Generator().manual_seed(seed)
    classes = torch.randint(8, (count, 1), generator=generator)
    numbers = torch.randint(64, (count, 16), generator=generator)
    numbers = torch.where(torch.rand(count, 16, generator=generator) < 0.5, numbers // 8 * 8 + classes, numbers)
    return [{"input_ids": row, "labels": label} for row, label in zip(numbers, classes[:, 0], strict=True)]


class WatchedTrainer(Trainer):
    def log(self, logs, *others) -> None:
        super().log(logs | self.monitor(self.state.global_step), *others)


def trainer_of(model, run, optimizer=None) -> Trainer:
    settings = {"max_steps": 60, "per_device_train_batch_size": 16, "warmup_steps": 5, "save_steps": 20}
    settings |= {"seed": run.seed, "use_cpu": run.device == "cpu", "report_to": "none", "disable_tqdm": True}
    data = {"train_dataset": rows(1024, run.seed), "eval_dataset": rows(256, 10**6)}
    trainer = WatchedTrainer(model, TrainingArguments(run.directory, **settings), **data, optimizers=(optimizer, None))
    row = {name: value[None].to(run.device) for name, value in rows(1, 10**6)[0].items()}
    trainer.monitor = lt.Monitor(model, row, 1, lambda output: output.loss)  # whenever Trainer logs, logging_steps
    trainer.remove_callback(PrinterCallback)
    return trainer


def train(run) -> float:
    torch.manual_seed(run.seed)
    sizes = {"embedding_size": 16, "hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2}
    config = AlbertConfig(vocab_size=64, num_hidden_layers=run.loops, num_labels=8, initializer_range=0.1, **sizes)
    model = AlbertForSequenceClassification(config)
    lt.parametrize(model, {"input_ids": torch.zeros(1, 16, dtype=torch.long)}, run.rule)
    groups = lt.param_groups(model, torch.optim.AdamW, lr=run.lr, weight_decay=0.01)
    trainer = trainer_of(model, run, torch.optim.AdamW(groups))  # keeps the groups; its schedules multiply each LR
    trainer.train(resume_from_checkpoint=get_last_checkpoint(run.directory))  # a killed run goes on
    trainer.save_model()  # the plan is in its config.json
    return trainer.evaluate()["eval_loss"]


if __name__ == "__main__":
    best = lt.tune(train, loops=1, seeds=2, ledger="albert.db")
    print(lt.check(lt.sweep(train, [1, 4], around=best, octaves=[-2, -1, 0, 1, 2], seeds=2, ledger="albert.db")))
    run = lt.Trial("factored", 4, best.lr, 0, "cpu", Path("albert"))
    loss = train(run)
    model = AlbertForSequenceClassification.from_pretrained(run.directory)  # warns: call_looptransfer_apply_plan
    lt.apply_plan(model)
    print(f"held-out loss {loss!r} as trained, {trainer_of(model, run).evaluate()['eval_loss']!r} as loaded")
