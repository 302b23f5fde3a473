"""Broken experiment files, by kind: each a small change to one that works, and a phrase of what is said of it.

`python -m tests.broken` runs every one of them through inspect, coordcheck, tune, sweep and gate, and counts by kind.
"""

import json
import re
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from looptransfer.transfer.baseline import Baseline
from looptransfer.transfer.optimum import Interval
from looptransfer.transfer.stored import StoredOptimum
from tests.forked import HUNG, Outcome, Trial, run_all

BASE = """\
import os, signal, sys, threading, time, warnings
import torch
from torch import nn
import looptransfer as lt

class Net(nn.Module):
    def __init__(self, loops):
        super().__init__()
        self.loops = loops
        self.embed = nn.Linear(4, 8)
        self.norm = nn.LayerNorm(8)
        self.block = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8))
        self.head = nn.Linear(8, 1)

    def forward(self, x):
        x = self.embed(x)
        for _ in range(self.loops):
            x = x + self.block(self.norm(x))
        return self.head(x)

def make_model(loops):
    return Net(loops)

def batches(seed):
    generator = torch.Generator().manual_seed(seed)
    while True:
        x = torch.randn(16, 4, generator=generator)
        yield x, x[:, :1].sin()

def held_out():
    stream = batches(10**6)
    return [next(stream), next(stream)]

def loss(output, targets):
    return ((output - targets) ** 2).mean()

def make():
    return make_model(2), next(iter(batches(0)))[0]

experiment = lt.Experiment("small", make_model, batches, held_out, loss=loss, steps=4)
"""
FILE = "broken_one.py"
INSPECT, COORDCHECK, TUNE, SWEEP, GATE = COMMANDS = {
    "inspect": [f"{FILE}:make", "--json"],
    "coordcheck": [FILE, "--loops", "1,2", "--steps", "2", "--seeds", "2", "--json"],
    "tune": [FILE, "--loops", "2", "--seeds", "2", "--workers", "1"],
    "sweep": [FILE, "--loops", "1,2", "--lrs", "0.01,0.02", "--seeds", "2", "--workers", "1", "-o", "results.csv"],
    "gate": [FILE, "--seeds", "2", "--workers", "1", "--json"],
}
TRAINS = (TUNE, SWEEP, GATE)  # these use all of an experiment
ALL = (INSPECT, COORDCHECK, *TRAINS)
NOT_INSPECT = (COORDCHECK, *TRAINS)


def baseline_text() -> str:
    """Stored optima at N = 1 and 2."""
    losses = {"0": 0.3, "1": 0.3}
    optima = tuple(
        StoredOptimum(n, None, Interval(-5.0, -5.1, -4.9), {"0": -5.0, "1": -5.0}, Interval(0.3, 0.29, 0.31), losses)
        for n in (1, 2)
    )
    with TemporaryDirectory() as folder:
        Baseline("loops", "nats", 0.9, None, {}, {"factored": optima}).write(Path(folder, "b.json"))
        return Path(folder, "b.json").read_text()


@dataclass(frozen=True)
class Broken:
    """A broken file, and what is said of it by the commands that meet the fault; the others answer."""

    kind: str
    text: str
    phrase: str  # a regular expression; empty where every command may answer
    commands: tuple[str, ...] = ALL
    status: int = 2
    line: tuple[str, ...] = ALL  # commands that name the file with a line
    words: tuple[str, ...] = ()  # more of the command line

    def trial(self, command: str) -> Trial:
        return Trial([command, *COMMANDS[command], *self.words], {FILE: self.text, "lr-optima.json": baseline_text()})


def changed(*changes: tuple[str, str]) -> str:
    text = BASE
    for old, new in changes:
        assert old in text, old
        text = text.replace(old, new)
    return text


HEADS = {
    "top": "import looptransfer as lt",
    "init": "super().__init__()",
    "forward": "def forward(self, x):",
    "make_model": "def make_model(loops):",
    "batches": "def batches(seed):",
    "held_out": "def held_out():",
    "loss": "def loss(output, targets):",
}


