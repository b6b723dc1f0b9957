"""Several processes: the same losses, gradients and files as one, and a way on when one is lost."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import multiprocessing
import os
import signal
import socket
import sys
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from accelerate import Accelerator, DistributedType, PartialState
from accelerate.state import AcceleratorState
from rich.console import Console
from safetensors.torch import load_file
from torch import Tensor
from torch.distributed.tensor import DTensor
from transformers import AttentionInterface, TrainerCallback

import clex
import tiny
from clex import cli, processes, training
from clex.errors import ConfigError, DataError, TrainingError
from clex.hf.checkpoint import WEIGHTS_FILE
from clex.hf.extend import config_of
from clex.training import TrainConfig

# Whole windows, and short documents that are packed.
TOKENS = tiny.make_tokens([300, 280, 30, 25, 40, 20, 35])
LONG = tiny.make_tokens([300, 280, 270, 260])
# float32 sums in another order; losses are about 5, gradients about 0.1.
TOLERANCE = 2e-5

RECIPES = Path(__file__).parent.parent / "recipes" / "accelerate"
kept_models: list[Any] = []

FSDP = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_RESHARD_AFTER_FORWARD": "true",
    # As `accelerate launch` has it where nobody says otherwise.
    "FSDP_CPU_RAM_EFFICIENT_LOADING": "true",
}


def ring(size: int, shards: int) -> dict[str, str]:
    return {
        **FSDP,
        "ACCELERATE_USE_PARALLELISM_CONFIG": "true",
        "PARALLELISM_CONFIG_CP_SIZE": str(size),
        "PARALLELISM_CONFIG_DP_SHARD_SIZE": str(shards),
    }


def launch(
    count: int, work: Callable[..., None], *args: Any, engine: dict[str, str] | None = None
) -> list[int]:
    """Exit codes of `count` processes that each do ``work(*args)``, as a launcher starts them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = multiprocessing.get_context("fork")
    started = []
    for rank in range(count):
        place = {
            "RANK": rank,
            "LOCAL_RANK": rank,
            "WORLD_SIZE": count,
            "LOCAL_WORLD_SIZE": count,
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": port,
            **(engine or {}),
        }
        if count == 1:
            place = {}
        started.append(context.Process(target=_begin, args=(place, work, args)))
        started[-1].start()
    for process in started:
        process.join(120)
        process.kill()
        process.join()
    return [process.exitcode or 0 for process in started]


def _begin(place: dict[str, Any], work: Callable[..., None], args: tuple[Any, ...]) -> None:
    os.environ.update({name: str(value) for name, value in place.items()})
    # What a training in the parent process left: a launcher's processes start without it.
    AcceleratorState._reset_state(reset_partial_state=True)
    torch.set_num_threads(1)
    torch.cuda.is_available = lambda: False  # type: ignore[assignment]
    if place.get("ACCELERATE_USE_FSDP"):
        _shard_on_the_cpu()
    try:
        work(*args)
    except SystemExit as stop:
        os._exit(int(stop.code or 0))
    except BaseException:
        traceback.print_exc()
        os._exit(1)
    os._exit(0)  # not the end of the test run that was forked


def _shard_on_the_cpu() -> None:
    """accelerate looks at its FSDP settings on accelerators alone; all of it works with gloo."""
    processes._refuse_cutting_on_cpus = lambda: None
    init = PartialState.__init__

    def claim_a_gpu(self: Any, *args: Any, **kwargs: Any) -> None:
        init(self, *args, **kwargs)
        if self.distributed_type == DistributedType.MULTI_CPU:
            self.distributed_type = DistributedType.MULTI_GPU

    PartialState.__init__ = claim_a_gpu  # type: ignore[method-assign]


