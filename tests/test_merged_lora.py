"""LoRA merged into the backbone: its scale, what merging leaves alone, what each task starts from."""

import pytest
import torch

from alula.errors import UserError
from alula.mixture import Mixture
from methods_at_work import begun, changed, learn, logits, tasks, teach


def test_the_scale_of_merged_lora_is_alpha_over_the_root_of_the_rank():
    _, method, *_ = begun("lora", rank=16)
    assert {scale for mixture in method.mixtures.sites.values() for scale in mixture.experts.scales} == {8 / 16**0.5}


def test_without_a_rank_it_is_half_the_hidden_size():
    _, method, *_ = begun("lora", rank=None)
    assert method.rank == 32
    assert all(len(mixture.experts.A[0]) == 32 for mixture in method.mixtures.sites.values())


def test_merging_the_update_leaves_outputs_unchanged():
    model, method, task, batch = begun("lora", rank=4)
    base = logits(model, batch)
    teach(method.mixtures)
    before = logits(model, batch)
    assert not torch.allclose(before, base, atol=1e-2)
    method.end_task(model, task)
    torch.testing.assert_close(logits(model, batch), before, rtol=1e-4, atol=1e-4)  # W x + B A x against (W + B A) x, in fp32
    assert not any(isinstance(module, Mixture) for module in model.modules())


def test_merged_lora_changes_the_linears_of_the_decoder_and_nothing_else():
    model, method, costs = learn("lora", "one", "two", rank=2)
    assert changed(model) == {f"{path}.weight" for path in method.paths} == set(method.stored_tensors(model))
    assert len(method.paths) == 4 * 7  # layers, linears
    assert costs[0].stored_parameters == costs[1].stored_parameters == sum(model.get_parameter(f"{p}.weight").numel() for p in method.paths)


def test_each_task_gets_a_fresh_update_over_the_merged_weights():
    model, method, _ = learn("lora", "one", rank=2)
    merged = {path: model.get_parameter(f"{path}.weight").clone() for path in method.paths}
    method.begin_task(model, tasks("two")[0])
    assert method.mixtures.names == ["update"]
    for path, mixture in method.mixtures.sites.items():
        assert torch.equal(mixture.weight, merged[path])
        assert not mixture.experts.B[0].any()


def test_the_connector_trains_beside_the_update_if_asked():
    model, method, _ = learn("lora", "one", rank=2, connector=True, connector_learning_rate=1e-3)
    linears = {f"{path}.weight" for path in method.paths}
    assert linears < changed(model) == set(method.stored_tensors(model))
    assert all("multi_modal_projector" in name for name in changed(model) - linears)


def test_merged_lora_refuses_to_be_the_base_model():
    model, method, *_ = begun("lora", rank=2)
    with pytest.raises(UserError, match="trains the model's own weights"):
        method.base_model(model)
