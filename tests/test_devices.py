"""Cores and GPUs, as systems and ggml tell of them; computers that are not this one are folders of files."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from local_llava import control_groups, devices, ggml, graphics, memory
from local_llava.devices import Device

linux = pytest.mark.skipif(sys.platform != "linux", reason="Linux tells of its hardware in files")


@pytest.fixture
def system(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Makes /sys and /proc of another computer, and the CPUs that the process may run on."""
    monkeypatch.setattr(devices, "_SYS", tmp_path / "sys")
    monkeypatch.setattr(control_groups, "_ROOT", tmp_path / "sys/fs/cgroup")
    monkeypatch.setattr(control_groups, "_OWN", tmp_path / "proc/self/cgroup")
    monkeypatch.setattr(graphics, "_SYS", tmp_path / "sys")
    monkeypatch.setattr(graphics, "_PROC", tmp_path / "proc")

    def has(files: dict[str, str], cpus: set[int] | None = None) -> None:
        for name, text in files.items():
            path = tmp_path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        if cpus is not None:
            monkeypatch.setattr(os, "sched_getaffinity", lambda _: cpus)

    return has


def siblings(pairs: dict[int, str]) -> dict[str, str]:
    return {f"sys/devices/system/cpu/cpu{n}/topology/thread_siblings_list": f"{text}\n" for n, text in pairs.items()}


# --- threads ---


@linux
def test_two_threads_of_a_core_count_once(system: Any) -> None:
    system(siblings({n: f"{n % 4},{n % 4 + 4}" for n in range(8)}), set(range(8)))
    assert devices.physical_cores() == 4


@linux
def test_what_the_process_may_use_bounds_the_threads(system: Any) -> None:
    system(siblings({n: f"{n // 2 * 2}-{n // 2 * 2 + 1}" for n in range(8)}), {0, 1, 5})
    assert devices.physical_cores() == 2, "both of the first core's, and one of the third's"
    system({}, {2})
    assert devices.physical_cores() == 1


@linux
@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"sys/fs/cgroup/cpu.max": "max 100000"}, 8),
        ({"sys/fs/cgroup/cpu.max": "250000 100000"}, 3),
        ({"sys/fs/cgroup/cpu.max": "1000 100000"}, 1),
        ({"sys/fs/cgroup/cpu.max": "nonsense"}, 8),
        ({"sys/fs/cgroup/cpu/cpu.cfs_quota_us": "200000", "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000"}, 2),
        ({"sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1", "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000"}, 8),
    ],
)
def test_a_containers_share_of_time_bounds_the_threads(files: dict[str, str], expected: int, system: Any) -> None:
    system({**siblings({n: str(n) for n in range(8)}), **files}, set(range(8)))
    assert devices.physical_cores() == expected


SERVICE = "system.slice/llava.service"


@linux
@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"proc/self/cgroup": f"0::/{SERVICE}\n", f"sys/fs/cgroup/{SERVICE}/cpu.max": "200000 100000"}, 2),
        # That of a group around its own holds, too.
        ({f"sys/fs/cgroup/{SERVICE}/cpu.max": "max 100000", "sys/fs/cgroup/system.slice/cpu.max": "100000 50000"}, 2),
        ({f"sys/fs/cgroup/{SERVICE}/cpu.max": "600000 100000", "sys/fs/cgroup/cpu.max": "300000 100000"}, 3),
        # Other services' do not.
        ({"sys/fs/cgroup/other/cpu.max": "100000 100000"}, 8),
        # Of a container that is told the host's path, and of one whose group lies outside of what it sees.
        ({"proc/self/cgroup": "0::/docker/1234\n", "sys/fs/cgroup/cpu.max": "400000 100000"}, 4),
        ({"proc/self/cgroup": "0::/../../x\n", "sys/fs/cgroup/cpu.max": "400000 100000"}, 4),
        (
            {
                "proc/self/cgroup": f"7:memory:/\n3:cpuset,cpu:/{SERVICE}\n1:name=systemd:/x\n0::/\n",
                f"sys/fs/cgroup/cpu/{SERVICE}/cpu.cfs_quota_us": "500000",
                f"sys/fs/cgroup/cpu/{SERVICE}/cpu.cfs_period_us": "100000",
            },
            5,
        ),
        ({"proc/self/cgroup": "nonsense\n\n0::\n"}, 8),
    ],
)
def test_a_services_share_of_time_bounds_the_threads(files: dict[str, str], expected: int, system: Any) -> None:
    own = {"proc/self/cgroup": f"0::/{SERVICE}\n"}
    system({**siblings({n: str(n) for n in range(8)}), **own, **files}, set(range(8)))
    assert devices.physical_cores() == expected


