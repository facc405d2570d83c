"""What there is on this computer, what of it llama.cpp uses, and how models would be loaded: for `doctor`.

Knows what to tell, in lines and as JSON. Loads no model.
"""

from __future__ import annotations

import platform
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from typing import Any

from local_llava import devices, ggml, graphics, memory, placement, tuning
from local_llava.convert.write import human_size
from local_llava.corrections import corrected
from local_llava.devices import Device
from local_llava.errors import LocalLlavaError
from local_llava.gguf_file import GGUFFile
from local_llava.graphics import Graphics
from local_llava.llm_file import check_llm
from local_llava.memory import Need
from local_llava.mmproj import check_mmproj
from local_llava.placement import Placement
from local_llava.types import ModelFiles, Options

_VENDORS = {"CUDA": "NVIDIA", "ROCm": "AMD", "MTL": "Apple"}
"""Of backends that drive one vendor's GPUs; with others, the device's description names it."""


@dataclass(frozen=True)
class Plan:
    """How a pair would be loaded now."""

    name: str
    placement: Placement | None
    n_layers: int
    """All there are, the output matrix included."""
    tuned: dict[str, Any]
    """Options that were measured for it: see `tuning`."""
    problem: str = ""
    """Why it cannot be loaded."""


@dataclass(frozen=True)
class Advice:
    """What would make more of this computer useful."""

    graphics: Graphics
    reason: str
    commands: tuple[tuple[str, str], ...] = ()
    """What a command needs, and the command; the best first."""


@dataclass(frozen=True)
class Diagnosis:
    """What `doctor` tells."""

    versions: dict[str, str]
    backends: list[str]
    cpu_features: list[str]
    devices: list[Device]
    cores: int
    """That are used unasked."""
    cpus: int
    """That the process may run on."""
    free: int
    """Bytes of the computer's memory."""
    graphics: list[Graphics]
    advice: list[Advice]
    plans: list[Plan]

    def as_json(self) -> dict[str, Any]:
        """For `--json`."""
        plans = [{**asdict(plan), "placement": _placement_values(plan.placement)} for plan in self.plans]
        known = [_device_values(device) for device in self.devices]
        return {**asdict(self), "devices": known, "plans": plans}


def diagnose(pairs: list[tuple[str, ModelFiles]], options: Options) -> Diagnosis:
    """Look at this computer.

    Args:
        pairs: Models to plan for, with what to call them.
        options: How they are to be loaded.

    Raises:
        EngineError: llama-cpp-python's libraries cannot be loaded.
    """
    system = {"local-llava": version("local-llava"), "llama-cpp-python": version("llama-cpp-python")}
    system |= {"Python": platform.python_version(), "system": platform.platform()}
    seen = graphics.visible()
    return Diagnosis(
        versions=system,
        backends=devices.backends(),
        cpu_features=[name for name, value in ggml.cpu_features().items() if value not in ("", "0")],
        devices=devices.devices(),
        cores=devices.physical_cores(),
        cpus=ggml.available_cpus(),
        free=memory.available(),
        graphics=seen,
        advice=list(_advice(seen)),
        plans=[_plan(name, files, options) for name, files in pairs],
    )


def _plan(name: str, files: ModelFiles, options: Options) -> Plan:
    n_layers, tuned = 0, {}
    try:
        gguf, mmproj = (corrected(GGUFFile.open(path)).gguf for path in (files.model, files.mmproj))
        llm, tower = check_llm(gguf), check_mmproj(mmproj)
        n_layers, tuned = llm.n_layer + 1, tuning.read(files)
        placed = placement.choose(llm, tower, gguf, mmproj, tuning.apply(options, {}, files))
    except LocalLlavaError as e:
        return Plan(name, None, n_layers, tuned, str(e))
    return Plan(name, placed, n_layers, tuned)


