"""A looped decoder in Lightning, with resume, EMA and Monitor, tuned and swept (pip install pytorch-lightning)."""

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import EMAWeightAveraging, ModelCheckpoint
from torch.nn.functional import cross_entropy

import looptransfer as lt


def rows(count: int, seed: int) -> torch.utils.data.DataLoader:
    """Seventeen numbers that go up by 0, 1 or 2, modulo 64."""
    numbers = torch.randint(3, (count, 17), generator=torch.Generator().manual_seed(seed)).cumsum(1) % 64
    return torch.utils.data.DataLoader(numbers, batch_size=16)


class Counting(pl.LightningModule):
    def __init__(self, rule: str, loops: int, lr: float) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.model, self.probe = lt.LoopedDecoder(width=32, heads=2, loops=loops), next(iter(rows(1, 10**6)))
        self.plan = lt.parametrize(self.model, self.probe[:, :-1], rule)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(lt.param_groups(self.model, torch.optim.AdamW, lr=self.hparams.lr, weight_decay=0.1))

    def training_step(self, batch: torch.Tensor) -> torch.Tensor:
        return cross_entropy(self.model(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten())

    def validation_step(self, batch: torch.Tensor) -> None:
        self.log("val_loss", self.training_step(batch))

    def on_train_start(self) -> None:
        row = self.probe.to(self.device)  # every=50, as often as Lightning's log_every_n_steps
        self.monitor = lt.Monitor(self.model, row[:, :-1], 50, loss=lambda logits: cross_entropy(logits[0], row[0, 1:]))

    def on_train_batch_end(self, *_) -> None:
        self.log_dict(self.monitor(self.global_step))

    def on_save_checkpoint(self, checkpoint: dict) -> None:
        checkpoint["plan"] = self.plan.to_json()

    def on_load_checkpoint(self, checkpoint: dict) -> None:
        lt.remove(self.model)
        self.plan = lt.apply_plan(self.model, lt.ScalingPlan.from_json(checkpoint["plan"]))
        lt.verify(self.model, self.probe[:, :-1].to(self.device))  # the weights would fit another N as well


def train(run) -> float:
    pl.seed_everything(run.seed, verbose=False)
    settings = {"max_epochs": 2, "enable_progress_bar": False, "enable_model_summary": False}
    settings["callbacks"] = [EMAWeightAveraging(decay=0.9), ModelCheckpoint(run.directory, save_last=True)]
    trainer = pl.Trainer(accelerator=run.device, default_root_dir=run.directory, **settings)
    trainer.fit(Counting(run.rule, run.loops, run.lr), rows(1024, run.seed), ckpt_path="last")  # a killed run goes on
    return trainer.validate(trainer.model, rows(256, 10**6), verbose=False)[0]["val_loss"]  # of the averaged weights


if __name__ == "__main__":
    best = lt.tune(train, loops=1, seeds=2, ledger="lightning.db")
    print(lt.check(lt.sweep(train, [1, 4], around=best, octaves=[-2, -1, 0, 1, 2], seeds=2, ledger="lightning.db")))
