"""Config files and command lines at random: every outcome is a run (as far as it goes before training) or one message.

The quick tests try the same few cases each time; the slow ones others each day, from a seed that they print:
``LITMOE_FUZZ_SEED=N`` repeats them.
"""

import os
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import seed as seeded
from hypothesis import strategies as st

from litmoe.cli import UserError, exit_with_message, run_cli
from litmoe.config import PROJECT, ParsedRun, known_flags, parse_run, run_parser
from litmoe.data.instructions import InstructArgs
from litmoe.data.prepare import PrepareArgs, prepare
from litmoe.finetune_config import finetuning_parser, parse_finetuning
from litmoe.validation import check
from tests.helpers import load_script

RUN_FILES = sorted(
    [PROJECT / "train_config.yaml", PROJECT / "configs" / "quickstart.yaml", *PROJECT.glob("configs/runs/*.yaml")]
)
FINETUNE_FILES = sorted(PROJECT.glob("configs/finetune*.yaml"))
SEED = int(os.environ.get("LITMOE_FUZZ_SEED", time.time() // 86400))


def fuzz(case: Callable[..., None], examples: int, **strategies: st.SearchStrategy[Any]) -> None:
    """Run ``case`` with ``examples`` examples. Few are always the same, many differ from day to day."""
    quick = examples <= 30
    test = given(**strategies)(case)
    if not quick:
        print(f"LITMOE_FUZZ_SEED={SEED}")
        test = seeded(SEED)(test)
    unhurried = {"deadline": None, "suppress_health_check": list(HealthCheck), "database": None}
    settings(max_examples=examples, derandomize=quick, **unhurried)(test)()  # type: ignore[arg-type]


def outcome(call: Callable[[], Any], capsys: pytest.CaptureFixture[str]) -> Any:
    """Return the result of ``call``, or None if it ended like a script: with a message and 1, or a text and 0."""
    try:
        return exit_with_message(call)
    except SystemExit as ended:
        captured = capsys.readouterr()
        assert ended.code in (0, 1), ended.code
        if ended.code:
            message = captured.err.rpartition("error: ")[2].strip()
            assert len(message) > 10, captured
            assert "Traceback" not in captured.err
            assert len(message) < 20_000, "readable length"
        return None


# ---------------------------------------------------------------------------------------------------------- strategies

TEXTS = st.one_of(
    st.text(max_size=30),
    st.sampled_from(
        [
            *(
                "",
                " ",
                "null",
                "true",
                "no",
                "1e-5",
                "nan",
                "inf",
                "-inf",
                "1_000",
                "0x10",
                "~",
                "auto",
                "\x00",
                "\x1b[2J",
            ),
            *("ünï 🎉", "\u202e", "a" * 5000, "../..", "/", "C:\\x", "{}", "[1, 2", "!!python/name:os.system", "&a *a"),
            *("%(x)s", "{0}", "$HOME", "~nobody/x", "con", "torch.optim.SGD", "os.system", "litgpt.data.TextFiles"),
        ]
    ),
)
NUMBERS = st.one_of(
    st.integers(-3, 3),
    st.integers(-(2**70), 2**70),
    st.sampled_from([float("nan"), float("inf"), float("-inf"), -0.0, 1e-320, 1e308, 10**400, 2**31, 2**63]),
    st.floats(),
)
LEAVES = st.one_of(st.none(), st.booleans(), NUMBERS, TEXTS)
VALUES = st.recursive(
    LEAVES,
    lambda inner: st.one_of(
        st.lists(inner, max_size=4), st.dictionaries(st.one_of(TEXTS, st.integers()), inner, max_size=4)
    ),
    max_leaves=8,
)


def nested(depth: int) -> Any:
    """Lists in mappings in lists."""
    value: Any = 1
    for level in range(depth):
        value = [value] if level % 2 else {"a": value}
    return value


def leaf_paths(values: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Return the paths of all values and mappings in nested mappings."""
    inside = (
        [found for key, value in values.items() for found in leaf_paths(value, (*path, key))]
        if isinstance(values, dict)
        else []
    )
    return [path, *inside] if path else inside


def changed(values: dict[str, Any], path: tuple[Any, ...], value: Any) -> dict[str, Any]:
    """Return a copy with ``value`` at ``path``."""
    key, *rest = path
    inner = values.get(key)
    return {**values, key: changed(inner if isinstance(inner, dict) else {}, tuple(rest), value) if rest else value}


@st.composite
def run_files(draw: st.DrawFn, files: list[Path], flags: tuple[str, ...]) -> dict[str, Any]:
    """A shipped run file in which one to three settings were replaced, some by settings that it does not have."""
    path = draw(st.sampled_from(files))
    values: dict[str, Any] = yaml.safe_load(path.read_text(encoding="utf-8"))
    if isinstance(values.get("model"), str):
        values["model"] = str(PROJECT / "configs" / "models" / "quickstart.yaml")
    places = st.one_of(
        st.sampled_from(leaf_paths(values)),
        st.sampled_from(flags).map(lambda flag: tuple(flag.split("."))),
        TEXTS.map(lambda name: (name,)),
        TEXTS.map(lambda name: ("train", name)),
    )
    for _ in range(draw(st.integers(1, 3))):
        values = changed(values, draw(places), draw(st.one_of(VALUES, st.integers(5, 60).map(nested))))
    return values


@st.composite
def damaged_texts(draw: st.DrawFn, files: list[Path]) -> bytes:
    """A shipped run file with replaced, removed or repeated bytes, or no text at all."""
    data = bytearray(draw(st.sampled_from(files)).read_bytes())
    for _ in range(draw(st.integers(1, 8))):
        at, size = draw(st.integers(0, len(data))), draw(st.integers(0, 40))
        data[at : at + size] = draw(st.one_of(st.binary(max_size=8), st.just(bytes(data[at : at + 2 * size]))))
    return draw(st.one_of(st.just(bytes(data)), st.just(bytes(data)), st.binary(max_size=300), st.just(b"")))


def arguments(flags: tuple[str, ...]) -> st.SearchStrategy[list[str]]:
    """One to four of these flags and of others, with values in both spellings, or none."""
    names = st.one_of(st.sampled_from(flags), st.sampled_from(flags).map(lambda name: name.replace("_", "-")), TEXTS)
    values = st.one_of(LEAVES.map(str), TEXTS, VALUES.map(lambda value: yaml.safe_dump(value, allow_unicode=True)))
    one = st.tuples(names, values, st.sampled_from(["=", " ", ""])).map(
        lambda flag: [f"--{flag[0]}={flag[1]}"] if flag[2] == "=" else [f"--{flag[0]}", *([flag[1]] if flag[2] else [])]
    )
    return st.lists(one, min_size=1, max_size=4).map(lambda flags: [part for flag in flags for part in flag])


# --------------------------------------------------------------------------------------------------------------- tests

SLOW = [pytest.mark.slow, pytest.mark.timeout(3600)]


def many(examples: int, *quick: int) -> list[Any]:
    """Examples of a test: ``quick`` at each run of the tests, if any, and many in a slow one."""
    return [*(pytest.param(few, id="quick") for few in quick), pytest.param(examples, id="many", marks=SLOW)]


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Relative paths do not exist here, and no test writes into the project."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")


def _flags(parser: Any) -> tuple[str, ...]:
    return tuple(sorted(set(known_flags(parser)) - {"config", "help", "print_config"}))


def _parsed(parse: Callable[[list[str]], ParsedRun], argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    def call() -> None:
        run = parse(argv)
        check(run.settings, run.optimizer)

    outcome(call, capsys)


@pytest.mark.parametrize("examples", many(300, 2))
def test_run_files(examples: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "run.yaml"

    def case(values: dict[str, Any]) -> None:
        path.write_text(yaml.safe_dump(values, allow_unicode=True), encoding="utf-8", errors="replace")
        _parsed(parse_run, ["--config", str(path)], capsys)

    fuzz(case, examples, values=run_files(RUN_FILES, _flags(run_parser())))


@pytest.mark.parametrize("examples", many(300))
def test_finetuning_files(examples: int, base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "run.yaml"

    def case(values: dict[str, Any]) -> None:
        path.write_text(yaml.safe_dump(values, allow_unicode=True), encoding="utf-8", errors="replace")
        _parsed(parse_finetuning, [str(base), "--config", str(path)], capsys)

    fuzz(case, examples, values=run_files(FINETUNE_FILES, _flags(finetuning_parser())))


@pytest.mark.parametrize("examples", many(300))
@pytest.mark.parametrize("parse", [parse_run, parse_finetuning])
def test_invalid_yaml(examples: int, parse: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "run.yaml"

    def case(data: bytes) -> None:
        path.write_bytes(data)
        _parsed(parse, ["--config", str(path)], capsys)

    fuzz(case, examples, data=damaged_texts(RUN_FILES))


@pytest.mark.parametrize(
    "text",
    [
        *(
            "a: 2026-99-99",
            "a: !!int ''",
            "a: !!timestamp x",
            "a: !!bool x",
            "[" * 20_000,
            f"a: {'1' * 5000}",
            "=",
            "\x00",
        ),
        *(
            "- 1",
            "? [a]\n: b",
            "&a [*a]",
            "a: &a {b: *a}",
            "upcycle: [1]",
            "num_nodes: 0",
            "model: {n_head: 0}",
            f"model: {'a' * 5000}",
        ),
        *('out_dir: "a\\0"', "model: {n_layer: -1}", "optimizer: antigravity.x", "train: {max_time: .nan}"),
    ],
    ids=lambda text: text[:20],
)
def test_run_files_with_past_tracebacks(text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """PyYAML, system calls and LitGPT's checks raise errors of many types."""
    path = tmp_path / "run.yaml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(SystemExit):
        exit_with_message(lambda: check(*_settings_of(parse_run(["--config", str(path)]))))
    assert capsys.readouterr().err.startswith("error: ")


@pytest.mark.parametrize(
    ("line", "named"),
    [
        *(("lora_alpha: null", "lora_alpha"), ("seed: null", "seed"), ("moe: {z_loss: null}", r"moe\.z_loss")),
        *(("train: null", "train"), ("data: {init_args: {seed: null}}", r"data\.seed")),
    ],
)
def test_null_is_refused_where_required(line: str, named: str, base: Path, tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    values = yaml.safe_load(FINETUNE_FILES[0].read_text(encoding="utf-8"))
    ((key, value),) = yaml.safe_load(line).items()
    path.write_text(yaml.safe_dump(values | {key: (values[key] | value if key == "data" else value)}), encoding="utf-8")
    with pytest.raises(UserError, match=rf"^{named} must not be null: set a value"):
        parse_finetuning([str(base), "--config", str(path)])


def _settings_of(run: ParsedRun) -> tuple[Any, dict[str, Any]]:
    return run.settings, run.optimizer


@pytest.mark.parametrize("examples", many(100))
def test_train_command_line(examples: int, capsys: pytest.CaptureFixture[str]) -> None:
    quickstart = ["--config", str(PROJECT / "configs" / "quickstart.yaml")]
    fuzz(
        lambda argv: _parsed(parse_run, [*quickstart, *argv], capsys),
        examples,
        argv=arguments((*_flags(run_parser()), "config", "model", "upcycle", "print_config", "help")),
    )


@pytest.mark.parametrize("examples", many(100))
def test_finetune_command_line(examples: int, base: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fuzz(
        lambda argv: _parsed(parse_finetuning, [str(base), *argv], capsys),
        examples,
        argv=arguments((*_flags(finetuning_parser()), "config", "print_config", "help")),
    )


SCRIPTS = {
    "generate": ("main", "checkpoint"),
    "chat": ("main", "checkpoint"),
    "evaluate": ("main", "checkpoint"),
    "export_hf": ("main", None),
    "wandb_dataset": ("main", None),
}


@pytest.mark.parametrize(
    ("name", "examples"),
    [
        pytest.param("generate", 2, id="generate-quick"),
        *(pytest.param(name, 300, id=f"{name}-many", marks=SLOW) for name in (*SCRIPTS, "prepare_data", "instruct")),
    ],
)
def test_script_command_lines(name: str, examples: int, capsys: pytest.CaptureFixture[str]) -> None:
    """As far as the script's function gets without a checkpoint or data."""
    if name in ("prepare_data", "instruct"):
        function: Any = PrepareArgs if name == "prepare_data" else InstructArgs
        positional = None
    else:
        function, positional = getattr(load_script(name), SCRIPTS[name][0]), SCRIPTS[name][1]
    names = tuple(re.findall(r"--(\w+)", _help(function)))

    def case(argv: list[str]) -> None:
        outcome(lambda: run_cli(function, argv, optional_positional=positional), capsys)

    fuzz(case, examples, argv=arguments(names))


def _help(function: Any) -> str:
    from litmoe.cli import make_parser

    parser = make_parser()
    parser.add_function_arguments(function, as_positional=True, sub_configs=True)
    return parser.format_help()


@pytest.mark.parametrize("examples", many(100))
def test_prepare_flags(examples: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "a.txt").write_text("Mia went.\n<|endoftext|>\nTom went.\n", encoding="utf-8")
    (tmp_path / "text" / "b.jsonl").write_text('{"text": "Mia"}\n', encoding="utf-8")
    sources = ["a.txt", "b.jsonl", "", "c.txt"]

    def case(source: str, argv: list[str]) -> None:
        target = [
            "--data_dir",
            str(tmp_path / "data"),
            "--tokenizer_dir",
            str(tmp_path / "tokenizer"),
            "--num_workers=0",
        ]
        given = ["--source", str(tmp_path / "text" / source), "--tokenizer=train", "--vocab_size=300", *argv, *target]
        outcome(lambda: prepare(run_cli(PrepareArgs, given)), capsys)

    flags = (
        "val_fraction",
        "document_separator",
        "text_column",
        "max_documents",
        "vocab_size",
        "tokenizer",
        "overwrite",
    )
    fuzz(case, examples, source=st.sampled_from(sources), argv=arguments(flags))


@pytest.mark.parametrize("examples", many(200))
def test_generation_flags(examples: int, base: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """On a real model: any text, any sampling."""
    generate = load_script("generate").main
    numbers = st.one_of(st.integers(-2, 9), st.sampled_from([2**31, 2**63, 2**70]))
    rates = st.one_of(st.floats(), st.sampled_from([0.0, 1.0, 1e-40, 1e308]))

    def case(**flags: Any) -> None:
        outcome(lambda: generate(checkpoint=base, device="cpu", **flags), capsys)

    fuzz(
        case,
        examples,
        prompt=st.one_of(st.none(), TEXTS),
        max_new_tokens=numbers,
        num_samples=st.integers(-1, 3),
        temperature=rates,
        top_k=st.one_of(st.none(), numbers),
        top_p=rates,
        seed=numbers,
    )