def hook(name: str, *lines: str) -> str:
    """The file with lines put first into one of its functions, `top` for the file itself."""
    head = HEADS[name]
    indent = {"top": "", "init": "        ", "forward": "        "}.get(name, "    ")
    return changed((head, "\n".join([head, *(indent + line for line in lines)])))


MET_BY = {
    "top": ALL,
    "init": ALL,
    "forward": ALL,
    "make_model": ALL,
    "batches": ALL,
    "held_out": TRAINS,
    "loss": NOT_INSPECT,
}
RAISED = {
    "raise ValueError('no such data')": "ValueError: no such data",
    "sys.exit(0)": "SystemExit: 0",
    "sys.exit('bye')": "SystemExit: bye",
    "exit()": "SystemExit: None",
    "raise type('Stop', (BaseException,), {})('now')": "Stop: now",
    "raise StopIteration": "StopIteration: |generator raised StopIteration|ended after 0",
    "raise GeneratorExit": "GeneratorExit: ",
    "raise type('Mute', (Exception,), {'__str__': lambda self: 1 / 0})": r"Mute: \(its message cannot be shown\)",
    "raise RuntimeError('line one\\n' * 200)": "RuntimeError: line one line one",
    "torch.zeros(2, 3) @ torch.zeros(2, 3)": "RuntimeError: mat1 and mat2 shapes",
    "raise lt.InputError('own words')": "own words",
}


def all_broken() -> Iterator[Broken]:
    yield from syntax()
    yield from imports()
    yield from names()
    yield from constructor()
    yield from raised()
    yield from given_back()
    yield from shapes()
    yield from pairing()
    yield from workers()
    yield from process()
    yield from surroundings()


def syntax() -> Iterator[Broken]:
    faults = {
        "x = (1,": "was never closed|EOF",
        "def f(:\n    pass": "invalid syntax",
        "if True:\nx = 1": "expected an indented block",
        "  x = 1": "unexpected indent",
        "print 'hello'": "Missing parentheses",
        "return 5": "'return' outside function",
        "x = 'abc": "unterminated string",
        "x = 5 = y": "cannot assign",
        "a\x00b = 1": "null bytes",
        "x = '\xff'": "utf-8",
        "if True:\n\tx = 1\n        y = 2": "inconsistent use of tabs|unindent",
        "import": "invalid syntax|Expected one or more names",
    }
    for fault, phrase in faults.items():
        yield Broken("syntax", f"{fault}\n{BASE}", phrase, line=())


def imports() -> Iterator[Broken]:
    faults = {
        "import no_such_module_anywhere": "ModuleNotFoundError: No module named 'no_such_module_anywhere'",
        "from torch import no_such_name": "ImportError: cannot import name 'no_such_name'",
        "import broken_one; broken_one.experiment": "has no attribute 'experiment'",
        "from . import sibling": "attempted relative import",
        "open('no-such-file.txt')": "FileNotFoundError",
        "{}['key']": "KeyError: 'key'",
        "assert False": "AssertionError",
        "def deeper(): deeper()\ndeeper()": "RecursionError",
        "warnings.simplefilter('error'); warnings.warn('old')": "UserWarning: old",
        "undefined_name": "NameError: name 'undefined_name' is not defined",
        "lt.Experimant": "has no attribute 'Experimant'",
        "input()": "EOFError",
    }
    for fault, phrase in faults.items():
        yield Broken("import", hook("top", *fault.split("\n")), phrase)


def names() -> Iterator[Broken]:
    last = 'experiment = lt.Experiment("small", make_model, batches, held_out, loss=loss, steps=4)'
    faults = {
        "other = 5": "has no attribute 'experiment'",
        "experiment = None": "is of type NoneType; name a factory",
        "experiment = 5": "is of type int; name a factory",
        "experiment = 'words'": "is of type str; name a factory",
        "experiment = os": "is of type module; name a factory",
        "experiment = make_model": r"(missing 1 required positional argument|make_model\(run\) ).*\(.*line \d+",
        "experiment = lambda: None": "gives a NoneType; it must be a looptransfer.Experiment",
        "experiment = lambda: 1 / 0": "ZeroDivisionError",
        "experiment = lt.Experiment": "missing 4 required positional arguments",
        "def experiment():\n    yield 1": "gives a generator",
        "async def experiment():\n    pass": "gives a coroutine",
        "class experiment:\n    pass": "gives a experiment",
        "experiment = nn.Linear(1, 1)": "missing 1 required positional argument|gives a",
    }
    for fault, phrase in faults.items():
        yield Broken("name", changed((last, fault)), phrase, NOT_INSPECT, line=())
    yield Broken("name", changed(("def make():", "def made():")), "has no attribute 'make'", (INSPECT,), line=())
    yield Broken("name", changed(("def make():", "def make(loops):")), "missing 1 required", (INSPECT,))
    for fault, phrase in {"None": "returns a NoneType", "5": "returns a int", "Net": "returns a type"}.items():
        text = changed(("    return make_model(2), next(iter(batches(0)))[0]", f"    return {fault}"))
        yield Broken("name", text, phrase, (INSPECT,), line=())


