"""Which samples a step takes, and which of several processes takes them."""

from alula.training.order import Steps


def test_every_epoch_holds_every_sample_once():
    data = Steps(range(10), list, batch_size=4, micro_batch_size=None, seed=0, task="t", stage="s")
    seen = [index for step in range(5) for index in data.indices(step)]
    assert sorted(seen[:10]) == sorted(seen[10:]) == list(range(10))
    assert seen[:10] != seen[10:]


def test_processes_share_a_batch_without_overlap():
    options = {"batch_size": 5, "micro_batch_size": 2, "seed": 0, "task": "t", "stage": "s", "num_processes": 2}
    shards = [Steps(range(10), list, process_index=index, **options) for index in range(2)]
    micro_batches = [shard[1] for shard in shards]
    assert [[len(part) for part in parts] for parts in micro_batches] == [[2, 1], [2]]
    assert sorted(index for parts in micro_batches for part in parts for index in part) == sorted(shards[0].indices(1))
