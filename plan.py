"""What a run will cost before it starts: parameters, ranks, steps, memory; and what is free.

    python plan.py     the table of the paper's models and tasks that the README shows

    make(s, config)    the numbers, for --dry-run, for tables, and for train.py to fill in the
                       micro-batch before it loads the model
    show(s, plan)      the same as text

Nothing here needs weights, data or the hub.
"""

import math
import os
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch

import checkpoint
from checkpoint import UserError
from farss import block_index
from model import (
    CHUNK,
    DECODER_TARGETS,
    ENCODER_TARGETS,
    FAMILIES,
    READS,
    WIDE,
    Config,
    empty,
    linear_shapes,
    place,
    whole_parameters,
)
from settings import (
    AUTO,
    DTYPES,
    GLUE,
    NARROW,
    PRESETS,
    Parser,
    Preset,
    Settings,
    candidates,
    run_main,
    whole_blocks,
)

# Of a calibration's batch: sequences, and tokens unless one sequence has more. Constants, so that
# no number depends on the free memory; more tokens at a time would be no faster.
CALIBRATION_BATCH, CALIBRATION_TOKENS = 8, 512
Shapes = dict[str, tuple[int, int]]  # layer: (m, n)


@dataclass(frozen=True)
class Group:
    """All layers of one kind at one depth."""

    depth: str  # shallow, deep, or all
    leaf: str
    count: int
    shape: tuple[int, int]
    ranks: tuple[int, int]  # the least and the most that the data can decide
    per_rank: int  # trainable numbers of a layer for each rank

    @property
    def parameters(self) -> tuple[int, int]:
        low, high = (self.count * r * self.per_rank for r in self.ranks)
        return low, high


@dataclass(frozen=True)
class Plan:
    """A run in numbers; memory in bytes by part."""

    blocks: int
    parameters: int
    trainable: float  # where ranks are adaptive: if every shallow one were r_avg
    bounds: tuple[float, float]  # the least and the most that the data can decide
    uniform: int  # with rank R everywhere, as LoRA
    head: int  # numbers of a classification head, which trains besides
    groups: list[Group]  # of adapted layers
    examples: int
    steps: int
    warmup_steps: int
    micro_batch: int
    checkpointing: bool
    training: dict[str, float]
    initialisation: dict[str, float]  # empty where a method needs no factors
    kept_apart: float  # block inputs of the initialisation that go to CPU memory
    replaced: dict[str, str]  # functions of farss.py that the start does not call: equation
    summed_first: list[str]  # kinds of deep layers whose tokens are (fast.start.sums_first)
    memory: float  # that the device has

    @property
    def fits(self) -> bool:
        """Whether training does, if only just; sizes are chosen so that it `leaves_room`."""
        return sum(self.training.values()) <= self.memory