def constructor() -> Iterator[Broken]:
    faults = {
        "steps='300'": "steps is 300; a run needs 2 or more, as an int",
        "steps=1": "steps is 1; a run needs 2",
        "steps=2.5": "steps is 2.5",
        "steps=True": "steps is True",
        "warmup=30": "warmup is 30; it is a share of the steps",
        "warmup='0.3'": "warmup is 0.3; it is a share",
        "weight_decay=-1.0": "weight_decay is -1.0; it must be a number from 0 up",
        "betas=0.9": "betas is 0.9; give AdamW's two",
        "betas=(0.9, 0.95, 0.99)": "betas is .*; give AdamW's two",
        "betas=(0.9, 1.0)": "betas is",
        "clip=0": "clip is 0; it must be a finite number above 0",
        "clip='1'": "clip is 1; it must be a finite number above 0",
        "lam=-1.0": "lam is -1.0",
        "lam=float('nan')": "lam is nan",
        "base_layers=0": "base_layers is 0; it must be a whole number",
        "base_layers=None": "base_layers is None",
        "settings={'data': torch.zeros(2)}": "settings must hold JSON values only: Object of type Tensor",
        "settings={'x': float('nan')}": "settings must hold JSON values only: Out of range float",
        "settings=[1, 2]": "settings must hold JSON",
        "width='8'": "width is 8; it must be a whole number",
        "branches='layers.*'": r"branches is layers\.\*; give names",
        "layers=0": "layers is 0",
        "on_stream='keep'": "on_stream is keep; choose scale or leave",
        "loops=4": "loops is 4; give N -> mean loop count",
        "stepz=4": "unexpected keyword argument 'stepz'",
    }
    for fault, phrase in faults.items():
        text = changed(("steps=4)", f"{'' if fault.startswith('steps') else 'steps=4, '}{fault})"))
        yield Broken("constructor", text, phrase, NOT_INSPECT if "broken" else ALL)
    whole = 'lt.Experiment("small", make_model, batches, held_out, loss=loss'
    for fault, phrase in {
        "lt.Experiment(None, make_model, batches, held_out, loss=loss": "name is None",
        'lt.Experiment("small", Net(2), batches(0), held_out, loss=loss': "batches is .*; it must be a function",
        'lt.Experiment("small", None, batches, held_out, loss=loss': "make_model is None; it must be a function",
        'lt.Experiment("small", make_model, batches, held_out(), loss=loss': "held_out is .*; it must be a function",
        'lt.Experiment("small", make_model, batches, held_out, loss="mse"': "loss is mse; it must be a function",
        'lt.Experiment("small", make_model, batches, loss=loss': "missing 1 required positional argument",
    }.items():
        yield Broken("constructor", changed((whole, fault)), phrase)


def raised() -> Iterator[Broken]:
    for name, commands in MET_BY.items():
        for code, phrase in RAISED.items():
            yield Broken(f"raised in {name}", hook(name, code), phrase, commands)
        yield Broken("interrupt", hook(name, "raise KeyboardInterrupt"), "interrupted", commands, status=130, line=())


