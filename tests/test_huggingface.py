"""Checkpoints of Hugging Face's `save_pretrained` carry the plan, and say so to who does not know it."""

import copy
import json
import logging
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import looptransfer as lt

transformers = pytest.importorskip("transformers")
IDS = {"input_ids": torch.arange(24).reshape(2, 12) % 30}
MARK = "call_looptransfer_apply_plan"
SIZES = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2}


def albert_config(loops: int = 3) -> Any:
    return transformers.AlbertConfig(**SIZES, embedding_size=8, num_hidden_layers=loops, initializer_range=0.2)


def albert(config: Any = None) -> Any:
    torch.manual_seed(0)
    return transformers.AlbertForMaskedLM(config or albert_config()).eval()


def rewritten() -> Any:
    model = albert()
    lt.parametrize(model, IDS)
    return model


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model(**IDS)[0]


def loaded(folder: Path, kind: str = "AutoModelForMaskedLM") -> Any:
    return getattr(transformers, kind).from_pretrained(folder)


def config_in(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text(encoding="utf-8"))


@pytest.fixture
def told(caplog: pytest.LogCaptureFixture) -> Iterator[pytest.LogCaptureFixture]:
    """What transformers logs, as a user sees it."""
    transformers.utils.logging.enable_propagation()
    with caplog.at_level(logging.WARNING):
        yield caplog
    transformers.utils.logging.disable_propagation()


def test_a_checkpoint_that_is_loaded_again_computes_the_same_once_its_plan_is_applied(tmp_path: Path) -> None:
    model = rewritten()
    model.save_pretrained(tmp_path)
    again = loaded(tmp_path)
    plan = lt.apply_plan(again)
    assert torch.equal(logits(again), logits(model))
    assert plan.branches[0].multiplier == pytest.approx(1 / 3)
    assert lt.verify(again, IDS) == plan
    assert lt.param_groups(again, torch.optim.AdamW, lr=1.0)[0].keys() == (
        lt.param_groups(model, torch.optim.AdamW, lr=1.0)[0].keys()
    )


def test_a_plain_load_is_another_function_and_its_report_names_what_to_call(
    tmp_path: Path, told: pytest.LogCaptureFixture
) -> None:
    model = rewritten()
    model.save_pretrained(tmp_path)
    plain = loaded(tmp_path)
    assert (logits(plain) - logits(model)).abs().max() > 1e-2
    assert MARK in told.text
    assert "UNEXPECTED" in told.text


def test_torch_refuses_the_weights_for_a_plain_model(tmp_path: Path) -> None:
    rewritten().save_pretrained(tmp_path)
    weights = pytest.importorskip("safetensors.torch").load_file(tmp_path / "model.safetensors")
    with pytest.raises(RuntimeError, match=MARK):
        loaded(tmp_path).load_state_dict(weights)


def test_what_is_not_rewritten_yet_says_that_its_config_holds_the_plan(tmp_path: Path) -> None:
    rewritten().save_pretrained(tmp_path)
    plain = loaded(tmp_path)
    for call in (lambda: lt.parametrize(plain, IDS), lambda: lt.param_groups(plain, torch.optim.AdamW, lr=1.0)):
        with pytest.raises(lt.InputError, match=r"apply_plan\(model\)"):
            call()
    with pytest.raises(lt.InputError, match=r"apply_plan\(model\)"):
        lt.parametrize(nn.Sequential(plain), IDS["input_ids"])


def test_apply_plan_needs_a_plan() -> None:
    with pytest.raises(lt.InputError, match=r"no config that holds a plan.*from_json"):
        lt.apply_plan(albert())
    with pytest.raises(lt.InputError, match="no config that holds a plan"):
        lt.apply_plan(lt.LoopedDecoder())


def test_a_plan_that_somebody_edited_is_refused_and_nothing_is_rewritten(tmp_path: Path) -> None:
    rewritten().save_pretrained(tmp_path)
    plain = loaded(tmp_path)
    plain.config.looptransfer_plan["branches"][0]["multiplier"] = -1
    before = logits(plain)
    with pytest.raises(lt.InputError, match="-1"):
        lt.apply_plan(plain)
    assert torch.equal(logits(plain), before)


def test_models_of_one_config_are_not_confused(tmp_path: Path) -> None:
    """The config is one object, and only one of the models is rewritten."""
    config = albert_config()
    scaled, plain = albert(config), albert(config)
    lt.parametrize(scaled, IDS)
    scaled.save_pretrained(tmp_path / "scaled")
    plain.save_pretrained(tmp_path / "plain")
    assert "looptransfer_plan" in config_in(tmp_path / "scaled")
    assert "looptransfer_plan" not in config_in(tmp_path / "plain")
    assert torch.equal(logits(loaded(tmp_path / "plain")), logits(plain))


def test_state_dicts_stay_those_of_a_plain_model(tmp_path: Path) -> None:
    model = rewritten()
    assert model.state_dict().keys() == albert().state_dict().keys()
    albert().load_state_dict(model.state_dict())


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_write_the_plan_with_their_own_weights(tmp_path: Path, copied: Any) -> None:
    model = rewritten()
    other = copied(model)
    with torch.no_grad():
        other.albert.embeddings.word_embeddings.weight.mul_(2)
    other.save_pretrained(tmp_path)
    again = loaded(tmp_path)
    lt.apply_plan(again)
    assert torch.equal(logits(again), logits(other))
    assert not torch.equal(logits(again), logits(model))