@linux
def test_a_services_share_of_memory_bounds_what_is_free(system: Any) -> None:
    own = f"sys/fs/cgroup/{SERVICE}"
    system(
        {
            "proc/self/cgroup": f"0::/{SERVICE}\n",
            f"{own}/memory.max": "50000000\n",
            f"{own}/memory.current": "30000000\n",
            f"{own}/memory.stat": "anon 1\ninactive_file 10000000\n",
        }
    )
    assert memory.available() == 30_000_000
    around = "sys/fs/cgroup/system.slice"
    system({f"{around}/memory.max": "60000000", f"{around}/memory.current": "55000000", f"{around}/memory.stat": ""})
    assert memory.available() == 5_000_000
    system({f"{around}/memory.max": "max"})
    assert memory.available() == 30_000_000


@linux
def test_slow_cores_beside_fast_ones_are_left_out(system: Any) -> None:
    pairs = siblings({0: "0-1", 1: "0-1", 2: "2-3", 3: "2-3", 4: "4", 5: "5", 6: "6", 7: "7"})
    system({**pairs, "sys/devices/cpu_core/cpus": "0-3\n"}, set(range(8)))
    assert devices.physical_cores() == 2
    system({}, {4, 5, 6})
    assert devices.physical_cores() == 3, "where the process has only those"


@linux
def test_the_affinity_mask_counts_in_a_process() -> None:
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            "import os; os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})\n"
            "from local_llava import devices; print(devices.physical_cores())",
        ],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == "1\n"


# --- ggml's devices ---


def test_this_computers_devices() -> None:
    found = devices.devices()
    (cpu,) = [device for device in found if device.kind == "cpu"]
    assert cpu.backend == "CPU" and cpu.unified and cpu.total > 2**28 and 0 <= cpu.free <= cpu.total
    assert cpu.handle == ggml.functions().backend_dev_by_type(ggml.CPU)
    assert "CPU" in devices.backends()


def device(name: str, kind: Any, backend: str = "Vulkan", id: str | None = None) -> Device:
    return Device(1, name, name, kind, backend, 1, 1, id)


def test_gpus_are_those_that_llama_cpp_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not the ones inside a processor beside others, and none twice that two backends drive."""
    cpu, inside = device("CPU", "cpu", "CPU"), device("Vulkan1", "igpu")
    card = [device("CUDA0", "gpu", "CUDA", "0000:01:00.0"), device("Vulkan0", "gpu", "Vulkan", "0000:01:00.0")]
    other = device("Vulkan2", "gpu")
    for listed, expected in (
        ([cpu], []),
        ([cpu, inside], [inside]),
        ([*card, inside, cpu], card[:1]),
        ([*card, other, cpu], [card[0], other]),
        ([inside, device("SYCL0", "igpu", "SYCL"), cpu], [inside]),
        ([device("BLAS", "accelerator", "BLAS"), cpu], []),
    ):
        monkeypatch.setattr(devices, "devices", lambda listed=listed: listed)
        assert devices.gpus() == expected


# --- GPUs that the system sees ---


def pci(slot: str, vendor: str, product: str, kind: str) -> dict[str, str]:
    at = f"sys/bus/pci/devices/0000:{slot}"
    return {f"{at}/vendor": f"{vendor}\n", f"{at}/device": f"{product}\n", f"{at}/class": f"{kind}\n"}


@linux
def test_gpus_on_the_bus(system: Any) -> None:
    system(
        {
            **pci("00:02.0", "0x8086", "0x9a49", "0x030000"),
            **pci("01:00.0", "0x10de", "0x2684", "0x030000"),
            **pci("02:00.0", "0x10de", "0x20b5", "0x030200"),
            **pci("03:00.0", "0x1002", "0x744c", "0x038000"),
            **pci("04:00.0", "0x8086", "0x1533", "0x020000"),  # a network card
            **pci("05:00.0", "0x1af4", "0x1050", "0x030000"),  # a virtual machine's screen
            "proc/driver/nvidia/gpus/0000:01:00.0/information": "Model: \t\t NVIDIA GeForce RTX 4090\nIRQ:   1\n",
        }
    )
    seen = [(gpu.vendor, gpu.name) for gpu in graphics.visible()]
    assert seen == [
        ("Intel", "Intel GPU 9a49"),
        ("NVIDIA", "NVIDIA GeForce RTX 4090"),
        ("NVIDIA", "NVIDIA GPU 20b5"),
        ("AMD", "AMD GPU 744c"),
    ]


@linux
def test_a_container_with_the_driver_only(system: Any) -> None:
    system({"proc/driver/nvidia/gpus/0000:01:00.0/information": "Model: NVIDIA H200\n"})
    assert [gpu.name for gpu in graphics.visible()] == ["NVIDIA H200"]


@linux
def test_a_computer_that_tells_nothing(system: Any) -> None:
    system({})
    assert graphics.visible() == []


def test_the_version_in_the_recipes_is_the_pinned_one() -> None:
    import re

    stated = re.search(r'"(llama-cpp-python==[^"]+)"', (Path(__file__).parent.parent / "pyproject.toml").read_text())
    assert stated and graphics.pinned() == stated[1]
    for recipes in graphics.RECIPES.values():
        assert all(stated[1] in recipe.command and recipe.flag in recipe.command for recipe in recipes)