def given_back() -> Iterator[Broken]:
    faults = {
        "make_model": {
            "None": "(gives|returns) a NoneType",
            "5": "(gives|returns) a int",
            "Net": "(gives|returns) a type",
            "(Net(loops), 1)": "(gives|returns) a tuple",
            "Net(loops).state_dict()": "(gives|returns) a OrderedDict",
            "nn.ModuleList([Net(loops)])": "forward",
            "nn.Linear(4, 1)": "no residual add was found",
            "Net(loops).requires_grad_(False)": "has no parameter that requires a gradient",
            "Net(loops).to('meta')": "it is on the meta device|device meta",
            "nn.Identity()": "has no parameter that requires a gradient",
            "nn.DataParallel(Net)": "has no parameter that requires|fails",
            "torch.jit.script(nn.Linear(4, 1))": "TorchScript",
            "Net(loops).double()": "dtype|Double",
            "Net(str(loops))": "TypeError: 'str' object cannot be interpreted as an integer",
            "Net(0)": "no residual add was found",
            "Net(-loops)": "no residual add was found",
        },
        "batches": {
            "None": "'NoneType' object is not iterable",
            "5": "'int' object is not iterable",
            "[]": "ended after 0 of the|StopIteration",
            "iter([])": "ended after 0 of the|StopIteration",
            "[1, 2, 3, 4, 5]": "gives a batch that is a int",
            "'some words'": "gives a batch that is a str",
            "[torch.zeros(2, 4)] * 9": "gives a batch that is a Tensor",
            "[(1, 2, 3)] * 9": "gives a batch that is a tuple of 3",
            "[{'x': torch.zeros(2, 4)}] * 9": "of a batch that is a dict it is given the whole dict as targets",
            "[(None, None)] * 9": "NoneType",
            "[([1.0] * 4, 2)] * 9": "TypeError|list",
            "[(torch.zeros(2, 4), torch.zeros(2, 1))] * 2": "ended after 2 of the",
            "seed + 'a'": "unsupported operand",
            "lambda: 1": "'function' object is not iterable",
        },
        "held_out": {
            "None": "'NoneType' object is not iterable",
            "[]": "gave no batch .*; it must give one or more",
            "[1]": "gives a batch that is a int",
            "[(torch.zeros(2, 4),)]": "gives a batch that is a tuple of 1",
            "batches(1)": "gave 10000 batches and goes on",
            "[(torch.zeros(2, 5), torch.zeros(2, 1))]": "shapes cannot be multiplied",
            "[(torch.zeros(2, 4), None)]": "TypeError",
            "[(torch.full((2, 4), float('nan')), torch.zeros(2, 1))]": "the loss at initialisation is nan .*held out",
        },
        "loss": {
            "None": "gives None .*it must return one floating-point number",
            "1.5": r"gives 1\.5 .*it must return",
            "(output - targets) ** 2": r"gives a tensor \(16, 1\) of torch.float32",
            "(output - targets).sum().long()": "of torch.int64",
            "(output - targets).mean().detach()": "does not require grad",
            "(output - targets).mean().item()": "it must return one floating-point number",
            "((output - targets).mean(), 1)": "it must return one floating-point number",
            "(output - targets).mean() * torch.tensor(1j)": "of torch.complex64",
            "(output - targets).mean() * float('nan')": "the loss at initialisation is nan at N",
            "torch.log(-(output - targets).abs().mean())": "the loss at initialisation is nan at N",
            "(output - targets).mean() / 0": "the loss at initialisation is -?inf at N",
            "output.no_such_method()": "has no attribute 'no_such_method'",
            "nn.functional.cross_entropy(output, targets.long())": "",
            "torch.tensor(1.0, device='meta')": "meta",
        },
    }
    for name, values in faults.items():
        for value, phrase in values.items():
            text = changed(
                (HEADS[name], f"{HEADS[name]}\n    return {value}\n\n{HEADS[name].replace('def ', 'def not_')}")
            )
            commands = NOT_INSPECT if name == "batches" or "require" in phrase else MET_BY[name]
            yield Broken(f"{name} gives back", text, phrase, commands if phrase else (), line=NOT_INSPECT)
    for name, call in {"make_model": "make_model()", "batches": "batches()", "loss": "loss(output)"}.items():
        yield Broken("number of arguments", changed((HEADS[name], f"def {call}:")), "positional argument", MET_BY[name])
    yield Broken("number of arguments", changed(("def held_out():", "def held_out(seed):")), "positional arg", TRAINS)
    yield Broken(
        "number of arguments",
        changed(("def forward(self, x):", "def forward(self, x, mask):")),
        "missing 1",
        line=NOT_INSPECT,
    )


