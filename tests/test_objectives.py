"""The losses are what their equations say."""

import torch
from torch.nn import functional

from alula.objectives.next_token import next_token_loss, num_targets


def test_next_token_loss_is_the_mean_over_targets():
    logits, labels = torch.randn(2, 5, 7), torch.tensor([[3, -100, 2, -100, 4], [-100, -100, -100, 6, -100]])
    by_hand = [-functional.log_softmax(logits[row, place - 1], -1)[labels[row, place]] for row, place in [(0, 2), (0, 4), (1, 3)]]
    torch.testing.assert_close(next_token_loss(logits, labels), torch.stack(by_hand).mean())


def test_first_token_of_a_row_is_no_target():
    assert num_targets(torch.tensor([[3, -100, 2], [5, -100, -100]])) == 1


def test_next_token_loss_is_computed_in_fp32():
    logits, labels = torch.randn(1, 4, 9, dtype=torch.bfloat16), torch.tensor([[1, 2, 3, 4]])
    assert torch.equal(next_token_loss(logits, labels), next_token_loss(logits.float(), labels))


def test_gradient_reaches_only_positions_before_targets():
    logits = torch.randn(1, 4, 5, requires_grad=True)
    next_token_loss(logits, torch.tensor([[-100, -100, 2, -100]])).backward()
    assert logits.grad.abs().sum(-1).gt(0).tolist() == [[False, True, False, False]]
