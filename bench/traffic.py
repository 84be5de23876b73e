"""What a window of micro-batches costs each GPU, on paper: bytes sent, and bytes of memory.

    python bench/traffic.py [--micro-batches 8] [--output FILE.md]

Nothing is measured and nothing is run: the formulas are those of gcond_kernels/distributed.py and
of FSDP2, with numbers put in. What they count, and what not, is in the document itself.
"""

import argparse
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

OUTPUT = Path(__file__).parent / "results" / "traffic.md"
PARAMETERS = {"1 B": 10**9, "70 B": 70 * 10**9}
TASKS = (2, 8)
RANKS = (8, 64, 1024)
TENSORS = 500  # for the note on what the decision sends
GPU_BYTES = 80 * 10**9

# Bytes per parameter.
WEIGHT = 2  # bfloat16, with DDP
GRADIENT = 2  # .grad of those
ROW = 4  # accumulators, float32
HISTORY = 2  # bfloat16, per task
MOMENTUM = 4  # float32
ADAMW = 8  # two float32 numbers
SHARDED_WEIGHT = 4  # FSDP2: float32, as is .grad
SHARDED_GRADIENT = 4
GATHERED = 2  # MixedPrecisionPolicy(param_dtype=torch.bfloat16)
REDUCED = 4  # MixedPrecisionPolicy(reduce_dtype=torch.float32)


class Run(NamedTuple):
    """A training: N parameters, K tasks, P ranks, A micro-batches in a window."""

    N: int
    K: int
    P: int
    A: int

    @property
    def s(self) -> float:
        """The share of its buffer that a rank sends in a ring's reduce-scatter or all-gather."""
        return (self.P - 1) / self.P


class Way(NamedTuple):
    """A way to spread a training.

    Attributes:
        kind: "DDP" or "FSDP2".
        name: of the way, within its kind.
        sent: bytes that a rank sends in a window.
        memory: bytes of a rank, beside weights and the base optimizer's state.
        sent_formula: `sent`, to be read.
        memory_formula: `memory`, to be read.
    """

    kind: str
    name: str
    sent: Callable[[Run], float]
    memory: Callable[[Run], float]
    sent_formula: str
    memory_formula: str

    @property
    def title(self) -> str:
        """How tables call it."""
        return f"{self.kind}, {self.name}"


def kept(run: Run) -> int:
    """Bytes per parameter of history and momentum."""
    return HISTORY * run.K + MOMENTUM


def whole_rows(run: Run) -> float:
    """Rows, history and momentum of all parameters, and a .grad, which fits no row's type."""
    return (ROW * run.K + kept(run) + GRADIENT) * run.N


def sharded_rows(run: Run) -> float:
    """The same of a shard, with what one backward pass leaves in .grad."""
    return (ROW * run.K + kept(run) + SHARDED_GRADIENT) * run.N / run.P


def one_pass_per_micro_batch(run: Run) -> float:
    """FSDP2 gathers the weights for the forward and for the backward pass, and reduces once."""
    return run.A * run.s * (2 * GATHERED + REDUCED) * run.N


PLAIN = Way(
    "DDP",
    "plain sum",
    lambda r: 2 * r.s * GRADIENT * r.N,
    lambda r: GRADIENT * r.N,
    "2 · s · 2 · N",
    "2 · N",
)
SHARD = Way(
    "DDP",
    '`sync="shard"`',
    lambda r: r.s * (ROW * r.K + GRADIENT) * r.N,
    lambda r: ROW * r.K * r.N + kept(r) * r.N / r.P,
    "s · (4K + 2) · N",
    "4K · N + (2K + 4) · N / P",
)
REPLICATE = Way(
    "DDP",
    '`sync="replicate"`',
    lambda r: 2 * r.s * ROW * r.K * r.N,
    whole_rows,
    "2 · s · 4K · N",
    "(4K + 2K + 4 + 2) · N",
)
FSDP_PLAIN = Way(
    "FSDP2",
    "plain sum",
    one_pass_per_micro_batch,
    lambda r: SHARDED_GRADIENT * r.N / r.P,
    "A · s · (2 · 2 + 4) · N",
    "4 · N / P",
)
FSDP_STOCHASTIC = Way(
    "FSDP2",
    '`mode="stochastic"`',
    one_pass_per_micro_batch,
    sharded_rows,
    "A · s · (2 · 2 + 4) · N",
    "(4K + 2K + 4 + 4) · N / P",
)
FSDP_EXACT = Way(
    "FSDP2",
    '`mode="exact"`',
    lambda r: r.A * r.s * (GATHERED + r.K * (GATHERED + REDUCED)) * r.N,
    sharded_rows,
    "A · s · (2 + K · (2 + 4)) · N",
    "(4K + 2K + 4 + 4) · N / P",
)
WAYS = (PLAIN, SHARD, REPLICATE, FSDP_PLAIN, FSDP_STOCHASTIC, FSDP_EXACT)