def shapes() -> Iterator[Broken]:
    yield Broken("shape", changed(("nn.Linear(4, 8)", "nn.Linear(5, 8)")), "mat1 and mat2 shapes")
    yield Broken("shape", changed(("nn.Linear(8, 1)", "nn.Linear(9, 1)")), "mat1 and mat2 shapes")
    yield Broken("shape", changed(("yield x, x[:, :1].sin()", "yield x.long(), x[:, :1]")), "dtype|expected")
    yield Broken("shape", changed(("yield x, x[:, :1].sin()", "yield x.to('meta'), x[:, :1]")), "meta")
    yield Broken("shape", changed(("yield x, x[:, :1].sin()", "yield x.cuda(), x[:, :1]")), "CUDA|NVIDIA")
    yield Broken("shape", changed(("yield x, x[:, :1].sin()", "yield x.numpy(), x[:, :1]")), "numpy|TypeError")
    yield Broken("shape", changed((", loss=loss", "")), "it takes logits|token ids", NOT_INSPECT)
    targets = changed((", loss=loss", ""), ("x[:, :1].sin()", "torch.full((16,), 300)"))
    yield Broken("shape", targets, r"out of bounds.*it takes logits", NOT_INSPECT)
    for step, commands in ((1, NOT_INSPECT), (2, NOT_INSPECT), (3, TRAINS)):
        lines = ("    while True:", f"    for step in range(99):\n        width = 4 if step < {step} else 5")
        text = changed(lines, ("torch.randn(16, 4,", "torch.randn(16, width,"))
        yield Broken("shape", text, "mat1 and mat2 shapes", commands)
        text = changed(lines, ("yield x,", f"yield (x, x[:, :1], 1) if step >= {step} else x,"))
    text = changed(
        ("    def forward(self, x):\n", "    def forward(self, x):\n        if self.loops > 1: x = x[:, :3]\n")
    )
    yield Broken("shape", text, "mat1 and mat2 shapes")
    yield Broken("shape", hook("forward", "if not self.training: x = x[:, :3]"), "mat1 and mat2 shapes", TRAINS)


def pairing() -> Iterator[Broken]:
    x, generator = "x = torch.randn(16, 4, generator=generator)", "generator = torch.Generator().manual_seed(seed)"
    rows = [
        ((generator, "generator = torch.Generator().manual_seed(0)"), "", ()),  # told, and answered
        ((generator, "generator = None"), "", ()),  # torch's own random state, seeded before the call, will do
        (
            (generator, "generator = torch.Generator(); generator.seed()"),
            "gives another batch 0 at its second",
            NOT_INSPECT,
        ),
        (("x = self.embed(x)", "x = self.embed(x); torch.rand(self.loops)"), "", ()),
        (
            ("    stream = batches(10**6)", "    stream = batches(time.time_ns())"),
            "another batch 0 at its second",
            TRAINS,
        ),
        (("return [next(stream), next(stream)]", "return stream"), "gave 10000 batches and goes on", TRAINS),
        (("    while True:", "    for _ in range(3):"), "ended after 3 of the 4 batches", TRAINS),
        (("return Net(loops)", "return Net(1)"), "applies no layer more than once", TRAINS),
        (("return Net(loops)", "return Net(2)"), "loop equally often", (SWEEP, GATE)),
        (
            ("def make_model(loops):", "once = Net(2)\ndef make_model(loops):\n    once.loops = loops; return once"),
            "same weights",
            TRAINS,
        ),
        (("return Net(loops)", "torch.seed(); return Net(loops)"), "other weights at each call", NOT_INSPECT),
        (
            ("range(self.loops)", "range(int(torch.randint(1, 2 * self.loops + 1, ())))"),
            "another number of times|does the same every time",
            NOT_INSPECT,
        ),
    ]
    for change, phrase, commands in rows:
        yield Broken("pairing", changed(change), phrase, commands)
    both = changed(
        (generator, "generator = torch.Generator().manual_seed(0)"),
        ("return Net(loops)", "torch.manual_seed(0); return Net(loops)"),
    )
    yield Broken("pairing", both, "seeds 0 and 1 give the same batches and the same weights", NOT_INSPECT)
    drawn = changed(
        (x, "x = torch.randn(16, 4, generator=generator if seed > 9 else None)"),
        ("x = self.embed(x)", "x = self.embed(x); torch.rand(self.loops)"),
    )
    yield Broken("pairing", drawn, r"gives another batch 1 at N = 2 than at N = 1", (SWEEP, GATE))
    shared = "made = [next(batches(7))]\nonce = iter(made)\ndef held_out():\n    return once\ndef unused():\n"
    yield Broken(
        "pairing", changed(("def held_out():\n", shared)), r"another batch 0 at its second|gave no batch", TRAINS
    )
    yield Broken("pairing", hook("loss", "return output.sum() * 0 + 1"), "", ())