@pytest.mark.parametrize("out", [lt.remove, lt.fold])
def test_a_plain_model_again_writes_a_plain_checkpoint(
    tmp_path: Path, out: Any, told: pytest.LogCaptureFixture
) -> None:
    model = rewritten()
    out(model)
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(loaded(tmp_path)), logits(model))
    assert MARK not in told.text
    assert "looptransfer_plan" not in config_in(tmp_path)


def test_after_rescale_the_new_multipliers_are_written(tmp_path: Path) -> None:
    model = rewritten()
    model.config.num_hidden_layers = 6
    lt.rescale(model, IDS)
    model.save_pretrained(tmp_path)
    again = loaded(tmp_path)
    assert lt.apply_plan(again).branches[0].multiplier == pytest.approx(1 / 6)
    assert torch.equal(logits(again), logits(model))


def test_what_was_loaded_is_written_as_it_came(tmp_path: Path) -> None:
    rewritten().save_pretrained(tmp_path / "first")
    again = loaded(tmp_path / "first")
    lt.apply_plan(again)
    assert not hasattr(again.config, "looptransfer_plan")
    again.save_pretrained(tmp_path / "second")
    assert config_in(tmp_path / "second") == config_in(tmp_path / "first")


def test_a_base_model_takes_its_part_of_the_plan(tmp_path: Path) -> None:
    model = rewritten()
    model.save_pretrained(tmp_path)
    base = loaded(tmp_path, "AutoModel").eval()
    lt.apply_plan(base)
    assert torch.equal(logits(base), logits(model.albert))


class Classifier(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.head = albert(), nn.Linear(32, 2)

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.head(self.encoder(input_ids)[0])


def test_a_part_that_is_saved_alone_writes_its_part_of_the_plan(tmp_path: Path) -> None:
    model = Classifier()
    lt.parametrize(model, IDS)
    model.encoder.save_pretrained(tmp_path)
    again = loaded(tmp_path)
    lt.apply_plan(again)
    assert torch.equal(logits(again), logits(model.encoder))


def test_a_model_with_another_head_takes_the_plan_too(tmp_path: Path) -> None:
    model = rewritten()
    model.save_pretrained(tmp_path)
    other = loaded(tmp_path, "AlbertForSequenceClassification").eval()
    lt.apply_plan(other)
    assert torch.equal(other.albert(**IDS)[0], model.albert(**IDS)[0])


def test_a_published_checkpoint_names_no_folder_of_this_machine(tmp_path: Path) -> None:
    rewritten().save_pretrained(tmp_path)
    text = (tmp_path / "config.json").read_text(encoding="utf-8")
    assert str(Path(transformers.__file__).parent) not in text
    assert "modeling_albert.py:" in text


def test_weights_that_are_given_are_those_that_are_written(tmp_path: Path) -> None:
    """As Trainer and accelerate do it, whose state dict is gathered from all ranks."""
    model = rewritten()
    doubled = {name: 2 * value for name, value in model.state_dict().items()}
    model.save_pretrained(tmp_path, state_dict=doubled)
    again = loaded(tmp_path)
    assert torch.equal(
        again.albert.embeddings.word_embeddings.weight, doubled["albert.embeddings.word_embeddings.weight"]
    )
    assert MARK not in doubled
    lt.apply_plan(again)


def trainer(folder: Path, steps: int) -> Any:
    model = rewritten()
    optimizer = torch.optim.AdamW(lt.param_groups(model, torch.optim.AdamW, lr=1e-2))
    settings = {"save_steps": 2, "per_device_train_batch_size": 2, "report_to": "none", "use_cpu": True}
    arguments = transformers.TrainingArguments(folder, max_steps=steps, **settings, disable_tqdm=True)
    rows = [{"input_ids": row, "labels": row} for row in torch.arange(96).reshape(8, 12) % 30]
    return transformers.Trainer(model, arguments, train_dataset=rows, optimizers=(optimizer, None))


@pytest.mark.slow
def test_trainer_goes_on_from_its_checkpoint_to_the_same_weights(
    tmp_path: Path, told: pytest.LogCaptureFixture
) -> None:
    pytest.importorskip("accelerate")
    straight = trainer(tmp_path / "straight", 4)
    straight.train()
    resumed = trainer(tmp_path / "resumed", 4)
    resumed.train(resume_from_checkpoint=str(tmp_path / "straight" / "checkpoint-2"))
    assert torch.equal(logits(resumed.model), logits(straight.model))
    assert "unexpected keys" not in told.text
    again = loaded(tmp_path / "straight" / "checkpoint-4")
    lt.apply_plan(again)
    assert torch.equal(logits(again), logits(straight.model.eval()))


@pytest.mark.slow
def test_a_callback_logs_what_the_visits_add(tmp_path: Path) -> None:
    pytest.importorskip("accelerate")

    class Watch(transformers.TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if values := monitor(state.global_step):
                watched.log(values)

    watched = trainer(tmp_path, 4)
    batch = {**IDS, "labels": IDS["input_ids"]}
    monitor = lt.Monitor(watched.model, batch, every=2, loss=lambda output: output.loss)
    watched.add_callback(Watch())
    watched.train()
    logged = [row for row in watched.state.log_history if "alignment" in row]
    assert [row["step"] for row in logged] == [2, 4]
    for name in ("increment_rms/3", "gradient_rms/3"):
        assert sum(key.endswith(name) for key in logged[0]) == 2