def main(given=None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--micro-batches", type=int, default=8, help="of a rank in a window, A")
    parser.add_argument("--output", type=Path, default=OUTPUT, help="Markdown; %(default)s")
    arguments = parser.parse_args(given)
    if arguments.micro_batches < max(TASKS):
        parser.error(
            f"--micro-batches: stochastic mode needs one for each of the {max(TASKS)} tasks"
        )
    text = document(arguments.micro_batches)
    arguments.output.write_text(text, encoding="utf-8")
    print(text, end="")


def base_bytes(kind: str, run: Run) -> float:
    """Weights and AdamW's state of a rank."""
    if kind == "DDP":
        return (WEIGHT + ADAMW) * run.N
    return (SHARDED_WEIGHT + ADAMW) * run.N / run.P


def fits(way: Way, run: Run) -> bool:
    """Whether a GPU holds all that is counted."""
    return base_bytes(way.kind, run) + way.memory(run) <= GPU_BYTES


def decision_bytes(run: Run) -> float:
    """What a rank sends for the inner products, with momentum and max_norm: float64."""
    R = run.K + 1
    return 2 * run.s * 8 * (TENSORS * R**2 + 2 * run.K**2)


def number(value: float) -> str:
    """Three significant digits, without an exponent."""
    exponent = int(f"{value:.2e}".partition("e")[2])
    return f"{round(value, 2 - exponent):,.{max(0, 2 - exponent)}f}"


def gigabytes(value: float) -> str:
    return number(value / 1e9)


def table(header: Sequence[str], rows: Sequence[Sequence[str]], align: str = "---") -> str:
    """A Markdown table; `align` is of all columns but the first."""
    rule = ["---", *[align] * (len(header) - 1)]
    return "\n".join(f"| {' | '.join(row)} |" for row in (header, rule, *rows))


def cases(parameters: int, micro_batches: int) -> list[Run]:
    """The columns of a section's tables."""
    return [Run(parameters, K, P, micro_batches) for K in TASKS for P in RANKS]


def numbers_table(heading: str, runs: Sequence[Run], rows: Sequence[Sequence[str]]) -> str:
    header = [heading, *[f"K = {r.K}, P = {r.P}" for r in runs]]
    return table(header, rows, align="---:")


def sent_table(runs: Sequence[Run]) -> str:
    rows = [[way.title, *[gigabytes(way.sent(r)) for r in runs]] for way in WAYS]
    return numbers_table("sent, GB", runs, rows)


def memory_table(runs: Sequence[Run]) -> str:
    """With what lies beside it above the ways of each kind; what is too much is marked."""
    rows = []
    for kind in ("DDP", "FSDP2"):
        base = [base_bytes(kind, r) for r in runs]
        rows.append([f"*{kind}, weights and AdamW*", *[f"*{gigabytes(b)}*" for b in base]])
        rows += [
            [way.title, *[gigabytes(way.memory(r)) + ("" if fits(way, r) else " ✗") for r in runs]]
            for way in WAYS
            if way.kind == kind
        ]
    return numbers_table("memory, GB", runs, rows)


def verdicts(runs: Sequence[Run]) -> Iterator[str]:
    """What does not fit a GPU, in sentences."""
    for kind in ("DDP", "FSDP2"):
        hopeless = [r for r in runs if base_bytes(kind, r) > GPU_BYTES]
        if len(hopeless) == len(runs):
            yield (
                f"{kind}: **nothing fits**, on however many GPUs: weights and AdamW's state take "
                f"{gigabytes(base_bytes(kind, runs[0]))} GB on each."
            )
            continue
        for P in sorted({r.P for r in hopeless}):
            size = base_bytes(kind, next(r for r in hopeless if r.P == P))
            yield (
                f"{kind}: **nothing fits on {P} GPUs**: weights and AdamW's state take "
                f"{gigabytes(size)} GB on each."
            )
        yield from verdicts_on_ways(kind, [r for r in runs if r not in hopeless])


def verdicts_on_ways(kind: str, runs: Sequence[Run]) -> Iterator[str]:
    """Where weights and AdamW's state fit: whether the rest does too, and how tightly."""
    together = [
        (base_bytes(kind, r) + way.memory(r), r, way)
        for way in WAYS
        if way.kind == kind
        for r in runs
    ]
    for _, r, way in (case for case in together if case[0] > GPU_BYTES):
        yield f"{way.title} **does not fit** with K = {r.K} on {r.P} GPUs."
    good = [case for case in together if case[0] <= GPU_BYTES]
    if good:
        most, r, way = max(good, key=lambda case: case[0])
        yield (
            f"{kind} on {listed(P for P in RANKS if any(r.P == P for r in runs))} GPUs: "
            f"{'all' if len(good) == len(together) else 'the other'} ways fit. The fullest, "
            f"{way.name} with K = {r.K} on {r.P} GPUs, takes {gigabytes(most)} GB with weights and "
            f"AdamW's state, and leaves {gigabytes(GPU_BYTES - most)} GB for activations and all "
            "else that is not counted."
        )


def listed(values: Iterable[object]) -> str:
    """A, b and c."""
    *before, last = map(str, values)
    return f"{', '.join(before)} and {last}" if before else last


def section(name: str, micro_batches: int) -> str:
    runs = cases(PARAMETERS[name], micro_batches)
    sentences = "\n".join(f"- {sentence}" for sentence in verdicts(runs))
    return SECTION.format(
        name=name, sent=sent_table(runs), memory=memory_table(runs), verdicts=sentences
    )


def document(micro_batches: int) -> str:
    """The whole text, in Markdown."""
    largest = Run(10**9, max(TASKS), max(RANKS), micro_batches)
    ratios = {K: SHARD.sent(r) / REPLICATE.sent(r) for K in TASKS for r in [largest._replace(K=K)]}
    head = HEAD.format(
        A=micro_batches,
        ratios=listed(f"{number(100 * ratio)} % with {K} tasks" for K, ratio in ratios.items()),
        formulas=table(
            ["way", "bytes sent by a rank", "bytes of memory of a rank"],
            [[way.title, way.sent_formula, way.memory_formula] for way in WAYS],
        ),
        tensors=TENSORS,
        K=largest.K,
        R=largest.K + 1,
        decision=number(decision_bytes(largest) / 1e6),
        rows=gigabytes(SHARD.sent(largest)),
    )
    return "\n".join([head, *[section(name, micro_batches) for name in PARAMETERS]])


HEAD = """\
# What a window costs each GPU

**On paper: nothing here is measured.** These are formulas with numbers put in, by
`python bench/traffic.py`. A window is A = {A} micro-batches on each rank (a rank is a GPU) and one
optimizer step. For every way to spread a training over GPUs the tables say how many bytes a rank
**sends** in a window, and how many bytes of **memory** it needs beside the weights and the base
optimizer's state.

## Which `sync` to take

- **`"shard"`**, the default, needs less memory: history and momentum are cut
  among the ranks, and `.grad` lies in a row. Of what
  `"replicate"` sends it sends {ratios}.
- **`"replicate"`** decides the same, and keeps on every rank what one process would keep. It
  sends more and needs more memory.
- With **FSDP2** there is no `sync` to take, for gradients are reduced in the backward pass. What
  there is to choose is the mode: stochastic mode sends what the plain sum does, 8 bytes per
  parameter and micro-batch; exact mode sends 2 + 6K.

## The formulas

| | |
| --- | --- |
| N, K, P, A | parameters, tasks, ranks, micro-batches of a rank in a window |
| s = (P − 1) / P | the share of its buffer that a rank of a ring sends: a reduce-scatter or an \
all-gather of B bytes sends s · B, an all-reduce 2 · s · B |
| row | the accumulator of a task: float32, 4 bytes per parameter |
| history | bfloat16, 2 bytes per parameter and task |
| momentum | float32, 4 bytes per parameter; `momentum=0` needs none |
| DDP | weights and `.grad` in bfloat16, 2 bytes each; AdamW's state in float32, 8 |
| FSDP2 | weights and `.grad` in float32, 4 bytes each, AdamW's state 8, all cut among the ranks; \
weights are gathered in 2 bytes, gradients reduced in 4: \
`MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)` |

{formulas}

The plain sum is training without GCond; `sync` and `mode` are options of `GCondFused`. In words:

- *DDP, plain sum*: micro-batches under `no_sync()`, then one all-reduce of `.grad`.
- *`sync="shard"`*: a reduce-scatter of K rows, then an all-gather of the result in the
  gradients' type. Memory: the rows whole, of history and momentum one rank's part; `.grad` lies
  in the last row.
- *`sync="replicate"`*: an all-reduce of K rows. Memory: rows, history, momentum, and `.grad`,
  which in bfloat16 cannot lie in a row of float32.
- With these two, exact and stochastic mode send the same, whatever A is.
- *FSDP2, plain sum*: in each micro-batch the weights are gathered for the forward and again for
  the backward pass, and the gradient is reduce-scattered. Memory: `.grad`.
- *FSDP2, `mode="stochastic"`*: the same passes. Memory, all of it of one rank's part: rows,
  history, momentum, and the gradient of one backward pass; the result lies in the first row.
- *FSDP2, `mode="exact"`*, with losses that share a forward pass: the weights are gathered for
  that, and again for each task's backward pass, whose gradient is reduce-scattered. Losses given
  as functions have a forward pass each, and then it is A · s · K · (2 · 2 + 4) · N. Memory: as
  in stochastic mode.

Not counted, because it is small:

- The inner products that all ranks decide by: one all-reduce of T · R² + 2K² numbers in float64,
  with T parameter tensors and R = K + 1 (R = K without momentum, or without `max_norm`). For
  T = {tensors}, K = {K}, R = {R} a rank sends {decision} MB in a window; the rows of 1 B parameters
  are {rows} GB with `"shard"`.
- How many micro-batches each rank had, 8 · (K + 3) bytes from each to every other; and what a
  row is padded with, at most 128 bytes per tensor and per rank.

Not counted, and to be added where it matters:

- Activations, buffers of the communication library, and with FSDP2 the layers gathered at a
  time.
- With DDP, gradients on their way to a row. Where it knows the model (`module=`), `GCondFused`
  takes them in buckets of 32 MB, or of N / 32 bytes where that is more: one bucket and one layer
  are alive. Without, it is a whole gradient, 2 · N.
- DistributedDataParallel's own buckets, 2 · N in all three ways: they are made when the model is
  wrapped, used or not. With `gradient_as_bucket_view=True` the plain sum has its `.grad` in
  them.
- The copy of weights and state that a base optimizer with `capturable=True` and without
  `fused=True` takes for its step.
- Buffers of the model (of BatchNorm), which DDP broadcasts.
- Time. Rows are sent while the next task is passed backward, and FSDP2 gathers ahead: what a
  fast network hides a slow one does not. Nor is every collective a ring.

What else to know:

- DDP's plain sum adds up micro-batches in bfloat16, GCond in float32: a part of the difference
  is precision.
- torch's own AdamW keeps its state in the type of the weights: 4 bytes for bfloat16, not 8.
- With FSDP2, `reshard_after_forward=False` (torch's default for the outermost module alone)
  saves the first gather of each micro-batch's backward passes, and costs memory. The plain sum
  can be reduced once a window, by `set_requires_gradient_sync(False)`, where every GPU has room
  for a whole gradient.
- HSDP and tensor parallelism are not in the tables.

## How to read the tables

GB are 10⁹ bytes, to three significant digits. K is the number of tasks, P that of GPUs. In
italics stand weights and AdamW's state, above the ways that need them too. **✗** marks what is
together with those more than 80 GB: it does not fit a GPU of that size.
"""

SECTION = """\
## {name} parameters

{sent}

{memory}

{verdicts}
"""

if __name__ == "__main__":
    main()