def make(s: Settings, config: Config, memory: float | None = None, rows: int = 0,
         fast: Any = None) -> Plan:
    """The plan of a run on a device with `memory` bytes (None: what is free on s.device now), on
    a dataset of so many `rows` (0: not known, and enough). `fast` is the package where the start
    takes it, for what that would hold."""
    if s.shallow == AUTO:  # until a trial has found it
        s = replace(s, shallow=candidates(config.num_hidden_layers)[-1])
    skeleton = empty(config)
    parameters = sum(p.numel() for p in skeleton.parameters())
    memory = device_memory(s.device) if memory is None else memory
    shapes: Shapes = {}
    head, trainable, bounds = 0, float(parameters), (0.0, 0.0)
    if s.how.trains == "adapters":
        shapes = s.shapes(skeleton)
        head = sum(p.numel() for p in whole_parameters(skeleton).values())
        trainable = adapter_parameters(s, shapes, s.r_avg)
        bounds = adapter_parameters(s, shapes, s.r_min), adapter_parameters(s, shapes, s.r_max)
    else:
        trainable = sum(p.numel() for n, p in skeleton.named_parameters()
                        if not s.is_frozen(n, config.num_hidden_layers))
        bounds = trainable, trainable
    most = bounds[1] + head
    micro_batch, checkpointing = choose_micro_batch(s, config, parameters, most, memory)
    examples = min(s.examples, rows or s.examples)
    steps = s.steps or s.epochs * math.ceil(examples / s.batch_size)
    initial = (initialisation_memory(s, config, parameters, fast) if s.how.needs != "nothing" else
               {})
    kept_here = (s.how.needs != "fisher" or leaves_room(initial, memory) or s.device == "cpu")
    kept_apart = 0.0 if kept_here else initial["kept inputs"]
    deep = s.how.needs == "fisher" and s.budget.shallow < config.num_hidden_layers
    first = (fast.summed_first(block_shapes(s, config), s.budget, calibration_tokens(s))
             if deep and fast else [])
    return Plan(
        config.num_hidden_layers, parameters, trainable, bounds,
        s.rank * sum(m + n for m, n in shapes.values()), head, layer_groups(s, shapes), examples,
        steps, warmup_steps(steps, s.warmup), micro_batch, checkpointing,
        training_memory(s, config, parameters, most, micro_batch, checkpointing),
        initial | ({"kept inputs": 0.0} if kept_apart else {}), kept_apart,
        {names: equation for names, equation in (fast.REPLACES if fast else {}).items()
         if s.how.needs == "fisher" or names == "svd"},
        [leaf_name(name) for name in first], memory)


def warmup_steps(steps: int, warmup: float) -> int:
    """Steps with rising learning rate, a part of all or a number: never all, or one step alone
    would train nothing."""
    return min(math.ceil(warmup * steps) if warmup < 1 else int(warmup), steps - 1)


# -------------------------------------------------------------------------- ranks and parameters


def is_shallow(s: Settings, name: str) -> bool:
    return s.how.adaptive and s.budget.is_shallow(name)


def adapter_parameters(s: Settings, shapes: Shapes, shallow_rank: float) -> float:
    """Σ r (m + n) if every layer of adaptive rank had `shallow_rank`; min(m, n) is the most. KaSA
    has r numbers more a layer, and what a method freezes does not count."""
    return sum(min(shallow_rank if is_shallow(s, name) else s.rank, m, n) * s.how.per_rank(m, n)
               for name, (m, n) in shapes.items())


def leaf_name(name: str) -> str:
    """What a layer is called in a table: its last part, or for RoBERTa's "dense" the last two."""
    leaf = name.rpartition(".")[2]
    return place(name) if leaf == "dense" else leaf


def layer_groups(s: Settings, shapes: Shapes) -> list[Group]:
    """Layers by depth and kind, shallow ones first."""
    members: dict[tuple[str, str], list[str]] = {}
    for name in shapes:
        depth = "shallow" if is_shallow(s, name) else "deep" if s.how.adaptive else "all"
        members.setdefault((depth, leaf_name(name)), []).append(name)
    groups = []
    for (depth, leaf), names in sorted(members.items(), key=lambda g: g[0][0] != "shallow"):
        m, n = shapes[names[0]]
        low, high = (s.r_min, s.r_max) if depth == "shallow" else (s.rank, s.rank)
        groups.append(Group(depth, leaf, len(names), (m, n), (min(low, m, n), min(high, m, n)),
                            s.how.per_rank(m, n)))
    return groups


# ----------------------------------------------------------------------------------------- memory


def processes() -> int:
    """How many torchrun has started on one task; 1 without it."""
    return int(os.environ.get("WORLD_SIZE", 1))


def element_size(s: Settings) -> int:
    return torch.finfo(DTYPES[s.dtype]).bits // 8


def is_mixed(s: Settings) -> bool:
    """Whether weights are fp32 and their products bf16 (autocast)."""
    return s.master_dtype != DTYPES[s.dtype]