def workers() -> Iterator[Broken]:
    two = ("--workers", "2")
    for experiment in ("lambda loops: Net(loops)", "nn.Module.forward.__get__(threading.Lock())"):
        text = changed(('"small", make_model', f'"small", {experiment}'))
        yield Broken(
            "workers",
            text,
            "cannot be sent to worker processes",
            TRAINS if "lambda" in experiment else (),
            words=two,
            line=(),
        )
    reduced = {
        "1 / 0": "cannot be sent .*ZeroDivisionError",
        "return int, ()": "cannot load the experiment: TypeError: it comes back as a int",
        "return sys.exit, (0,)": "cannot load the experiment: SystemExit: 0",
    }
    for code, phrase in reduced.items():
        text = f"{BASE}\nclass Odd(lt.Experiment):\n    def __reduce__(self):\n        {code}\n"
        text += "\nexperiment = Odd(**vars(experiment))\n"
        yield Broken("workers", text, phrase, TRAINS, words=two, line=())
    inside = "if multiprocessing.current_process().name == 'looptransfer worker' and len(calls) > 5: "
    for code, phrase in {
        "os._exit(0)": "its worker process ended with exit status 0: ",
        "os._exit(3)": "its worker process ended with exit status 3: ",
        "os.abort()": "its worker process ended with exit status -6: ",
        "sys.exit(0)": r"runs are missing.* failed.*SystemExit: 0 \(",
        "raise ValueError('late')": r"runs are missing.* failed.*ValueError: late \(",
    }.items():
        text = changed(
            ("import looptransfer as lt", "import multiprocessing\nimport looptransfer as lt\ncalls = []"),
            (HEADS["loss"], f"{HEADS['loss']}\n    calls.append(1)\n    {inside}{code}"),
        )
        yield Broken("workers", text, phrase, TRAINS, words=two, line=() if "exit status" in phrase else ALL)
    text = text.replace("raise ValueError('late')", "raise KeyboardInterrupt")
    yield Broken("interrupt", text, "interrupted", TRAINS, status=130, words=two, line=())


def process() -> Iterator[Broken]:
    ends = {
        "os._exit(0)": "exit status 0",
        "os._exit(1)": "exit status 1",
        "os._exit(3)": "exit status 3",
        "os.kill(os.getpid(), signal.SIGKILL)": "exit status -9",
        "os.abort()": "exit status -6",
        "import ctypes; ctypes.string_at(0)": "exit status -11",
    }
    for name, commands in MET_BY.items():
        for code, phrase in ends.items():
            yield Broken("ends its process", hook(name, code), f"there is no answer.*{phrase}", commands, line=())
    alarm = hook("make_model", "signal.alarm(1); time.sleep(9)")
    yield Broken("ends its process", alarm, "there is no answer.*exit status -14", line=())
    for code in ("sys.stderr.close()", "sys.stdout.close(); sys.stderr.close()", "os.close(1)", "os.close(2)"):
        yield Broken("closes its streams", hook("make_model", code), "", ())
    for code in (
        "threading.Thread(target=time.sleep, args=(300,)).start()",
        "threading.Thread(target=sys.exit).start()",
        "import atexit; atexit.register(os._exit, 0)",
        "import atexit; atexit.register(time.sleep, 300)",
        "signal.signal(signal.SIGTERM, signal.SIG_IGN)",
    ):
        yield Broken("leaves something behind", hook("top", code), "", ())