class Gather(torch.autograd.Function):
    """All pieces along the tokens, with the gradient of each summed over the processes."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Any) -> Tensor:
        ctx.group = group
        parts = [torch.empty_like(x) for _ in range(group.size())]
        dist.all_gather(parts, x, group=group)
        return torch.cat(parts, dim=2)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        gradient = gradient.contiguous()
        dist.all_reduce(gradient, group=ctx.group)
        return gradient.chunk(ctx.group.size(), dim=2)[ctx.group.rank()], None


class GatheredAttention:
    """Causal attention of a piece of a text over all of it: ring attention without the ring.

    torch's own has kernels for GPUs only. Each process holds one chunk from the front of the text
    and one from its back, as torch cuts them.
    """

    def __init__(self) -> None:
        self.group: Any = None
        cut = Accelerator.maybe_context_parallel

        @contextlib.contextmanager
        def watched(accelerator: Any, **buffers: Any) -> Iterator[None]:
            self.group = accelerator.torch_device_mesh["cp"].get_group()
            with cut(accelerator, **buffers):
                yield
            self.group = None

        Accelerator.maybe_context_parallel = watched  # type: ignore[method-assign]
        AttentionInterface.register("sdpa", self)

    def __call__(
        self, module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, **other: Any
    ) -> tuple[Tensor, None]:
        n, heads = query.shape[2], query.shape[1]
        size, rank = (1, 0) if self.group is None else (self.group.size(), self.group.rank())

        def places(r: int) -> Tensor:
            starts = torch.tensor([r, 2 * size - 1 - r]) * (n // 2)
            return (starts[:, None] + torch.arange(n // 2)).flatten()

        def whole(x: Tensor) -> Tensor:
            x = x.repeat_interleave(heads // x.shape[1], dim=1).contiguous()
            return x if self.group is None else Gather.apply(x, self.group)

        everywhere = torch.cat([places(r) for r in range(size)])
        scores = query @ whole(key).transpose(2, 3) * other["scaling"]
        scores = scores.masked_fill(everywhere > places(rank)[:, None], -torch.inf)
        return (scores.softmax(dim=-1) @ whole(value)).transpose(1, 2), None


class Watch(TrainerCallback):
    """Keeps the whole gradients of the first step."""

    def __init__(self) -> None:
        self.gradients: dict[str, Tensor] = {}

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if not self.gradients:
            for name, p in kwargs["model"].named_parameters():
                if p.grad is not None:
                    sharded = isinstance(p.grad, DTensor)
                    # Everything but the extension is cut up under FSDP2.
                    engine = os.environ.get("ACCELERATE_USE_FSDP") == "true"
                    assert sharded == (engine and ".scalings." not in name), name
                    whole = p.grad.full_tensor() if sharded else p.grad
                    self.gradients[name.removeprefix("module.")] = whole.clone()


def make(**settings: Any) -> Any:
    torch.manual_seed(0)
    model = clex.extend(tiny.make_model(), clex.ClexConfig(max_scale=4, steps=4, **settings))
    tiny.stir(model)
    return model


def run(folder: Path, settings: dict[str, Any]) -> None:
    settings = {
        "depth": "full",
        "steps": 2,
        "rate": 1e-3,
        "global_batch": 4,
        "clip": 1e9,
        "save_every": 2,
        **settings,
    }
    tokens = settings.pop("tokens", TOKENS)
    watch = Watch()
    kept_models.append(make())
    init = training.ExtensionTrainer.__init__

    def with_watch(self: Any, **kwargs: Any) -> None:
        init(self, **kwargs)
        self.add_callback(watch)
        if self.is_fsdp_enabled:  # positions pass through the layers in float32
            assert not self.accelerator.state.fsdp_plugin.mixed_precision_policy.cast_forward_inputs

    training.ExtensionTrainer.__init__ = with_watch  # type: ignore[method-assign]
    try:
        console = Console(file=io.StringIO())
        training.train(kept_models[-1], tokens, TrainConfig(**settings), folder, console=console)
    finally:
        training.ExtensionTrainer.__init__ = init  # type: ignore[method-assign]
    torch.save(watch.gradients, folder / f"gradients-{os.environ.get('RANK', '0')}.pt")


def losses(folder: Path) -> list[float]:
    records = map(json.loads, (folder / "log.jsonl").read_text().splitlines())
    return [record["loss"] for record in records if "loss" in record]


def compare(one: Path, many: Path) -> None:
    """Losses, first gradients and final files of two runs."""
    assert losses(many) == pytest.approx(losses(one), abs=TOLERANCE)
    wanted = torch.load(one / "gradients-0.pt")
    found = torch.load(many / "gradients-0.pt")
    assert found.keys() == wanted.keys()
    for name in wanted:
        scale = wanted[name].abs().max().item()
        assert scale > 0, name
        difference = (found[name] - wanted[name]).abs().max().item()
        assert difference < 1e-4 * scale + 1e-7, (name, difference, scale)
    names = {p.name for p in one.iterdir() if p.suffix == ".safetensors"}
    assert {p.name for p in many.iterdir() if p.suffix == ".safetensors"} == names
    for name in names:
        a, b = load_file(one / name), load_file(many / name)
        assert a.keys() == b.keys()
        for key in a:
            assert a[key].shape == b[key].shape and a[key].dtype == b[key].dtype
            # Adam's first steps are rate * sign(gradient), whatever its size.
            assert (a[key] - b[key]).abs().mean() < 5e-5, key
    if (one / "config.json").exists():  # not where weights stay frozen
        assert (one / "config.json").read_text() == (many / "config.json").read_text()


@pytest.fixture(scope="module")
def single(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("single")
    assert launch(1, run, folder, {}) == [0]
    return folder


@pytest.mark.parametrize(
    ("count", "engine", "settings"),
    [
        (2, None, {"batch_size": 2}),
        (4, None, {}),
        (2, FSDP, {"checkpointing": "on"}),
        (4, FSDP, {}),
    ],
    ids=["ddp2", "ddp4", "fsdp2", "fsdp4"],
)
def test_same_as_one_process(
    single: Path, tmp_path: Path, count: int, engine: Any, settings: dict[str, Any]
) -> None:
    assert launch(count, run, tmp_path, settings, engine=engine) == [0] * count
    compare(single, tmp_path)


def test_fsdp2_in_bfloat16(single: Path, tmp_path: Path) -> None:
    """Weights compute in bfloat16; the extension and all that is saved stay float32."""
    assert launch(2, run, tmp_path, {"precision": "bf16"}, engine=FSDP) == [0, 0]
    assert losses(tmp_path) == pytest.approx(losses(single), rel=0.01)
    assert losses(tmp_path) != pytest.approx(losses(single), abs=TOLERANCE)
    for name in ("model.safetensors", WEIGHTS_FILE):
        assert {t.dtype for t in load_file(tmp_path / name).values()} == {torch.float32}


def tied(folder: Path) -> None:
    model = clex.extend(tiny.make_model(tie_word_embeddings=True), clex.ClexConfig(max_scale=4))
    config = TrainConfig(depth="full", steps=1, global_batch=2)
    training.train(model, TOKENS, config, folder, console=Console(file=io.StringIO()))


def test_tied_weights_are_saved_once(tmp_path: Path) -> None:
    assert launch(1, tied, tmp_path / "one") == [0]
    assert launch(2, tied, tmp_path / "two", engine=FSDP) == [0, 0]
    one, two = (load_file(tmp_path / n / "model.safetensors") for n in ("one", "two"))
    assert one.keys() == two.keys()
    assert "lm_head.weight" not in one


def test_the_precision_is_ours(
    single: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the launcher's config says of mixed precision."""
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    assert launch(1, run, tmp_path, {"precision": "fp32"}) == [0]
    assert losses(tmp_path) == losses(single)