def block_activations(s: Settings, config: Config, adapters: bool = True) -> int:
    """Bytes that one block keeps per token for its backward pass, with its adapters or without.

    About 10 d + 2 kv + 4 f numbers (norms, q, k, v, rotated q and k, attention's output; gate, up,
    SiLU and product), d the width, kv and f those of keys and MLP; in RoBERTa about 12 d + 2 f; and
    each adapted layer's dropout mask in bytes, below model.WIDE its input in fp32, too; from there
    on 2 d less. Where bf16 products are made of fp32 weights, 5 d of them are fp32, too (the
    residual stream and the norms).
    """
    d, f = config.hidden_size, config.intermediate_size
    kv = config.num_key_value_heads * config.head_dim
    numbers = 12 * d + 2 * f if FAMILIES[config.model_type].encoder else 10 * d + 2 * kv + 4 * f
    size = element_size(s) * numbers + (10 * d if is_mixed(s) else 0)
    if s.how.trains == "adapters" and adapters:
        size += sum(n if n >= WIDE else 5 * n for _, n in block_shapes(s, config).values())
        size -= 2 * d * element_size(s) * (d >= WIDE)
    return size


def block_shapes(s: Settings, config: Config) -> Shapes:
    """(m, n) of the adapted layers of one block, the first that has any."""
    shapes = {n: shape for n, shape in s.shapes(empty(config)).items() if place(n) != n}
    first = min(map(block_index, shapes), default=0)
    return {n: shape for n, shape in shapes.items() if block_index(n) == first}


def training_memory(s: Settings, config: Config, parameters: int, trainable: float,
                    micro_batch: int, checkpointing: bool) -> dict[str, float]:
    """Estimated peak bytes of training in each process, by part.

    What is trained costs 16 bytes a number (fp32 weight, gradient, AdamW's two moments).
    Checkpointing keeps only a block's input, and all activations of one block at a time. With
    --shard weights are dealt out, but for those outside the blocks and of two blocks at a time.
    """
    deals = processes() if s.shard else 1
    weight = 4 if s.how.trains == "weights" else element_size(s)
    block, blocks = block_activations(s, config), config.num_hidden_layers
    kept = blocks * element_size(s) * config.hidden_size + block if checkpointing else (
        blocks * block)
    return {"frozen weights": 0 if s.how.trains == "weights" else weight * parameters / deals,
            "trained, with AdamW": 16 * trainable / deals,
            "gathered weights": weight * gathered(config) if deals > 1 else 0,
            "bf16 copies": 2 * (gathered(config) if deals > 1 else parameters) * is_mixed(s),
            "activations": micro_batch * s.max_length * kept,
            "logits": 0 if FAMILIES[config.model_type].encoder else 12 * CHUNK}


def gathered(config: Config) -> int:
    """Weights outside the blocks and of two blocks, one in work and the next on its way."""
    sizes = [(place(n) != n, p.numel()) for n, p in empty(config).named_parameters()]
    inside = sum(size for in_block, size in sizes if in_block)
    return sum(size for _, size in sizes) - inside + 2 * inside // config.num_hidden_layers


def initialisation_memory(s: Settings, config: Config, parameters: int, fast: Any = None
                          ) -> dict[str, float]:
    """Estimated peak bytes of the start, by part; `fast` is the package where the start takes it.

    The kept inputs go to CPU memory where they do not fit (`leaves_room`). Where only covariances
    are needed, forward passes of the whole model keep nothing, and those of one block are counted:
    of how many at once is for `blocks_at_once` to say.
    """
    shapes = block_shapes(s, config)
    batch = calibration_batch(s.max_length) * s.max_length
    logits = 0 if FAMILIES[config.model_type].encoder else (
        12 * min(CHUNK, batch * config.vocab_size))
    # A gradient and its real tokens in fp32; when the logits are there, none of them is.
    widest = batch * max(map(max, shapes.values())) * (element_size(s) + 4)
    block = batch * block_activations(s, config, False) + max(widest, logits)
    if s.how.needs == "covariance":
        return {"weights": element_size(s) * parameters,
                "covariances of a block": covariance_bytes(shapes),
                "activations of a block": block}
    tokens = calibration_tokens(s)
    depths = {i < s.budget.shallow for i in range(config.num_hidden_layers)}
    of_block = fast.block_sums if fast else factor_sums
    sums = max((of_block(shapes, s.budget, shallow, tokens, element_size(s))
                for shallow in depths), key=lambda parts: sum(parts.values()))
    return {"weights": element_size(s) * parameters, **sums, "activations of a block": block,
            "kept inputs": kept_inputs(s, config, tokens)}


