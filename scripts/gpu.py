"""GPUs of this machine: what runs on them, ending one's own training, keeping them busy.

uv run python scripts/gpu.py status
uv run python scripts/gpu.py kill                       # lists, asks, ends
uv run python scripts/gpu.py hot --gpus 0,1 --minutes 10
"""

import argparse
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import psutil

PROJECT = Path(__file__).resolve().parent.parent
TRAINING_SCRIPTS = ("run_train.py", "finetune.py")
MATRIX = 8192
"""Side of the matrices that keep a GPU busy: three in bf16 take 0.4 GB."""


def status() -> None:
    """Prints nvidia-smi's table and the devices as PyTorch sees them."""
    if shutil.which("nvidia-smi"):
        subprocess.run(["nvidia-smi"], check=False)
    else:
        print("nvidia-smi is not on the PATH: no NVIDIA driver on this machine.")
    import torch

    print(f"PyTorch {torch.__version__}, built for CUDA {torch.version.cuda or '-'} / ROCm {torch.version.hip or '-'}")
    for index in range(torch.cuda.device_count()):
        device = torch.cuda.get_device_properties(index)
        print(
            f"  cuda:{index} {device.name}, {device.total_memory / 2**30:.1f} GiB, compute capability "
            f"{device.major}.{device.minor}, bf16 {'yes' if torch.cuda.is_bf16_supported() else 'no'}"
        )
    if not torch.cuda.device_count():
        print("  PyTorch sees no GPU; training runs on the CPU.")


def kill() -> None:
    """Lists this user's training processes of this project and, after a yes, asks each to end (SIGTERM).

    Those that are still there after a minute, such as one that saves for long, are listed and ended for good after a
    second yes. Without an answer nothing happens.
    """
    processes = training_processes()
    if not processes:
        print(f"No training of yours from {PROJECT} is running.")
        return
    family = {process.pid: process for root in processes for process in [root, *root.children(recursive=True)]}
    show(processes)
    if not confirmed(f"End {len(processes)} of them? [y/N] "):
        print("Nothing was ended.")
        return
    for process in processes:
        end(process, psutil.Process.terminate)
    if alive := still_alive(list(family.values()), seconds=60):
        print("Still running after a minute:")
        show(alive)
        if not confirmed("End them at once, without saving? [y/N] "):
            sys.exit("They were left running.")
        for process in alive:
            end(process, psutil.Process.kill)
        still_alive(alive, seconds=10)
    print("Ended.")


def still_alive(processes: list[psutil.Process], seconds: float) -> list[psutil.Process]:
    """Waits until all have ended, at most so long; those that have not (a zombie has)."""

    def alive(process: psutil.Process) -> bool:
        with suppress(psutil.NoSuchProcess):
            return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
        return False

    deadline = time.monotonic() + seconds
    while (left := [process for process in processes if alive(process)]) and time.monotonic() < deadline:
        time.sleep(0.2)
    return left


def training_processes() -> list[psutil.Process]:
    """This user's Python processes that run a training script of this project; not the workers that they started."""
    me = psutil.Process()
    found = {}
    for process in psutil.process_iter():
        try:
            if process.username() == me.username() and process.pid != me.pid and runs_training(process):
                found[process.pid] = process
        except (psutil.Error, OSError):
            continue  # ended meanwhile, or not ours to look at
    return [process for process in found.values() if not any(parent.pid in found for parent in process.parents())]


def runs_training(process: psutil.Process) -> bool:
    """Whether a process is Python with a training script of this project among its arguments (torchrun's too)."""
    command = process.cmdline()
    if not command or not Path(command[0]).name.lower().startswith("python"):
        return False
    folder = Path(process.cwd())
    names = [Path(argument) for argument in command[1:] if Path(argument).name in TRAINING_SCRIPTS]
    return any((folder / name).resolve().parent == PROJECT for name in names)


def show(processes: list[psutil.Process]) -> None:
    """One line per process: id, age, memory, command."""
    for process in processes:
        try:
            age, memory = (time.time() - process.create_time()) / 60, process.memory_info().rss / 2**30
            print(f"  {process.pid:>8}  {age:6.0f} min  {memory:5.1f} GiB  {' '.join(process.cmdline())[:120]}")
        except psutil.Error:
            continue


def confirmed(question: str) -> bool:
    """Whether the user says yes; no where nobody can be asked."""
    try:
        return input(question).strip().lower() in ("y", "yes")
    except EOFError:
        print()
        return False


def end(process: psutil.Process, how: Callable[[psutil.Process], None]) -> None:
    """Sends a process its end, if it is still there."""
    with suppress(psutil.NoSuchProcess):
        how(process)


def hot(gpus: str, minutes: float) -> None:
    """Multiplies matrices on the named GPUs until the time is over or Ctrl-C, and prints what each reaches."""
    import torch

    count = torch.cuda.device_count()
    if not count:
        sys.exit("error: PyTorch sees no GPU on this machine, so there is none to keep busy. See: make gpu-status")
    wanted = (
        list(range(count)) if gpus == "all" else [int(index) for index in gpus.split(",") if index.strip().isdigit()]
    )
    if not wanted or any(index >= count for index in wanted) or (gpus != "all" and len(wanted) != len(gpus.split(","))):
        sys.exit(
            f"error: GPUS={gpus!r}; this machine has {count}: give some of 0 to {count - 1} like GPUS=0,1, or all."
        )
    matrices = []
    for index in wanted:
        dtype = torch.bfloat16 if torch.cuda.get_device_capability(index) >= (8, 0) else torch.float16
        a, b = (torch.randn(MATRIX, MATRIX, device=f"cuda:{index}", dtype=dtype) for _ in range(2))
        matrices.append((a, b, torch.empty_like(a)))
    print(f"Keeping GPU {', '.join(map(str, wanted))} busy for {minutes:g} minutes; Ctrl-C ends it.")
    rounds, start = 0, time.monotonic()
    printed = start
    try:
        while (now := time.monotonic()) - start < minutes * 60:
            for a, b, product in matrices:
                for _ in range(20):
                    torch.mm(a, b, out=product)
            for index in wanted:
                torch.cuda.synchronize(index)
            rounds += 1
            if now - printed > 10:
                rate = rounds * 20 * 2 * MATRIX**3 / (time.monotonic() - start) / 1e12
                print(f"  {now - start:5.0f} s  {rate:6.0f} TFLOP/s per GPU", flush=True)
                printed = now
    except KeyboardInterrupt:
        print()
    print("The GPUs are free again.")


def main() -> None:
    """Parses the command line and runs one of the three commands."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("status", help="show the GPUs and what PyTorch sees of them")
    commands.add_parser("kill", help="list your own training processes of this project, ask, and end them")
    heat = commands.add_parser("hot", help="keep GPUs busy with matrix products")
    heat.add_argument("--gpus", default="all", help="numbers like 0,1, or all")
    heat.add_argument("--minutes", type=float, default=10, help="how long")
    arguments = parser.parse_args()
    if arguments.command == "hot":
        hot(arguments.gpus, arguments.minutes)
    else:
        {"status": status, "kill": kill}[arguments.command]()


if __name__ == "__main__":
    main()
