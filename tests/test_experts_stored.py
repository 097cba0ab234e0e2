"""Pools of many experts read from files: what is adopted is not copied, and what is not used is not resident."""

import re
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from alula.context import Routing
from alula.errors import UserError
from alula.experts import Chosen, LoRAExperts
from alula.experts.reference import reference
from alula.files import map_tensors, read_tensors
from alula.mixture import attach
from zoo import build, example_batch

COUNT, RANK, WIDTH = 256, 16, 2048
MEGABYTES = RANK * WIDTH * 2 * 4 / 2**20


def resident_file_megabytes():
    """What of mapped files is in this process's memory (Linux)."""
    return int(re.search(r"RssFile:\s+(\d+)", Path("/proc/self/status").read_text()).group(1)) / 1024


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux's account of memory")
def test_of_a_pool_of_256_experts_only_those_used_become_resident(tmp_path):
    one = {"A": torch.randn(RANK, WIDTH) / WIDTH**0.5, "B": torch.randn(WIDTH, RANK)}
    for number in range(8):
        several = {f"{number}.{i}.{key}": tensor.clone() for i in range(COUNT // 8) for key, tensor in one.items()}
        save_file(several, tmp_path / f"{number}.safetensors")
    experts = LoRAExperts(in_features=WIDTH, out_features=WIDTH)
    before, started = resident_file_megabytes(), time.process_time()
    for number in range(8):
        found = map_tensors(tmp_path / f"{number}.safetensors")
        for i in range(COUNT // 8):
            down, up = found[f"{number}.{i}.A"], found[f"{number}.{i}.B"]
            experts.adopt(f"e{number}-{i}", down=down, up=up, scale=2.0)
            assert experts.A[-1].data_ptr() == down.data_ptr()
    everything = COUNT * MEGABYTES
    assert resident_file_megabytes() - before < 0.05 * everything
    assert time.process_time() - started < 5  # tens of milliseconds on an idle machine
    x = torch.randn(1, 30, WIDTH)
    index = torch.randint(100, 104, (1, 30, 2))
    index[..., 1] = 200
    chosen = Chosen(weights=torch.full((1, 30, 2), 0.5), index=index, experts=COUNT)
    with torch.no_grad():
        experts(x, chosen, active=range(COUNT))
        experts(x[:, :1], Chosen(weights=chosen.weights[:, :1], index=index[:, :1], experts=COUNT), active=range(COUNT))
    used = resident_file_megabytes() - before
    assert 4 * MEGABYTES < used < 0.5 * everything  # of five experts of 256; the system maps pages by the megabyte where it has them


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int32])
def test_mapped_tensors_are_those_of_the_file_and_writing_to_them_leaves_it_alone(tmp_path, dtype):
    path = tmp_path / "some.safetensors"
    save_file({"b": torch.arange(7).to(dtype), "a": torch.zeros(2, 0, dtype=dtype), "c": torch.ones(3, 2).half()}, path)
    mapped, stored = map_tensors(path), read_tensors(path)
    assert mapped.keys() == stored.keys()
    for key, tensor in mapped.items():
        assert tensor.dtype == stored[key].dtype and torch.equal(tensor, stored[key])
        tensor.add_(1)
    for key, tensor in read_tensors(path).items():
        assert torch.equal(tensor, stored[key])


def test_a_truncated_file_cannot_be_mapped(tmp_path):
    path = tmp_path / "some.safetensors"
    save_file({"a": torch.ones(100)}, path)
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(UserError, match="not a whole safetensors file"):
        map_tensors(path)


def test_adopted_experts_speak_as_grown_ones_and_stay_frozen():
    experts = LoRAExperts(in_features=6, out_features=5)
    down, up = [torch.randn(rank, 6) for rank in (2, 3)], [torch.randn(5, rank) for rank in (2, 3)]
    for number, (a, b) in enumerate(zip(down, up, strict=True)):
        experts.adopt(f"e{number}", down=a, up=b, scale=0.5 + number)
    x, weights = torch.randn(2, 7, 6), torch.rand(2, 7, 2)
    expected = reference(x, weights, down=down, up=up, scales=[0.5, 1.5])
    torch.testing.assert_close(experts(x, weights, active=(0, 1)), expected, rtol=1e-5, atol=1e-5)
    assert not any(parameter.requires_grad for parameter in experts.parameters())


def test_a_mixture_adopts_what_peft_would_load_and_its_routers_make_room():
    model, processor = build("llava")
    mixtures = attach(model)
    mixtures.grow("grown", rank=3)
    site, *others = mixtures.sites.values()
    pair = {"A": torch.randn(2, site.host.in_features), "B": torch.randn(site.host.out_features, 2)}
    site.adopt("read", pair, scale=0.5)
    for mixture in others:
        mixture.adopt("read", None)
    assert site.experts.A[1].data_ptr() == pair["A"].data_ptr()
    assert mixtures.names == ["grown", "read"] and len(site.routers["gate"].gates) == 2
    with torch.no_grad(), mixtures.using(Routing(fixed={"read": 1.0})):
        found = model(**example_batch("llava", processor)).logits
        site.host.weight += 0.5 * pair["B"] @ pair["A"]
    with torch.no_grad():
        torch.testing.assert_close(model(**example_batch("llava", processor)).logits, found, rtol=1e-4, atol=1e-4)