def joins() -> None:
    with pytest.raises(ConfigError, match="FSDP2 needs GPUs"):
        processes.join()
    assert not dist.is_initialized()


def test_cutting_weights_on_cpus_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """accelerate would leave them whole without a word."""
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    assert launch(2, joins) == [0, 0]


def run_zero3(folder: Path, settings: dict[str, Any]) -> None:
    import deepspeed  # noqa: F401

    # It compiles a faster all-reduce for CPUs, for minutes.
    sys.modules["deepspeed.comm.torch"].build_shm_op = lambda: None  # type: ignore[attr-defined]
    run(folder, settings)
    assert any(hasattr(p, "ds_id") for p in kept_models[-1].parameters())


def test_zero3(single: Path, tmp_path: Path) -> None:
    """Losses and files; it keeps gradients to itself."""
    pytest.importorskip("deepspeed")
    settings = json.loads((RECIPES / "zero3.json").read_text())
    del settings["torch_autocast"]  # to bfloat16
    (tmp_path / "zero3.json").write_text(json.dumps(settings))
    engine = {
        "ACCELERATE_USE_DEEPSPEED": "true",
        "ACCELERATE_DEEPSPEED_CONFIG_FILE": str(tmp_path / "zero3.json"),
        "ACCELERATE_CONFIG_DS_FIELDS": "deepspeed_config_file",
        "DS_ACCELERATOR": "cpu",
    }
    out = tmp_path / "out"
    assert launch(2, run_zero3, out, {}, engine=engine) == [0, 0]
    assert losses(out) == pytest.approx(losses(single), abs=TOLERANCE)
    for name in ("model.safetensors", WEIGHTS_FILE):
        a, b = load_file(single / name), load_file(out / name)
        assert a.keys() == b.keys()
        for key in a:
            assert a[key].dtype == b[key].dtype
            assert (a[key] - b[key]).abs().mean() < 5e-5, key