def _advice(seen: list[Graphics]) -> Iterator[Advice]:
    """For each vendor whose GPUs llama.cpp does not use. GPUs in a processor have nothing to say beside others."""
    used = " ".join(f"{_VENDORS.get(gpu.backend, '')} {gpu.description}" for gpu in devices.gpus())
    vendors = {gpu.vendor: gpu for gpu in reversed(seen)}
    for vendor, gpu in vendors.items():
        if vendor in used or (used and vendor == "Intel"):
            continue
        recipes = graphics.RECIPES[vendor]
        built = [recipe.title for recipe in recipes if recipe.backend in devices.backends()]
        if built:
            reason = f"llama-cpp-python has {' and '.join(built)}, but finds no GPU with it: look at the driver"
            yield Advice(gpu, reason)
        else:
            # What can be built now comes first.
            ready = sorted(recipes, key=lambda recipe: not recipe.ready)
            commands = tuple((f"{r.title}, with {r.needs}", r.command) for r in ready)
            yield Advice(gpu, "llama-cpp-python is built without what it takes to use it; install it again", commands)


def lines(diagnosis: Diagnosis) -> Iterator[str]:
    """For people."""
    yield ", ".join(f"{name} {value}" for name, value in diagnosis.versions.items())
    yield f"llama.cpp has: {', '.join(diagnosis.backends)}"
    yield f"CPU features: {', '.join(diagnosis.cpu_features) or 'none'}"
    for device in diagnosis.devices:
        if device.kind == "cpu":
            count = f"{diagnosis.cores} threads, of {diagnosis.cpus} that may run"
            yield f"CPU: {device.description}, {count}; {human_size(diagnosis.free)} of memory free"
    for device in diagnosis.devices:
        if device.kind in ("gpu", "igpu"):
            shared = ", which is the computer's" if device.unified else ""
            free, total = human_size(device.free), human_size(device.total)
            size = f"{free} of {total} free{shared}" if device.total else "its memory is not known"
            yield f"GPU: {device.name}, {device.description}; {size}"
    if not any(device.kind in ("gpu", "igpu") for device in diagnosis.devices):
        yield "GPU: none that llama.cpp can use"
    for advice in diagnosis.advice:
        yield f"There is a GPU that is not used: {advice.graphics.name}"
        yield f"    {advice.reason}"
        for needs, command in advice.commands:
            yield f"    {needs}:"
            yield f"        {command}"
    for plan in diagnosis.plans:
        yield from _plan_lines(plan)


def _plan_lines(plan: Plan) -> Iterator[str]:
    yield f"{plan.name}:"
    placed = plan.placement
    if placed is None:
        yield f"    cannot be loaded: {plan.problem}"
        return
    answers = f"{placed.parallel} answer{'s' * (placed.parallel != 1)} at the same time"
    yield f"    context {placed.n_ctx} tokens, {answers}, KV cache {placed.kv_type} of {placed.n_cells} tokens"
    if placed.gpus:
        tower = "GPU" if placed.tower_on_gpu else "CPU"
        yield f"    {placed.n_gpu_layers} of {plan.n_layers} layers on the GPU; the tower on the {tower}"
    yield f"    memory of the computer: {_need(placed.cpu)}"
    for gpu, need in placed.gpus:
        yield f"    memory of {gpu.name}: {_need(need)}"
    for note in placed.notes:
        yield f"    {note}"
    if plan.tuned:
        yield "    measured by tune: " + ", ".join(f"{name} {value}" for name, value in plan.tuned.items())


def _need(need: Need) -> str:
    weights, kv_cache, compute, total = map(human_size, (need.weights, need.kv_cache, need.compute, need.total))
    return f"{total} (weights {weights}, KV cache {kv_cache}, computing {compute})"


def _device_values(device: Device) -> dict[str, Any]:
    values = {**asdict(replace(device, handle=0)), "unified": device.unified}
    del values["handle"]  # an address says nothing outside this process
    return values


def _placement_values(placed: Placement | None) -> dict[str, Any] | None:
    if placed is None:
        return None
    gpus = [{"device": gpu.name, "need": asdict(need)} for gpu, need in placed.gpus]
    return {**asdict(placed), "gpus": gpus}
