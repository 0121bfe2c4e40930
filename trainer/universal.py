"""A checkpoint cut anew: for another number of ranks, another ZeRO stage, with ZeRO or without.

    checkpoints/.universal/checkpoint-40/global_step40/zero/NAME/fp32.pt, exp_avg.pt, exp_avg_sq.pt, step.pt
                                         or optimizer.pt, for PyTorch's own optimiser
                                        /...    everything else of checkpoint-40, as links

That is DeepSpeed's universal format, a file for each state of each parameter, written so that every ZeRO stage reads
it. Which parameter a state belongs to is known by the names that `name_parameters` gives to the optimiser's groups.
What is random in a rank (dropout) has no meaning for others and is left out.

DeepSpeed 0.19.8, `DeepSpeedZeroOptimizer_Stage3.load_hp_checkpoint_state_from_checkpoint_dir_stage3`, reads it wrongly
in two places, which `after_loading` mends (`tests/trainer/test_world_change.py` fails when that is needed no more):
one tensor `step` is shared by all sub-groups, so that AdamW counts a step once for each of them; and each group of
parameters gets the hyper-parameters of the first, so that biases and norms have weight decay.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from transformers import TrainerCallback

from tunewright.checkpoints import hash_of
from tunewright.errors import StorageError
from tunewright.files import written_aside
from tunewright.plan.conversion import FOLDER, Way, place_of
from tunewright.space import check_space, storing
from tunewright.trainer.checkpoint_loading import plain_data_only

MOMENTS = ("exp_avg", "exp_avg_sq")
OPTIMIZER, TAG = "optimizer.pt", "latest_universal"
MADE_FOR = "converted.json"
# Of a checkpoint, what is of its own cut: states, their names, and what is random in a rank.
OWN = ("global_step*", "latest", "zero_to_*.py", "rng_state*", OPTIMIZER)


def name_parameters(optimizer: torch.optim.Optimizer, model: torch.nn.Module) -> None:
    """Write the names of parameters into the optimiser's groups, as PyTorch does when it is given them.

    Groups without parameters go: DeepSpeed drops them, and the groups of both have to be the same.
    """
    names = {parameter: name for name, parameter in model.named_parameters()}
    optimizer.param_groups[:] = [group for group in optimizer.param_groups if group["params"]]
    for group in optimizer.param_groups:
        group["param_names"] = [names[parameter] for parameter in group["params"]]


def is_universal(checkpoint: Path) -> bool:
    """Tell whether DeepSpeed has to read this folder as a universal checkpoint."""
    return (checkpoint / TAG).is_file()


def convert(checkpoint: Path, how: Way, *, trusted: bool) -> Path:
    """Convert a checkpoint, which stays what it is, and return the folder to go on from; what is there is used again.

    Raises:
        StorageError: there is no room, what has to be in the checkpoint is not, or it brings code and is not `trusted`.
    """
    place = place_of(checkpoint)
    made_for = {"way": how.value, "of": hash_of(checkpoint / "trainer_state.json")}
    if (place / MADE_FOR).is_file() and json.loads((place / MADE_FOR).read_text(encoding="utf-8")) == made_for:
        return place
    shutil.rmtree(place.parent, ignore_errors=True)
    zero = next(checkpoint.glob("global_step*"), None)
    # DeepSpeed's own converter keeps its pieces until they are put together.
    needed = 2 * sum(file.stat().st_size for file in (zero.iterdir() if zero else [checkpoint / OPTIMIZER]))
    what, advice = f"The conversion of {checkpoint.name}", "Make room; the checkpoint itself is untouched."
    with storing(place, what, needed=needed, advice=lambda: advice, ask_disk=False):
        check_space(place, needed, what, advice)
        place.parent.mkdir()
        with written_aside(place) as staging, plain_data_only(deepspeed=zero is not None, trusted=trusted):
            staging.mkdir()
            _link_the_rest(checkpoint, staging)
            step = json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))["global_step"]
            folder = staging / f"global_step{step}"
            groups = _from_zero(zero, folder) if zero else _from_torch(checkpoint, folder)
            if how is Way.for_torch:
                torch.save(_as_torch(folder, groups), staging / OPTIMIZER)
                shutil.rmtree(folder)
            else:
                _write_common(folder, groups, step)
            (staging / MADE_FOR).write_text(json.dumps(made_for), encoding="utf-8")
    return place


def _link_the_rest(checkpoint: Path, folder: Path) -> None:
    for path in checkpoint.iterdir():
        if not any(path.match(pattern) for pattern in OWN):
            (folder / path.name).symlink_to(Path("..", "..", checkpoint.name, path.name))


def _from_zero(zero: Path, folder: Path) -> list[dict[str, Any]]:
    """Have DeepSpeed convert, make it readable for every stage, and return the groups of the optimiser."""
    from deepspeed.checkpoint import ds_to_universal

    options = argparse.Namespace(
        input_folder=str(zero),
        output_folder=str(folder),
        num_extract_workers=1,  # in this process, where `plain_data_only` holds
        num_merge_workers=1,
        keep_temp_folder=False,
        strict=True,
        inject_missing_state=True,  # else ZeRO-1 and 2 are refused: only Megatron writes what it looks for
    )
    said = StringIO()
    with redirect_stdout(said), redirect_stderr(said):
        ds_to_universal.main(options)
    (folder.parent / TAG).unlink()
    shapes: dict[str, torch.Size] = {}
    for file in folder.glob("*_model_states.pt"):  # copies of whole weights, of which shapes alone are needed
        for group in torch.load(file, mmap=True)["param_shapes"]:
            shapes |= group
        file.unlink()
    optimizer = torch.load(folder / "zero" / "optimizer_state.pt")
    for name in {path.name for path in (folder / "zero").iterdir() if path.is_dir()} - set(shapes):
        shutil.rmtree(folder / "zero" / name)  # frozen weights, which are those of the base
    for name, shape in shapes.items():
        if not (folder / "zero" / name / "step.pt").is_file():  # written by stage 3, which has it in one place
            states = {state: torch.load(_file(folder, name, state)).reshape(shape) for state in ("fp32", *MOMENTS)}
            _write(folder, name, {**states, "step": optimizer["optimizer_state_dict"]["state"][0]["step"]})
    return list(optimizer["param_groups"])


def _from_torch(checkpoint: Path, folder: Path) -> list[dict[str, Any]]:
    """Write what PyTorch's optimiser has saved in the universal format, and return its groups."""
    saved = torch.load(checkpoint / OPTIMIZER, map_location="cpu", mmap=True)
    groups = saved["param_groups"]
    numbered = [pair for group in groups for pair in zip(group["params"], group["param_names"], strict=True)]
    masters = iter(saved["master_weights"]) if "master_weights" in saved else None
    with _weights(checkpoint) as weight:
        for index, name in numbered:
            state = saved["state"][index]
            fp32 = next(masters) if masters else weight(name).float()
            _write(folder, name, {"fp32": fp32, **{key: state[key] for key in (*MOMENTS, "step")}})
    return list(groups)