def surroundings() -> Iterator[Broken]:
    for code in (
        "os.chdir('/')",
        "torch.set_default_dtype(torch.float64)",
        "torch.set_default_device('meta')",
        "torch.set_grad_enabled(False)",
        "torch.autograd.set_detect_anomaly(True)",
        "torch.use_deterministic_algorithms(True)",
        "sys.setrecursionlimit(120)",
        "sys.path.clear()",
        "os.environ.clear()",
        "sys.stdout = None",
        "sys.stderr = None",
        "sys.argv = []",
        "print('x' * 5_000_000)",
        'os.write(1, b\'{"answer": "HOLDS"}\')',
        "os.system('echo HOLDS')",
        "__builtins__['print'] = None",
        "warnings.simplefilter('error')",
        "nn.Module.__call__ = None",
        "torch.optim.AdamW = None",
        "lt.parametrize = None",
    ):
        yield Broken("surroundings", hook("top", code), "", ())
    for name in ("make_model", "forward", "batches", "held_out", "loss"):
        yield Broken("prints", hook(name, "print('{', 'HOLDS ' * 100)", "os.write(1, b'{')"), "", ())


def is_sound(broken: Broken, command: str, outcome: Outcome) -> str:
    """What is wrong with an outcome; empty where it is as it must be."""
    if outcome.status == HUNG:
        return "it hangs"
    if "please report" in outcome.err or ("Traceback" in outcome.err and "exit status" not in broken.phrase):
        return "a traceback"
    if command in broken.commands:
        if outcome.status != broken.status:
            return f"exit {outcome.status} instead of {broken.status}"
        if outcome.out:
            return "standard output"
        if not re.search(broken.phrase, outcome.err):
            return f"not told: {broken.phrase}"
        told = [line for line in outcome.err.splitlines() if line.startswith("looptransfer: ")]
        if len(told) != 1 or (command in broken.line and not re.search(rf"{FILE}, line \d+", told[0])):
            return "not told in one line with the file and line"
        return ""
    if outcome.status in (0, 1, 3):
        if "--json" in COMMANDS[command]:
            json.loads(outcome.out)
        return "" if outcome.out.strip() else "an exit status without an answer"
    return "" if outcome.status == 2 and "looptransfer: " in outcome.err else f"exit {outcome.status}"


def run_broken(pairs: list[tuple[Broken, str]], folder: Path) -> tuple[list[str], str]:
    """What is wrong with the outcomes of files under commands, and a count of exit statuses for every kind."""
    outcomes = run_all([broken.trial(command) for broken, command in pairs], folder)
    counts: dict[str, Counter[int]] = {}
    wrong = []
    for (broken, command), outcome in zip(pairs, outcomes, strict=True):
        counts.setdefault(broken.kind, Counter())[outcome.status] += 1
        problem = is_sound(broken, command, outcome)
        if problem:
            changes = [line for line in broken.text.splitlines() if line not in BASE.splitlines()]
            wrong.append(
                f"{broken.kind}, {command}: {problem}: {changes[:3]}: {outcome.out[:80]!r} {outcome.err[-600:]}"
            )
    lines = []
    for kind, statuses in counts.items():
        files = len({broken.text for broken, _ in pairs if broken.kind == kind})
        told = ", ".join(f"exit {status}: {times}" for status, times in sorted(statuses.items()))
        lines.append(f"{kind}: {files} files, {statuses.total()} commands; {told}")
    return wrong, "\n".join(lines)


def all_pairs() -> list[tuple[Broken, str]]:
    """Every file under every command that takes it."""
    return [(broken, command) for broken in all_broken() for command in (TRAINS if broken.words else ALL)]


if __name__ == "__main__":
    with TemporaryDirectory() as home:
        chosen = [pair for pair in all_pairs() if len(sys.argv) == 1 or pair[0].kind in sys.argv[1:]]
        problems, count = run_broken(chosen, Path(home))
    print(*problems, f"{count}\n{len(problems)} wrong", sep="\n")
