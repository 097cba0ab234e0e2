"""Experts leave a pool: as PEFT adapters, for vLLM, merged into a plain model; adapters from elsewhere come in."""

import json
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from alula.context import Routing
from alula.errors import UserError
from alula.files import read_json, write_json, write_jsonl
from alula.mixture import attach
from alula.peft_format import read_pairs
from alula.pool import Pool
from composed_models import tiny_model
from leaving_pools import MODELS, alula, refused, world, worlds
from pool_of_one import logits, teach
from zoo import build, example_batch

__all__ = ["world", "worlds"]


@pytest.mark.parametrize("name", MODELS)
def test_peft_gives_the_pools_logits_from_an_exported_expert(worlds, name, tmp_path):
    from peft import PeftModel

    alula("export", worlds[name].folder, "--expert", "receipts", "--out", tmp_path / "out")
    theirs = PeftModel.from_pretrained(build(name)[0], tmp_path / "out").eval()
    torch.testing.assert_close(logits(theirs, worlds[name].batch), worlds[name].logits(receipts=1.0), rtol=1e-5, atol=1e-5)


def test_an_adapter_with_several_ranks_and_scales_keeps_its_logits_in_a_pool_in_peft_and_for_vllm(tmp_path):
    from peft import LoraConfig, PeftModel, get_peft_model

    fresh, processor = build("llava")
    batch = example_batch("llava", processor)
    linears = r".*language_model.*(q_proj|v_proj|down_proj)"
    config = LoraConfig(
        r=3, lora_alpha=5, rank_pattern={"q_proj": 2}, alpha_pattern={"v_proj": 9}, target_modules=linears, init_lora_weights=False
    )
    made = get_peft_model(fresh, config).eval()
    wanted = logits(made, batch)
    made.save_pretrained(tmp_path / "adapter")
    model, _ = build("llava")
    mixtures = attach(model)
    pool = Pool.create(tmp_path / "pool", mixtures, base="tiny", arm="arrow")
    from alula import read_adapter

    read_adapter(mixtures, "foreign", tmp_path / "adapter")
    pool.add(mixtures, "foreign", about={})
    pool.export_for_vllm(tmp_path / "vllm")
    pairs, scales = read_pairs(tmp_path / "vllm" / "foreign")
    assert len(set(scales.values())) == 1 and set(pairs) == {path for path in pairs if path.endswith(("q_proj", "v_proj", "down_proj"))}
    for folder in (pool.expert_folder("foreign"), pool.export("foreign", tmp_path / "out"), tmp_path / "vllm" / "foreign"):
        theirs = PeftModel.from_pretrained(build("llava")[0], folder).eval()
        torch.testing.assert_close(logits(theirs, batch), wanted, rtol=1e-4, atol=1e-5)


LOAD_WITHOUT_ALULA = """
import sys
from pathlib import Path
from safetensors.torch import load_file, save_file
import torch
from transformers import AutoModelForImageTextToText
for folder in sys.argv[1:]:
    model = AutoModelForImageTextToText.from_pretrained(f"{folder}/model", dtype=torch.float32).eval()
    with torch.no_grad():
        save_file({"logits": model(**load_file(f"{folder}/batch.safetensors")).logits}, f"{folder}/logits.safetensors")
assert not [name for name in sys.modules if name.split(".")[0] == "alula"]
"""


def test_a_merged_model_gives_the_mixtures_logits_without_alula(worlds, tmp_path):
    for name, one in worlds.items():
        out = tmp_path / name / "model"
        alula("merge", one.folder, "--expert", "invoices=0.5", "--expert", "receipts", "--out", out, "--dtype", "float32")
        assert (out / "tokenizer.json").exists() and list(out.glob("*processor_config.json"))
        save_file({key: value.contiguous() for key, value in one.batch.items()}, tmp_path / name / "batch.safetensors")
    command = [sys.executable, "-c", LOAD_WITHOUT_ALULA, *(str(tmp_path / name) for name in worlds)]
    subprocess.run(command, check=True, cwd=tmp_path, env={"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PATH": ""})
    for name, one in worlds.items():
        found = load_file(tmp_path / name / "logits.safetensors")["logits"]
        torch.testing.assert_close(found, one.logits(invoices=0.5, receipts=1.0), rtol=1e-4, atol=1e-4)


def test_a_merged_composed_model_ties_its_weights_still_and_says_what_loads_it(tmp_path):
    from transformers import AutoModelForImageTextToText

    from alula.running.merging import merge_pool

    model = tiny_model().eval()
    model.save_pretrained(tmp_path / "base")
    (tmp_path / "base" / "note").write_text("x")
    mixtures = attach(model)
    pool = Pool.create(tmp_path / "pool", mixtures, base=str(tmp_path / "base"))
    teach(mixtures, "birds", seed=1)
    pool.add(mixtures, "birds", about={})
    mixtures.routing = Routing(fixed={"birds": 1.0})
    batch = {"input_ids": torch.tensor([[7, 3, 3, 3, 3, 9]]), "pixel_values": torch.randn(1, 3, 64, 64)}
    wanted = logits(model, batch)

    class NoProcessor:
        def save_pretrained(self, folder):
            pass

    with pytest.MonkeyPatch.context() as patch:  # the tiny model has no processor on disk
        patch.setattr("alula.models.loading.load_processor", lambda name: NoProcessor())
        kind = merge_pool(tmp_path / "pool", {"birds": 1.0}, tmp_path / "out")
    assert kind.__name__ == "ComposedVLM"
    merged = AutoModelForImageTextToText.from_pretrained(tmp_path / "out", dtype=torch.float32).eval()
    assert merged.get_output_embeddings().weight is merged.get_input_embeddings().weight
    torch.testing.assert_close(logits(merged, batch), wanted, rtol=1e-4, atol=1e-4)