@contextmanager
def _weights(checkpoint: Path) -> Iterator[Callable[[str], torch.Tensor]]:
    """Give the function that finds a parameter's weight in what was saved of the model, where PEFT shortens names."""
    with ExitStack() as opened:
        found = {}
        for path in checkpoint.glob("*.safetensors"):
            file = opened.enter_context(safe_open(path, "pt"))
            found.update(dict.fromkeys(file.keys(), file))

        def weight(name: str) -> torch.Tensor:
            for key in (name, re.sub(r"(\.modules_to_save)?\.default\b", "", name)):
                if key in found:
                    return found[key].get_tensor(key)
            raise StorageError(f"{checkpoint} holds no weight {name}, which its optimiser has a state of.")

        yield weight


def _file(folder: Path, name: str, state: str) -> Path:
    return folder / "zero" / name / f"{state}.pt"


def _read(folder: Path, name: str, state: str) -> torch.Tensor:
    """Return a state of a parameter; DeepSpeed keeps all but `step` in a mapping."""
    found = torch.load(_file(folder, name, state), map_location="cpu")
    return found["param"] if isinstance(found, dict) else found


def _write(folder: Path, name: str, states: dict[str, torch.Tensor]) -> None:
    for state, value in states.items():
        file = _file(folder, name, state)
        file.parent.mkdir(parents=True, exist_ok=True)
        torch.save(value if state == "step" else {"param": value, "cat_dim": 0}, file)


def _write_common(folder: Path, groups: list[dict[str, Any]], step: int) -> None:
    """Write what belongs to no parameter, in the places where ZeRO-1 and 2 and where ZeRO-3 look for it."""
    from deepspeed import __version__

    first = groups[0]["param_names"][0]
    nested = {"state": {0: {"step": _read(folder, first, "step")}}, "param_groups": groups}
    common = {"ds_version": __version__, "param_groups": groups, "optimizer_state_dict": nested}
    torch.save(common, folder / "zero" / "optimizer_state.pt")
    model = {"module": {}, "global_steps": step, "skipped_steps": 0, "dp_world_size": 1, "mp_world_size": 1}
    for name in ("mp_rank_00_model_states.pt", "zero_pp_rank_0_mp_rank_00_model_states.pt"):
        torch.save({**model, "lr_scheduler": None}, folder / name)
    (folder.parent / TAG).write_text(folder.name, encoding="utf-8")


def after_loading(engine: Any, checkpoint: Path) -> None:
    """Mend what DeepSpeed reads wrongly of a universal checkpoint, and have it read its own ones from here on."""
    folder = checkpoint / (checkpoint / TAG).read_text(encoding="utf-8")
    optimizer = engine.optimizer.optimizer
    saved = torch.load(folder / "zero" / "optimizer_state.pt")["param_groups"]
    for group, before in zip(optimizer.param_groups, saved, strict=True):
        group.update({key: value for key, value in before.items() if key != "params"})
    fused = optimizer.param_groups[0].get("fused")
    for weight, state in optimizer.state.items():  # PyTorch's fused AdamW has the step beside the weight
        state["step"] = state["step"].to(weight.device if fused else "cpu", copy=True)
    engine._config.load_universal_checkpoint = False


class RemoveConversion(TrainerCallback):
    """Takes away what a run was continued from once it has a checkpoint of its own, or ends."""

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            shutil.rmtree(Path(args.output_dir, FOLDER), ignore_errors=True)

    on_train_end = on_save


def _as_torch(folder: Path, groups: list[dict[str, Any]]) -> dict[str, Any]:
    """Return a state of PyTorch's optimiser, as `attach_master_weights` takes it; without masters nobody asks."""
    state: dict[int, dict[str, torch.Tensor]] = {}
    packed, masters = [], []
    for group in groups:
        first = len(state)
        for name in group["param_names"]:
            masters.append(_read(folder, name, "fp32"))
            state[len(state)] = {key: _read(folder, name, key) for key in (*MOMENTS, "step")}
        packed.append({**group, "params": list(range(first, len(state)))})
    return {"state": state, "param_groups": packed, "master_weights": masters}


def read_universal(checkpoint: Path) -> dict[str, Any]:
    """Return what a universal checkpoint holds as a state of PyTorch's optimiser."""
    folder = checkpoint / (checkpoint / TAG).read_text(encoding="utf-8")
    return _as_torch(folder, torch.load(folder / "zero" / "optimizer_state.pt")["param_groups"])
