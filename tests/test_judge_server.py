"""A judge that is a vision-language model on a server of its own, `transformers serve`, from training to a run."""

import os
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import jax
import numpy as np
import pytest
import small_run
import tiny_judge
from ml_collections import ConfigDict
from references import peft, torch, transformers

from rcgrpo_jax.data.images import save_image
from rcgrpo_jax.data.sources import open_source
from rcgrpo_jax.evaluation.pictures import picture_file
from rcgrpo_jax.rl.trainer import train
from rcgrpo_jax.runs.metrics import read_metrics

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_device")]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """The options of a rubric that asks the model."""
    for name in ("fastapi", "openai", "uvicorn"):
        pytest.importorskip(name, reason="pip install 'transformers[serving]'")
    folder, port = tmp_path_factory.mktemp("judge"), free_port()
    assert tiny_judge.train(folder / "model") > 0.5
    (folder / "rubric.txt").write_text(f"{{edited}}{tiny_judge.QUESTION}")
    program = Path(sys.executable).parent / "transformers"
    command = [str(program), "serve", str(folder / "model"), "--host=127.0.0.1", f"--port={port}", "--device=cpu"]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    with (
        (folder / "log").open("w") as log,
        subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT) as server,
    ):
        try:
            wait_for(f"http://127.0.0.1:{port}/health", server, folder / "log")
            yield {
                "urls": f"http://127.0.0.1:{port}/v1", "model": str(folder / "model"), "max_tokens": 16,
                "template": str(folder / "rubric.txt"), "lowest": 0.0, "highest": 25.0,
            }  # fmt: skip
        finally:
            server.terminate()


def wait_for(url: str, server: subprocess.Popen, log: Path) -> None:
    for _ in range(600):
        assert server.poll() is None, log.read_text()[-2000:]
        try:
            with urllib.request.urlopen(url, timeout=10):
                return
        except OSError:
            time.sleep(0.2)
    pytest.fail(log.read_text()[-2000:])


def test_the_command_finds_that_it_tells_red_pictures_from_others(served, capsys, tmp_path):
    source = open_source(str(small_run.data_folder()))
    for name, colour in (("red", (230, 30, 120)), ("blue", (30, 120, 230))):
        (tmp_path / name).mkdir()
        for i in range(len(source)):
            picture = np.broadcast_to(np.array(colour, np.uint8), (64, 64, 3))
            save_image(picture_file(tmp_path / name, source[i].name), picture)
    options = [f"--option={name}={value}" for name, value in served.items()]
    edits = [f"--edits={tmp_path / name}" for name in ("red", "blue")]
    argv = ["judge", "--reward=rubric", f"--data={small_run.data_folder()}", *options, *edits]
    code, out, _ = small_run.run_command(capsys, *argv)
    assert code == 0
    assert "red preferred to blue: 100%" in out


def test_a_run_learns_from_it(served, tmp_path):
    config = small_run.make_config(train__num_steps=2)
    config.rewards = ConfigDict({"rubric": 1.0})
    config.reward_options.rubric = ConfigDict(served)
    assert int(train(config, tmp_path, jax.devices()[:1]).step) == 2
    for line in read_metrics(tmp_path / "metrics.jsonl"):
        assert (line["judge/rubric/answers"], line["reward_failed/rubric"]) == (8, 0)
        assert 0 <= line["reward/rubric"] <= 1
        assert np.isfinite(line["loss"])


def test_a_lora_is_merged_into_the_base_that_it_names(tmp_path):
    base, lora, merged = (tmp_path / name for name in ("base", "lora", "merged"))
    processor = tiny_judge.make_processor()
    model = tiny_judge.make_model(processor.tokenizer).bfloat16()
    model.save_pretrained(base)
    processor.save_pretrained(base)
    model.name_or_path = str(base)
    config = peft.LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False)
    adapted = peft.get_peft_model(model, config)
    adapted.peft_config["default"].base_model_name_or_path = str(base)
    adapted.save_pretrained(lora)
    command = [sys.executable, str(small_run.ROOT / "launch" / "merge_lora.py"), str(lora), "", str(merged)]
    subprocess.run(command, check=True, capture_output=True, text=True)
    wanted = adapted.merge_and_unload().state_dict()
    found = transformers.AutoModelForImageTextToText.from_pretrained(merged, dtype=torch.bfloat16).state_dict()
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], x) for name, x in wanted.items())
    before = transformers.AutoModelForImageTextToText.from_pretrained(base, dtype=torch.bfloat16).state_dict()
    assert not all(torch.equal(found[name], x) for name, x in before.items())
    assert transformers.AutoProcessor.from_pretrained(merged).chat_template == tiny_judge.CHAT