def test_what_cannot_be_merged_is_told_and_leaves_no_folder(world, tmp_path):
    assert "NAME=NUMBER" in refused("merge", world.folder, "--expert", "invoices=much", "--out", tmp_path / "out")
    assert "Did you mean 'invoices'" in refused("merge", world.folder, "--expert", "invoice", "--out", tmp_path / "out")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("mine")
    assert "not empty" in refused("merge", world.folder, "--expert", "invoices", "--out", tmp_path / "full")
    learners = shutil.copytree(world.folder, tmp_path / "learners")
    manifest = read_json(learners / "pool.json")
    files = dict.fromkeys(("learners.json", "learners.safetensors"), "0" * 64)
    for file in files:
        write_json(learners / "learners" / "birds" / file, None)
    write_json(learners / "pool.json", {**manifest, "experts": [], "learners": [{"name": "birds", "files": files}]})
    assert "no weight of the base model can take them up" in refused("merge", learners, "--expert", "birds", "--out", tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["full", "learners"]


def test_one_tensor_in_two_places_is_not_merged():
    from alula.running.merging import _refuse_shared

    model, _ = build("llava")
    layers = model.model.language_model.layers
    layers[1].self_attn.q_proj.weight = layers[0].self_attn.q_proj.weight
    with pytest.raises(UserError, match=r"layers.0.*and.*layers.1.* are one tensor"):
        _refuse_shared(attach(model))


def test_vllm_finds_a_folder_per_expert_with_decoder_linears_and_a_rank_it_accepts(world, tmp_path):
    words = shlex.split(alula("export", world.folder, "--vllm", tmp_path / "out").stdout)
    assert words[:4] == ["vllm", "serve", str(world.base), "--enable-lora"]
    assert words[words.index("--max-lora-rank") + 1] == "8"  # the experts have rank 2; vLLM takes 1, 8, 16, ...
    modules = dict(word.split("=", 1) for word in words[words.index("--lora-modules") + 1 :])
    assert modules == {name: str(tmp_path / "out" / name) for name in ("invoices", "receipts")}
    for folder in map(Path, modules.values()):
        assert sorted(path.name for path in folder.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
        config = read_json(folder / "adapter_config.json")
        assert (config["peft_type"], config["r"], config["bias"]) == ("LORA", 2, "none")
        assert not config["rank_pattern"] and not config["alpha_pattern"] and not config.get("use_dora")
        for key in load_file(folder / "adapter_model.safetensors"):
            assert key.startswith("base_model.model.model.language_model.layers.") and key.endswith((".lora_A.weight", ".lora_B.weight"))


def test_updates_that_vllm_would_drop_are_refused(world, tmp_path):
    from alula.peft_format import write_pairs
    from alula.pool.export import export_for_vllm

    tower = {"model.vision_tower.layers.0.q_proj": {"A": torch.ones(2, 4), "B": torch.ones(4, 2)}}
    write_pairs(tower, dict.fromkeys(tower, 1.0), tmp_path / "birds", base_name="tiny")
    with pytest.raises(UserError, match=r"outside the decoder, first model.vision_tower.*alula merge"):
        export_for_vllm(tmp_path / "birds", tmp_path / "out", renamed={}, base_name="tiny")


def test_an_adapter_from_elsewhere_starts_a_pool_and_joins_one(world, tmp_path):
    rows = []
    for number in range(12):
        Image.new("RGB", (30, 30), ["red", "blue"][number % 2]).save(tmp_path / f"{number}.png")
        rows.append({"image": f"{number}.png", "question": f"What colour {number}?", "answer": ["red", "blue"][number % 2]})
    write_jsonl(tmp_path / "rows.jsonl", rows)
    adapter = world.pool.expert_folder("receipts")
    common = ("adopt", tmp_path / "pool", "--adapter", adapter, "--model", world.base)
    assert "must see some samples" in refused(*common, "--name", "colours")
    assert not (tmp_path / "pool").exists()
    said = alula(*common, "--name", "colours", "--data", tmp_path / "rows.jsonl").stdout
    assert "colours: 0.000 before" in said
    pool = Pool.open(tmp_path / "pool")
    assert pool.names == ["colours"]
    model, _ = build("llava")
    mixtures = pool.attach(model)
    mixtures.routing = Routing(fixed={"colours": 1.0})
    assert torch.equal(logits(model, world.batch), world.logits(receipts=1.0))
    assert {"colours", "base"} <= set(mixtures.prompt_router.names)
    assert "already" in refused(*common, "--name", "colours", "--data", tmp_path / "rows.jsonl")


def test_an_adapter_as_pickle_is_not_read(world, tmp_path):
    from alula import read_adapter

    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA"}))
    (tmp_path / "adapter_model.bin").write_bytes(b"\x80\x04.")
    with pytest.raises(UserError, match=r"a pickle, which can run code.*save it again"):
        read_adapter(world.mixtures, "foreign", tmp_path)
