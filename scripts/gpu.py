"""Show the GPUs of this machine, stop your own training runs, or keep GPUs busy for a test.

uv run python scripts/gpu.py status
uv run python scripts/gpu.py kill                       # list, ask, stop
uv run python scripts/gpu.py hot --gpus 0,1 --minutes 10
"""

import argparse
import shutil
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import psutil

PROJECT = Path(__file__).resolve().parent.parent
TRAINING_SCRIPTS = ("run_train.py", "finetune.py")
SECONDS_TO_SAVE = 60
MATRIX_SIZE = 8192  # three fp16 matrices of this size take 0.4 GB


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("status", help="show nvidia-smi's table and what PyTorch sees")
    commands.add_parser("kill", help="list your own training processes of this project, ask, and stop them")
    hot = commands.add_parser("hot", help="keep GPUs busy with matrix products")
    hot.add_argument("--gpus", default="all", help="indices such as 0,1 or all")
    hot.add_argument("--minutes", type=float, default=10, help="duration")
    args = parser.parse_args()
    if args.command == "status":
        show_status()
    elif args.command == "kill":
        stop_training()
    else:
        keep_busy(args.gpus, args.minutes)


def show_status() -> None:
    # The driver's view first: it also shows the processes of other programs.
    if shutil.which("nvidia-smi"):
        subprocess.run(["nvidia-smi"], check=False)
    else:
        print("nvidia-smi is not on the PATH: this machine has no NVIDIA driver.")

    # PyTorch's view can differ: a CPU build of PyTorch sees no GPU at all.
    import torch

    print(f"PyTorch {torch.__version__}, built for CUDA {torch.version.cuda}, for ROCm {torch.version.hip}")
    if torch.cuda.device_count() == 0:
        print("  PyTorch sees no GPU; training runs on the CPU.")
    for index in range(torch.cuda.device_count()):
        device = torch.cuda.get_device_properties(index)
        print(
            f"  cuda:{index} {device.name}, {device.total_memory / 2**30:.1f} GiB, "
            f"compute capability {device.major}.{device.minor}, bf16: {torch.cuda.is_bf16_supported()}"
        )


# ----------------------------------------------------------------------------------------------------------------- kill


def stop_training() -> None:
    """Send SIGTERM to this user's training processes of this project, after confirmation.

    A run that receives SIGTERM saves a checkpoint first. Processes that are still running a minute later are killed
    after a second confirmation.
    """
    runs = find_training_processes()
    if not runs:
        print(f"No training process of yours from {PROJECT} is running.")
        return
    workers = [child for process in runs for child in process.children(recursive=True)]
    show_processes(runs)
    if not confirm(f"Stop {len(runs)} of them? [y/N] "):
        print("Nothing was stopped.")
        return

    for process in runs:
        with suppress(psutil.NoSuchProcess):  # it ended while the question was open
            process.terminate()
    # The workers end with their run. They are waited for, because they hold memory, too.
    alive = wait_for_end([*runs, *workers], SECONDS_TO_SAVE)
    if alive:
        kill_after_confirmation(alive)
    print("Stopped.")


def kill_after_confirmation(processes: list[psutil.Process]) -> None:
    print(f"Still running after {SECONDS_TO_SAVE} seconds:")
    show_processes(processes)
    # A large checkpoint on a slow disk takes long, so killing is the user's decision.
    if not confirm("Kill them now, without saving? [y/N] "):
        sys.exit("They were left running.")
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            process.kill()


def wait_for_end(processes: list[psutil.Process], seconds: float) -> list[psutil.Process]:
    """Wait until all processes have ended, at most so many seconds. Return those that are still running."""
    deadline = time.monotonic() + seconds
    while (alive := [process for process in processes if is_alive(process)]) and time.monotonic() < deadline:
        time.sleep(0.2)
    return alive


