"""A Llama made recursive in Hugging Face's Trainer: its LR tuned at N = 1, swept over N, its checkpoint loaded again.

    python llama.py
"""

from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint

import looptransfer as lt


class Loop(torch.nn.ModuleList):
    """Layers that a forward which slices them, as Llama's does, applies `loops` times."""

    loops = 1

    def __getitem__(self, index):
        return [*self] * self.loops if isinstance(index, slice) else super().__getitem__(index)


class RecursiveLlama(LlamaForCausalLM):
    """`config.loops` is a key of our own. Without a KV cache, which has one place for each layer."""

    def __init__(self, config) -> None:
        super().__init__(config)
        self.model.layers = Loop(self.model.layers)
        self.model.layers.loops = config.loops


def rows(count: int, seed: int) -> list[dict[str, torch.Tensor]]:
    """Numbers that go up by 0, 1 or 2, modulo 64."""
    numbers = torch.randint(3, (count, 16), generator=torch.Generator().manual_seed(seed)).cumsum(1) % 64
    return [{"input_ids": row, "labels": row} for row in numbers]


def train(run) -> float:
    torch.manual_seed(run.seed)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = RecursiveLlama(LlamaConfig(vocab_size=64, loops=run.loops, use_cache=False, **sizes))
    data = rows(2048, run.seed)
    lt.parametrize(model, {"input_ids": data[0]["input_ids"][None]}, run.rule)  # looptransfer
    groups = lt.param_groups(model, torch.optim.AdamW, lr=run.lr, weight_decay=0.01)  # looptransfer
    settings = TrainingArguments(
        run.directory, max_steps=60, per_device_train_batch_size=16, warmup_steps=5, seed=run.seed, save_steps=20,
        save_total_limit=1, logging_strategy="no", report_to="none", disable_tqdm=True, use_cpu=run.device == "cpu",
    )  # fmt: skip
    trainer = Trainer(model, settings, train_dataset=data, optimizers=(torch.optim.AdamW(groups), None))
    trainer.train(resume_from_checkpoint=get_last_checkpoint(run.directory))
    trainer.save_model(run.directory)
    return trainer.evaluate(rows(256, 10**6))["eval_loss"]