def factor_sums(shapes: Shapes, *_: Any) -> dict[str, float]:
    """Bytes of what farss.measure holds of one block's layers: Σ_h and Σ_δ in fp32, and the largest
    decomposition with its work space."""
    most = max(min(m, n) * (m + n + 4 * min(m, n)) for m, n in shapes.values())
    return {"factors of a block": 4 * sum(m * m + n * n for m, n in shapes.values()),
            "a decomposition": 4 * most}


SVD_COST = 80  # of torch's SVD of W (m, n) on a CPU, in products of m n min(m, n) multiplications


def plain_products(s: Settings, config: Config) -> float:
    """Floating-point operations of farss.measure on all blocks, in the time of products: passes,
    Σ_h and Σ_δ, λ, γ and I, and the SVDs."""
    tokens, shapes = calibration_tokens(s), block_shapes(s, config)
    whole = sum(p.numel() for n, p in empty(config).named_parameters() if place(n) != n)
    passes = 3 * tokens * whole  # two forward, one backward
    sums = tokens * sum(m * m + n * n for m, n in shapes.values())
    along = sum(2 * min(m, n) * (m * m + n * n) for m, n in shapes.values())
    decompositions = SVD_COST * sum(m * n * min(m, n) for m, n in shapes.values())
    return 2 * (passes + config.num_hidden_layers * (sums + along + decompositions))


def products_a_second(size: int = 1024) -> float:
    """Floating-point operations of an fp32 product on this CPU in a second, by trying one."""
    x = torch.ones(size, size)
    seconds = []
    for _ in range(4):  # the first brings the library in
        began = time.perf_counter()
        x @ x
        seconds.append(time.perf_counter() - began)
    return 2 * size**3 / min(seconds)


def plain_note(s: Settings, config: Config) -> str:
    """How long the plain start of a wide model takes, if examples have --max-length tokens."""
    work = plain_products(s, config)
    known = f"{work / 1e15:,.1f} PFLOP in products, SVDs counted as such"
    if str(s.device) != "cpu":
        return f"{known}; how long that is on a GPU was not measured"
    rate = products_a_second()
    return f"{known}: about {work / rate / 60:,.0f} minutes at this CPU's {rate / 1e9:,.0f} GFLOP/s"


def covariance_bytes(shapes: Shapes) -> int:
    """Of one block's layers, in fp32; those that read the same share one."""
    inputs = {READS.get(leaf_name(name), name): n for name, (_, n) in shapes.items()}
    return 4 * sum(n * n for n in inputs.values())


def blocks_at_once(s: Settings, config: Config, parameters: int, memory: float) -> int:
    """Of how many blocks the covariances are summed in one forward pass of the model."""
    need = initialisation_memory(s, config, parameters)
    left = 0.9 * memory - need["weights"] - need["activations of a block"]
    return max(1, min(config.num_hidden_layers, int(left / need["covariances of a block"])))


def calibration_tokens(s: Settings) -> int:
    """Of all examples, the most that they can have."""
    return s.calibration_examples * s.max_length


