"""export_hf.py: export, import, upload, and use in an environment without this repository."""

import os
import shutil
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

from litmoe import checkpoints, load
from litmoe.cli import UserError
from litmoe.config import PROJECT
from tests.export.push_server import serve
from tests.helpers import litgpt_finetuning_flags, load_script, save_tiny, tiny_gpt


@pytest.fixture
def folder(tmp_path: Path, moe_fields: dict, tokenizer_dir: Path) -> Path:
    """A checkpoint of a mixture of experts."""
    return save_tiny(tmp_path / "checkpoints" / "final", tiny_gpt(moe_fields), tokenizer_dir)


def run(*arguments: object, cwd: Path) -> str:
    """Run the script and return its output."""
    result = subprocess.run(
        [sys.executable, str(PROJECT / "export_hf.py"), *map(str, arguments)],
        cwd=cwd,
        capture_output=True,
        encoding="utf-8",
        env={**os.environ, "PYTHONUTF8": "1", "COLUMNS": "200"},
        timeout=280,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def test_script_shows_the_checks(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    load_script("export_hf").main(folder, tmp_path / "out")
    shown = capsys.readouterr().out
    assert "differ by" in shown and "the same after 4 prompts" in shown


def test_missing_token_is_an_early_error(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub.constants

    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    with pytest.raises(UserError, match="hf auth login"):
        load_script("export_hf").main(folder, tmp_path / "out", push="org/name")
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_export_and_import_with_the_script(folder: Path, tmp_path: Path) -> None:
    run(folder, "exported", "--dtype", "bfloat16", cwd=tmp_path)
    assert "greedy text" in run("--import", "exported", "imported", cwd=tmp_path)
    assert checkpoints.verify(tmp_path / "imported").step == 0


@pytest.mark.slow
def test_push(folder: Path, tmp_path: Path) -> None:
    """All files arrive. If the Hub refuses or can't be reached, there is one message, and the folder is kept."""
    code = """
        import os, sys
        from pathlib import Path
        from export_hf import main
        from litmoe.cli import UserError
        from litmoe.export.huggingface import push
        folder, out = Path(sys.argv[1]), Path(sys.argv[2])
        main(folder, out, push="org/name")
        for token in ("hf_wrong", "hf_right"):
            os.environ["HF_TOKEN"] = token
            try:
                push(out, "org/name")
            except UserError as error:
                print(f"error: {error}")
            print("GO", flush=True)
            sys.stdin.readline()
    """
    (tmp_path / "script.py").write_text("\n".join(line[8:] for line in code.splitlines()), encoding="utf-8")
    environment = {
        **os.environ,
        **{"HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path / "home"), "HF_HUB_DISABLE_TELEMETRY": "1"},
        **{"PYTHONPATH": str(PROJECT), "COLUMNS": "200"},
    }
    with serve("hf_right") as server:
        process = subprocess.Popen(
            [sys.executable, "script.py", str(folder), str(tmp_path / "out")],
            cwd=tmp_path,
            env=environment | {"HF_ENDPOINT": server.url, "HF_TOKEN": "hf_right"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert process.stdin and process.stdout
        shown = "".join(iter(process.stdout.readline, "GO\n"))
    gone, _ = process.communicate("\n\n", timeout=200)
    assert process.returncode == 0
    assert f"Uploaded to {server.url}/org/name" in shown
    created = server.created[0]
    assert (created["organization"], created["name"], created["private"]) == ("org", "name", True)
    assert server.files == {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    assert b"# org/name" in server.files["README.md"]
    for printed in (shown, gone):
        assert f"error: {tmp_path / 'out'} is complete, but was not uploaded to org/name" in printed


@pytest.mark.slow
def test_imported_model_can_be_finetuned(tmp_path: Path, tokenizer_dir: Path) -> None:
    from tests.export.test_huggingface import hf_folder

    source = hf_folder(tmp_path / "hf", tokenizer_dir, "llama", max_position_embeddings=256)
    load_script("export_hf").import_folder(source, tmp_path / "in")
    command = [sys.executable, "-m", "litgpt", "finetune_full", str(tmp_path / "in")]
    subprocess.run([*command, *litgpt_finetuning_flags(tmp_path)], check=True, timeout=280)
    assert checkpoints.load_weights(tmp_path / "finetuned" / "final").keys()


def test_import_warns_of_constant_routers(tmp_path: Path, tokenizer_dir: Path, capsys) -> None:
    from tests.export.test_huggingface import hf_folder

    experts = {"num_local_experts": 4, "head_dim": 8}
    for k, has_warning in ((1, True), (2, False)):
        source = hf_folder(tmp_path / f"hf{k}", tokenizer_dir, "mixtral", num_experts_per_tok=k, **experts)
        load_script("export_hf").import_folder(source, tmp_path / f"in{k}")
        assert ("warning: this model sends each token to 1 expert" in capsys.readouterr().out) == has_warning


def _uv() -> str | None:
    local = PROJECT / ".uv" / "bin" / "uv"
    return str(local) if local.is_file() else shutil.which("uv")


@pytest.mark.slow
@pytest.mark.skipif(_uv() is None, reason="needs uv")
@pytest.mark.timeout(1200)
def test_export_works_without_this_repository(folder: Path, tmp_path: Path) -> None:
    """With only torch and transformers, the folder loads and gives the same text."""
    uv = _uv()
    assert uv is not None
    load_script("export_hf").main(folder, tmp_path / "out")
    fresh = tmp_path / "fresh"
    subprocess.run([uv, "venv", "--python", sys.executable, str(fresh)], check=True, cwd=tmp_path)
    python = fresh / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    packages = [f"{name}=={version(name).split('+')[0]}" for name in ("torch", "transformers")]
    subprocess.run([uv, "pip", "install", "--python", str(python), *packages], check=True, cwd=tmp_path)
    code = """
        import sys
        from transformers import AutoModelForCausalLM, AutoTokenizer
        tokenizer, model = AutoTokenizer.from_pretrained("out"), AutoModelForCausalLM.from_pretrained("out")
        inputs = tokenizer("Once upon a time", return_tensors="pt")
        output = model.generate(**inputs, do_sample=False, max_new_tokens=20)
        sys.stdout.buffer.write(tokenizer.decode(output[0], skip_special_tokens=True).encode())
    """
    (tmp_path / "alone.py").write_text("\n".join(line.strip() for line in code.splitlines()), encoding="utf-8")
    environment = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "VIRTUAL_ENV")}
    result = subprocess.run(
        [str(python), "-P", "alone.py"], cwd=tmp_path, env=environment, capture_output=True, timeout=300
    )
    assert result.returncode == 0, result.stderr.decode()
    text = load(folder, device="cpu").generate("Once upon a time", max_new_tokens=20, temperature=0.0)
    assert result.stdout.decode() == text