def is_alive(process: psutil.Process) -> bool:
    """Return whether a process runs. A zombie has ended, but its parent has not collected its exit code yet."""
    try:
        return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def find_training_processes() -> list[psutil.Process]:
    """Return this user's Python processes that run a training script of this project, without their workers."""
    # Only processes of this user: others could not be stopped anyway.
    user = psutil.Process().username()
    runs = {}
    for process in psutil.process_iter():
        try:
            if process.username() == user and is_training(process):
                runs[process.pid] = process
        except (psutil.Error, OSError):
            continue  # the process has ended, or belongs to another user
    # torchrun is one of them, too. It passes the signal on to the processes that it started.
    return [process for process in runs.values() if not any(parent.pid in runs for parent in process.parents())]


def is_training(process: psutil.Process) -> bool:
    """Return whether the command line is `python ... SCRIPT ...` with a training script of this folder."""
    command = process.cmdline()
    if not command or not Path(command[0]).name.lower().startswith("python"):
        return False
    # A relative path in the command line starts at the working directory of the process.
    working_directory = Path(process.cwd())
    scripts = [argument for argument in command[1:] if Path(argument).name in TRAINING_SCRIPTS]
    return any((working_directory / script).resolve().parent == PROJECT for script in scripts)


def show_processes(processes: list[psutil.Process]) -> None:
    """Print one line per process: id, age, memory, command."""
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            age_minutes = (time.time() - process.create_time()) / 60
            memory_gib = process.memory_info().rss / 2**30
            command = " ".join(process.cmdline())[:120]
            print(f"  {process.pid:>8}  {age_minutes:6.0f} min  {memory_gib:5.1f} GiB  {command}")


def confirm(question: str) -> bool:
    """Ask the user. Without an answer (a closed stdin) the answer is no."""
    try:
        return input(question).strip().lower() in ("y", "yes")
    except EOFError:
        print()
        return False


# ------------------------------------------------------------------------------------------------------------------ hot


def choose_gpus(gpus: str, count: int) -> list[int]:
    """Return the indices that the user asks for."""
    if count == 0:
        sys.exit("error: PyTorch sees no GPU on this machine. Run: make gpu-status")
    available = [str(index) for index in range(count)]
    chosen = available if gpus == "all" else gpus.split(",")
    if not set(chosen) <= set(available):
        sys.exit(f"error: GPUS={gpus!r}: expected all, or some of {','.join(available)}, for example GPUS=0.")
    return [int(index) for index in chosen]


def keep_busy(gpus: str, minutes: float) -> None:
    """Multiply matrices on the given GPUs until the time is over or Ctrl-C, and print the speed every 10 seconds."""
    import torch

    indices = choose_gpus(gpus, torch.cuda.device_count())
    matrices = []
    for index in indices:
        # fp16 runs on the tensor cores of every GPU that PyTorch supports.
        a, b = torch.randn(2, MATRIX_SIZE, MATRIX_SIZE, device=f"cuda:{index}", dtype=torch.float16)
        matrices.append((a, b, torch.empty_like(a)))
    print(f"Keeping GPU {gpus} busy for {minutes:g} minutes. Ctrl-C stops it.")

    # time.monotonic: changes of the system's clock must not end the run.
    start = last_print = time.monotonic()
    products = 0
    try:
        while time.monotonic() - start < minutes * 60:
            # Products are queued on all GPUs before waiting, so that they run at the same time.
            for a, b, product in matrices * 20:
                torch.mm(a, b, out=product)
            products += 20
            for index in indices:
                torch.cuda.synchronize(index)
            now = time.monotonic()
            if now - last_print > 10:
                tflops = products * 2 * MATRIX_SIZE**3 / (now - start) / 1e12
                print(f"  {now - start:5.0f} s  {tflops:6.0f} TFLOP/s per GPU", flush=True)
                last_print = now
    except KeyboardInterrupt:
        print()
    print("The GPUs are idle again.")


if __name__ == "__main__":
    main()