def run_cut(folder: Path, settings: dict[str, Any]) -> None:
    GatheredAttention()
    run(folder, settings)


@pytest.mark.parametrize("depth", ["full", "dynamics"])
def test_text_cut_across_processes(tmp_path: Path, depth: str) -> None:
    """Two texts at a time, each in two pieces, with sampled positions or at their true lengths."""
    # Lengths that two pieces can be cut from; one process is given the same ones.
    settings = {"depth": depth, "tokens": LONG, "margin": 0.0, "global_batch": 2}
    settings["select_windows"] = 0  # the last step counts where texts are cut
    assert launch(1, run_even, tmp_path / "one", settings) == [0]
    assert launch(4, run_cut, tmp_path / "four", settings, engine=ring(2, 2)) == [0] * 4
    compare(tmp_path / "one", tmp_path / "four")


def run_even(folder: Path, settings: dict[str, Any]) -> None:
    window = training.WindowPlan.window
    training.WindowPlan.window = (  # type: ignore[method-assign]
        lambda self, scale: window(dataclasses.replace(self, multiple=4), scale)
    )
    run(folder, settings)


def command(model: Path, data: Path, out: Path) -> None:
    options = "--train full --steps 2 --global-batch 2 --max-scale 4 --eval-lengths 64"
    arguments = ["extend", str(model), "--data", str(data), "--out", str(out), *options.split()]
    sys.argv = ["clex", *arguments]
    cli.main()


def test_command_line_in_two_processes(tmp_path: Path) -> None:
    """Both train, with weights cut up; one measures and writes. What is finished is so for both."""
    with tiny.token_cache(tmp_path / "cache"):
        model = tiny.write_model(tmp_path / "model")
        data = tiny.write_documents(tmp_path / "d.jsonl", [290 + 3 * i for i in range(12)])
        assert launch(1, command, model, data, tmp_path / "one") == [0]
        assert launch(2, command, model, data, tmp_path / "two", engine=FSDP) == [0, 0]
        before = (tmp_path / "two" / "results.json").read_text()
        assert launch(2, command, model, data, tmp_path / "two") == [0, 0]
    assert (tmp_path / "two" / "results.json").read_text() == before
    one, two = (json.loads((tmp_path / n / "results.json").read_text()) for n in ("one", "two"))
    assert [row["method"] for row in one] == [row["method"] for row in two]
    assert [row["ppl"] for row in one] == pytest.approx([row["ppl"] for row in two], rel=1e-3)
    settings = [json.loads((tmp_path / n / "run.json").read_text()) for n in ("one", "two")]
    assert settings[0]["settings"] == settings[1]["settings"]


# What is refused.