def calibration_batch(longest: int) -> int:
    """Sequences of a calibration's batch, the longest of which has so many tokens."""
    return max(1, min(CALIBRATION_BATCH, CALIBRATION_TOKENS // longest))


def kept_inputs(s: Settings, config: Config, tokens: int) -> int:
    """Bytes of what goes into each block, for all calibration tokens."""
    return tokens * config.hidden_size * config.num_hidden_layers * element_size(s)


def inputs_on(s: Settings, config: Config, kept: float, to_load: float = 0, fast: Any = None
              ) -> str | None:
    """Where the start keeps the inputs of all blocks, `kept` bytes: "cpu" if s.device has no room
    beside the weights, of which `to_load` bytes are not there yet; None if they stay where they
    are. UserError if the CPU has no room either."""
    free = device_memory(s.device) - to_load
    if leaves_room(initialisation_memory(s, config, 0, fast) | {"kept inputs": kept}, free):
        return None
    if warning := no_room_for(kept, free if s.device == "cpu" else device_memory("cpu")):
        raise UserError(warning)
    return "cpu"


def no_room_for(kept: float, free: float) -> str | None:
    """What to say where so many bytes of block inputs have no room in the CPU's memory."""
    return None if leaves_room({"kept inputs": kept}, free) else (
        f"the start keeps {kept / 1e9:.1f} GB of block inputs in the CPU's memory, of which "
        f"{max(0, free) / 1e9:.1f} GB are free: give fewer --calibration-examples or a smaller "
        "--max-length")


def leaves_room(parts: dict[str, float], memory: float) -> bool:
    """Whether these bytes leave a tenth of the memory free, for what an estimate does not know."""
    return sum(parts.values()) <= 0.9 * memory


def choose_micro_batch(s: Settings, config: Config, parameters: int, trainable: float,
                       memory: float) -> tuple[int, bool]:
    """(examples per forward pass, checkpointing): the largest 2^i part of a process's part of the
    batch that leaves room."""
    whole = math.ceil(s.batch_size / processes())
    sizes = [whole >> i for i in range(whole.bit_length())]
    sizes = [s.micro_batch] if s.micro_batch else sizes
    checks = [False, True] if s.checkpointing is None else [s.checkpointing]
    for checkpointing in checks:
        for size in sizes:
            need = training_memory(s, config, parameters, trainable, size, checkpointing)
            if leaves_room(need, memory):
                return size, checkpointing
    return sizes[-1], checks[-1]


def question_memory(config: Config, itemsize: int, tokens: float, scored: float, cached: float = 0
                    ) -> float:
    """Estimated bytes that a question of so many tokens takes while it is answered, in numbers of
    `itemsize` bytes: keys and values of `cached` tokens in all blocks, one block's activations
    with the attention's scores, and the logits of `scored` tokens, in fp32, too."""
    kv = config.num_key_value_heads * config.head_dim
    activations = tokens * (10 * config.hidden_size + 4 * config.intermediate_size)
    scores = config.num_attention_heads * tokens * max(tokens, cached)
    return (itemsize * (2 * config.num_hidden_layers * kv * cached + activations + scores)
            + (itemsize + 4) * scored * config.vocab_size)


def device_memory(device: str | None) -> float:
    """Free bytes on the device for this process; without one (a plan), the paper's 80 GB GPU."""
    if device is None:
        return 80e9
    return checkpoint.free_memory(device) / (processes() if device == "cpu" else 1)


def memory_used(device: str) -> float:
    """Peak bytes: of the GPU's allocator since forget_peak, otherwise of the whole process so far
    (0 on Windows)."""
    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource
    except ImportError:
        return 0.0
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def forget_peak(device: str) -> None:
    """Have memory_used count anew, where the system can: on a GPU."""
    if device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats(device)


# ------------------------------------------------------------------------------------------- text


def million(count: float) -> str:
    return f"{count / 1e6:,.1f}M"


def by_part(memory: dict[str, float]) -> str:
    """"12.3 GB: weights 10.0, activations 2.3"."""
    each = ", ".join(f"{name} {size / 1e9:.1f}" for name, size in memory.items() if size)
    return f"{sum(memory.values()) / 1e9:.1f} GB: {each}"


def rank_table(groups: list[Group]) -> Iterator[str]:
    """One line per kind of layer, shallow and deep apart."""
    yield f"{'layers':30}{'count':>6}{'shape':>16}{'rank':>12}{'trainable':>12}"
    for g in groups:
        (low, high), (few, many) = g.ranks, g.parameters
        rank = f"{low}" if low == high else f"{low}..{high}"
        size = f"{few / 1e6:.1f}M" if low == high else f"{few / 1e6:.1f}..{many / 1e6:.1f}M"
        shape = f"{g.shape[0]} x {g.shape[1]}"
        yield f"{g.depth + ' ' + g.leaf:30}{g.count:>6}{shape:>16}{rank:>12}{size:>12}"


def dropout_note(s: Settings) -> str | None:
    """What dropout does to an adapter that starts as a part of W."""
    if not (s.dropout and s.how.splits and s.residual == "split"):
        return None
    return (f"{s.dropout:g} falls on a part of W itself, which {s.method}'s adapters hold: the "
            "first loss is not the base model's; --residual exact or --dropout 0 avoid that")


def form_note(s: Settings, plan: Plan) -> str | None:
    """Which code computes the start, of a method that decomposes weights."""
    if not (s.how.splits or s.how.diagonal):
        return None
    if s.form == "plain":
        return "farss.py and methods/, as they are printed (--fast: by fast/)"
    instead = "; ".join(f"{names} (Eq. {equation})" for names, equation in plan.replaced.items())
    return f"fast/, in place of farss.py's {instead}: the same result (--plain: by farss.py)"


def end_of(s: Settings, block: int) -> str:
    """Which of its directions a layer of this block starts from."""
    return "lowest" if s.budget.lowest(f"layers.{block}.") else "highest"


def show(s: Settings, config: Config, plan: Plan, known: str) -> None:
    """--dry-run: all that can be known without weights; `known`: the model's name in PRESETS."""
    print(f"plan: {s.model}, {s.task}, {s.method}")
    print(f"model         {plan.blocks} blocks, {million(plan.parameters)} parameters, {s.dtype}")
    if s.shallow == AUTO:
        tried = candidates(plan.blocks)
        print(f"boundary      by a trial of {tried[0]} to {tried[-1]} shallow blocks, of which the "
              "last is shown")
        s = replace(s, shallow=tried[-1])
    if s.how.adaptive:
        print(f"shallow       {s.shallow} of {plan.blocks} blocks, r (r_min, r_avg, r_max) = "
              f"({s.r_min}, {s.r_avg:g}, {s.r_max}), {end_of(s, 0)}-scoring directions")
        print(f"deep          {plan.blocks - s.shallow} blocks, R = {s.rank}, "
              f"{end_of(s, plan.blocks)}-scoring directions")
    if s.freeze:
        print(f"frozen        the {s.freeze.replace('-', ' ')} of the blocks")
    if warning := dropout_note(s):
        print(f"dropout       {warning}")
    if form := form_note(s, plan):
        print(f"start         by {form}")
    if s.form == "plain" and s.how.needs == "fisher" and config.hidden_size >= NARROW:
        print(f"              {plain_note(s, config)}")
    if s.how.trains == "adapters":
        print(f"scaling       alpha / R = {s.alpha:g} / {s.rank} = {s.scaling:g}\n")
        print("\n".join(rank_table(plan.groups)))
    if s.how.trains == "weights":
        print(f"trainable     all {million(plan.trainable)}, fp32 master weights")
    elif s.how.adaptive:
        row = PRESETS.get((known, s.task), Preset({}))  # its own alone
        paper = (row.printed or (0, 0))[0] if s.rank == row.settings.get("rank", 128) else 0
        print(f"trainable     {million(plan.trainable)} if every shallow rank were r_avg; the data "
              f"decide, between {million(plan.bounds[0])} and {million(plan.bounds[1])}"
              + (f"; the paper prints {paper}M" if paper else ""))
        print(f"              LoRA of rank {s.rank}: {million(plan.uniform)}")
    else:
        print(f"trainable     {million(plan.trainable)}")
    if plan.head:
        print(f"              and the classification head, {million(plan.head)}, in full")
    print(f"\nsteps         {plan.steps:,} of {s.batch_size} examples"
          + (f" ({s.epochs} epoch{'s' * (s.epochs > 1)} of {plan.examples:,})"
             if not s.steps else "")
          + f", {plan.warmup_steps} of them warm-up to lr {s.lr:g}")
    show_memory(s, plan)


def show_memory(s: Settings, plan: Plan) -> None:
    """What training and start take of the device, and what does not fit."""
    has = f"{plan.memory / 1e9:.0f} GB" + (f" free on {s.device}" if s.device else "")
    each = f" for each of {processes()} processes" if processes() > 1 else ""
    print(f"memory        of {has}{each}, about")
    print(f"              training {by_part(plan.training)} (micro-batch {plan.micro_batch}"
          + (", checkpointing)" if plan.checkpointing else ")"))
    if plan.initialisation:
        print(f"              initialisation {by_part(plan.initialisation)}"
              + (f"; kept inputs, {plan.kept_apart / 1e9:.1f} GB, in CPU memory"
                 if plan.kept_apart else ""))
        if warning := no_room_for(plan.kept_apart, device_memory("cpu")):
            print("              THIS DOES NOT FIT INTO THIS MACHINE, if examples have "
                  f"--max-length tokens: {warning}")
    if plan.summed_first:
        print(f"              deep {', '.join(plan.summed_first)}: tokens summed first, then seen "
              "along the directions: fewer products, if examples have --max-length tokens")
    if not plan.fits:
        print("              THIS DOES NOT FIT"
              + (": AdamW needs 16 bytes for every weight" if s.how.trains == "weights" else
                 "; try a smaller --max-length or --targets"))


# ------------------------------------------------------------- the table of the paper's models


def impossible(s: Settings, shapes: Shapes, printed: int) -> bool:
    """Whether no shallow ranks in [r_min, r_max] give the printed millions, to half a million."""
    low, high = (adapter_parameters(s, shapes, r) for r in (s.r_min, s.r_max))
    return not low - 0.5e6 <= printed * 1e6 <= high + 0.5e6


def counts(s: Settings, shapes: Shapes, printed: int | None) -> str:
    """"277.2 (250.4..284.8; 271)": millions if every shallow rank were r_avg, between the least
    and the most; and what the paper prints, marked ! where no ranks give that."""
    low, at, high = (adapter_parameters(s, shapes, r) / 1e6 for r in (s.r_min, s.r_avg, s.r_max))
    paper = "" if printed is None else f"; {printed}{'!' * impossible(s, shapes, printed)}"
    return f"{at:.1f} ({low:.1f}..{high:.1f}{paper})"


def paper_table() -> Iterator[str]:
    """Every model and task of the paper, in Markdown: trainable parameters in millions."""
    yield ("| model | parameters | task | shallow of blocks | LoRA | FARSS | matched R | "
           "FARSS at it |")
    yield "|---|---|---|---|---|---|---|---|"
    for (model, task), row in PRESETS.items():
        if model and row.printed:
            yield table_row(model, task, row,
                            DECODER_TARGETS[row.settings.get("targets", "seven")])
    for name, targets in ENCODER_TARGETS.items():
        yield table_row("roberta-base", f"GLUE, {name} linears", GLUE, targets)


def table_row(model: str, task: str, row: Preset, targets: tuple[str, ...]) -> str:
    config = checkpoint.MODELS[model][1]
    skeleton = empty(config)
    shapes = linear_shapes(skeleton, targets)
    ranks = {k: row.settings[k] for k in ("rank", "r_avg", "r_max") if k in row.settings}
    s = Settings(model=model, targets=",".join(targets),
                 shallow=whole_blocks(row.settings["shallow"], config), **ranks)
    at_128, at_matched = row.printed or (None, None)
    lora = s.rank * sum(m + n for m, n in shapes.values())
    parameters = sum(p.numel() for p in skeleton.parameters())
    matched = counts(replace(s, rank=row.matched_rank), shapes, at_matched) if (
        row.matched_rank) else "-"
    return (f"| {model} | {parameters / 1e6:,.0f}M | {task} | {s.shallow} of "
            f"{config.num_hidden_layers} | {lora / 1e6:.2f} | {counts(s, shapes, at_128)} | "
            f"{row.matched_rank or '-'} | {matched} |")


def main() -> None:
    Parser(__doc__).parse_args()
    print("\n".join(paper_table()))


if __name__ == "__main__":
    run_main(main)
