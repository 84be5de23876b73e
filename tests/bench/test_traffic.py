"""What a window costs each GPU, on paper: formulas, and the document made of them."""

import sys

import pytest

from bench import traffic
from bench.traffic import FSDP_EXACT, FSDP_PLAIN, FSDP_STOCHASTIC, PLAIN, REPLICATE, SHARD, Run

SMALL = Run(N=1000, K=2, P=8, A=8)  # s = 7/8
RUNS = [Run(10**9, K, P, A) for K in (2, 3, 8) for P in (2, 8, 1024) for A in (8, 20)]


@pytest.mark.parametrize(
    ("way", "sent", "memory"),
    [
        (PLAIN, 3_500, 2_000),  # 2 · 7/8 · 2
        (SHARD, 8_750, 9_000),  # 7/8 · 10;  8 + 8/8
        (REPLICATE, 14_000, 18_000),  # 2 · 7/8 · 8;  8 + 4 + 4 + 2
        (FSDP_PLAIN, 56_000, 500),  # 8 · 7/8 · 8;  4/8
        (FSDP_STOCHASTIC, 56_000, 2_500),  # (8 + 4 + 4 + 4)/8
        (FSDP_EXACT, 98_000, 2_500),  # 8 · 7/8 · (2 + 2 · 6)
    ],
    ids=lambda value: getattr(value, "title", None),
)
def test_small_numbers_are_those_computed_by_hand(way, sent, memory):
    assert way.sent(SMALL) == sent
    assert way.memory(SMALL) == memory


@pytest.mark.parametrize("run", RUNS, ids=str)
def test_the_ways_compare_as_their_formulas_say(run):
    K = run.K
    assert SHARD.sent(run) / REPLICATE.sent(run) == pytest.approx((4 * K + 2) / (8 * K))
    assert PLAIN.sent(run) < SHARD.sent(run) < REPLICATE.sent(run)
    assert PLAIN.memory(run) < SHARD.memory(run) < REPLICATE.memory(run)
    assert FSDP_STOCHASTIC.sent(run) == FSDP_PLAIN.sent(run)
    assert FSDP_EXACT.sent(run) / FSDP_PLAIN.sent(run) == pytest.approx((2 + 6 * K) / 8)
    assert FSDP_EXACT.memory(run) == FSDP_STOCHASTIC.memory(run)


@pytest.mark.parametrize("way", traffic.WAYS, ids=lambda way: way.title)
@pytest.mark.parametrize("run", RUNS, ids=str)
def test_the_formulas_to_be_read_are_those_that_are_computed(way, run):
    names = {**run._asdict(), "s": run.s}
    for text, compute in ((way.sent_formula, way.sent), (way.memory_formula, way.memory)):
        code = text.replace("·", "*").replace("4K", "4*K").replace("2K", "2*K")
        assert eval(code, names) == pytest.approx(compute(run)), text


@pytest.mark.parametrize("run", RUNS, ids=str)
def test_what_the_ranks_decide_by_is_next_to_nothing(run):
    assert traffic.decision_bytes(run) < 1e-3 * min(way.sent(run) for way in traffic.WAYS)


def test_a_gpu_is_full_at_80_gb():
    full = Run(N=8 * 10**9, K=2, P=2, A=8)  # weights and AdamW's state: 80 GB with DDP
    assert not traffic.fits(PLAIN, full)
    assert traffic.fits(PLAIN, full._replace(N=6 * 10**9))  # 72 GB
    assert not traffic.fits(SHARD, full._replace(N=6 * 10**9))


def test_every_sentence_on_what_fits_can_be_said():
    runs = [Run(4 * 10**9, K, P, 8) for K in (2, 8) for P in (8, 64)]
    said = "\n".join(traffic.verdicts(runs))
    assert 'DDP, `sync="shard"` **does not fit** with K = 8 on 64 GPUs.' in said
    assert 'DDP on 8 and 64 GPUs: the other ways fit. The fullest, `sync="shard"`' in said
    assert "FSDP2 on 8 and 64 GPUs: all ways fit." in said


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.00390625, "0.00391"), (0.5, "0.500"), (9.996, "10.0"), (63.9375, "63.9"),
        (999.6, "1,000"), (4_476, "4,480"), (24_500, "24,500"),
    ],
)  # fmt: skip
def test_numbers_have_three_digits(value, text):
    assert traffic.number(value) == text


def test_the_committed_document_is_what_the_script_prints(tmp_path, monkeypatch, capsys):
    output = tmp_path / "traffic.md"
    monkeypatch.setattr(sys, "argv", ["traffic.py", "--output", str(output)])
    traffic.main()
    printed = capsys.readouterr().out
    assert printed == output.read_text(encoding="utf-8")
    assert printed == traffic.OUTPUT.read_text(encoding="utf-8")


def test_fewer_micro_batches_than_tasks_are_refused(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["traffic.py", "--micro-batches", "7"])
    with pytest.raises(SystemExit):
        traffic.main()
    assert "--micro-batches" in capsys.readouterr().err