def test_engines_that_are_not_known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_USE_PARALLELISM_CONFIG", "true")
    monkeypatch.setenv("PARALLELISM_CONFIG_TP_SIZE", "2")
    with pytest.raises(ConfigError, match="tensor parallelism"):
        training.check_plan(config_of(make()), TrainConfig(depth="full"), TOKENS)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"train_length": 66}, "no multiple of 4"),
        ({"train_length": 128, "lengths": [60, 60, 60]}, "a window of one document needs"),
    ],
)
def test_windows_that_cannot_be_cut(
    monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any], says: str
) -> None:
    for name, value in {**ring(2, 1), "WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    tokens = tiny.make_tokens(settings.pop("lengths", [300, 300]))
    config = TrainConfig(depth="full", **settings)
    with pytest.raises((ConfigError, DataError), match=says):
        training.check_plan(config_of(make()), config, tokens)


# Going on.


@pytest.mark.parametrize(("first", "second", "engine"), [(2, 1, None), (2, 4, FSDP)], ids=str)
def test_goes_on_with_another_number_of_processes(
    single_long: Path, tmp_path: Path, first: int, second: int, engine: Any
) -> None:
    settings = {**LONGER, "save_every": 2}
    assert launch(first, run_until_killed, tmp_path, settings, engine=engine) != [0] * first
    assert last_complete(tmp_path) == "checkpoint-2"
    assert launch(second, run, tmp_path, settings, engine=engine) == [0] * second
    steps = [json.loads(line).get("step") for line in (tmp_path / "log.jsonl").open()]
    assert steps[-2:] == [3, 4]
    assert losses(tmp_path)[-2:] == pytest.approx(losses(single_long)[-2:], abs=TOLERANCE)
    a, b = load_file(single_long / WEIGHTS_FILE), load_file(tmp_path / WEIGHTS_FILE)
    assert all((a[name] - b[name]).abs().mean() < 5e-5 for name in a)


LONGER = {"steps": 4}


@pytest.fixture(scope="module")
def single_long(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("long")
    assert launch(1, run, folder, LONGER) == [0]
    return folder


def last_complete(folder: Path) -> str:
    found = training._last_complete(folder / "checkpoints")
    return Path(found or "nothing").name


def run_until_killed(folder: Path, settings: dict[str, Any]) -> None:
    """The last process is killed in its third step; what the first says of it goes to a file."""
    step = training.ExtensionTrainer.training_step

    def dies(self: Any, *args: Any, **kwargs: Any) -> Any:
        last = int(os.environ.get("RANK", "0")) == int(os.environ.get("WORLD_SIZE", "1")) - 1
        if last and self.state.global_step == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        return step(self, *args, **kwargs)

    training.ExtensionTrainer.training_step = dies  # type: ignore[method-assign]
    try:
        run(folder, settings)
    except TrainingError as error:
        (folder / "said").write_text(str(error))
        raise


def test_lost_process_ends_the_run_in_one_line(tmp_path: Path) -> None:
    codes = launch(2, run_until_killed, tmp_path, LONGER | {"save_every": 2})
    assert codes == [1, -signal.SIGKILL]
    said = (tmp_path / "said").read_text()
    assert said.startswith("another process of this run ended; the same command goes on from ")
    assert said.endswith("checkpoint-2")


def ended_by_the_launcher() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with (
        pytest.raises(TrainingError, match="the launcher ended this process; go on"),
        processes.others_alive(lambda: "go on"),
    ):
        os.kill(os.getpid(), signal.SIGTERM)
    assert signal.getsignal(signal.SIGTERM) == before


def test_launcher_that_ends_the_others() -> None:
    """`torchrun` does so as soon as it sees one process end."""
    assert launch(2, ended_by_the_launcher) == [0, 0]


def test_steps_of_other_windows_are_refused(tmp_path: Path) -> None:
    assert launch(1, run_until_killed, tmp_path, LONGER) == [-signal.SIGKILL]
    with pytest.raises(ConfigError, match="pass --global-batch 4"):
        run(tmp_path, {"steps": 4, "global_batch": 2})


def test_batch_that_processes_cannot_share(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(ConfigError, match="no multiple of 6"):
        TrainConfig(depth="full", batch_size=2, global_batch=8)
    assert TrainConfig(depth="full", batch_size=2, global_batch=12).accumulation == 2
