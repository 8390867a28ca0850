"""A Triton kernel for exact q and k impacts, without the (neuron, length, length) tensors of the torch form.

A program handles some neurons of one head and a block of query rows. For each neuron it makes two passes over the
keys: the first finds each row's largest logit and sum of exponentials, the second computes the weights. Results are as
exact as float32: the tensor cores multiply in three parts (`tf32x3`), and the unchanged attention is subtracted before
the product with the values. The unchanged attention is recomputed here by the same instructions as the changed one, so
that a neuron that changes no logit has an impact of exactly zero rather than of rounding noise.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

try:
    import triton
    import triton.language as tl
except ImportError:
    triton = None

# Hopper's tensor cores take 64 rows at a time from four warps; a block's sums and both attentions are in registers.
# With 32 keys, and eight warps for heads above 64, no register spills on Hopper up to a head size of 128 at any length,
# and few do at 256; with 64 keys they would. With fewer keys, the work that is done once per block would cost more.
# Two stages of loads are enough, because a block's product takes longer than the next block's loads; the shared memory
# that they need is available on smaller GPUs too.
BLOCK_ROWS, BLOCK_KEYS, NUM_STAGES = 64, 32, 2
# Number of neurons of a head that one program handles in turn: they read the same logits from the cache, and their
# factors share cache lines.
GROUP = 32
MAX_HEAD_DIM = 256
# Arguments whose values don't matter for the code: otherwise Triton would compile it again for a length of 1, or one
# divisible by 16.
SIZES = ["num_blocks", "heads_per_sentence", "length"]


def key_spans(visible: Tensor) -> Tensor:
    """For each block of `BLOCK_ROWS` rows, the first key that any of its rows sees, and one past the last.

    visible: (batch, 1, length, length), bool; every row sees at least one key. Returns: (batch, blocks, 2), int32.
    """
    batch, _, length, _ = visible.shape
    num_blocks = -(-length // BLOCK_ROWS)
    rows = visible.new_zeros(batch, num_blocks * BLOCK_ROWS, length)
    rows[:, :length] = visible[:, 0]
    seen = rows.view(batch, num_blocks, BLOCK_ROWS, length).any(2).int()
    return torch.stack([seen.argmax(-1), length - seen.flip(-1).argmax(-1)], -1).int()


def padded_length(length: int) -> int:
    """The next multiple of `BLOCK_ROWS`, to which rows are padded for loads without masks."""
    return -(-length // BLOCK_ROWS) * BLOCK_ROWS


def squared_changes(
    logits: Tensor,
    centred_value: Tensor,
    weight: Tensor,
    factors: Sequence[Tensor],
    spans: Tensor,
    chosen: Tensor | None = None,
    growths: Sequence[Tensor] = (),
    softcap: float | None = None,
) -> Tensor:
    """`sum_i weight_i ||sum_j (softmax_j(S_ij r_i s_j - a_i b_j - c_i d_j) - softmax_j(S_ij)) v_j||^2` for each neuron.

    With a `softcap`, the argument z of each softmax is replaced by `softcap * tanh(z / softcap)`.

    Args:
        logits: S, (heads, length, length), float32, -inf where a query doesn't see a key. Every row sees at least one
            key.
        centred_value: v, (heads, length, head_dim), float32; head_dim at most `MAX_HEAD_DIM`.
        weight: (heads, length), float32; rows of weight 0 are skipped, whatever they hold.
        factors: a, b, c and d, (heads, length, neurons of a head), float32.
        spans: `key_spans` of the sentences; the heads of a sentence are consecutive.
        chosen: (heads, neurons of a head), bool, which neurons to compute; all by default.
        growths: r and s, positive, shaped like the factors; all 1 by default.

    Returns: (heads, neurons of a head), float32, the same in every run; zero where not chosen.
    """
    num_heads, length, head_dim = centred_value.shape
    num_neurons, num_blocks = factors[0].shape[2], spans.shape[1]
    chosen = torch.ones_like(factors[0][:, 0], dtype=torch.bool) if chosen is None else chosen
    parts = logits.new_zeros(num_heads, num_neurons, num_blocks)
    # Rows of whole blocks of keys load in vectors, without a mask; a mask would double the instructions at odd lengths.
    missing = -length % BLOCK_KEYS
    logits = functional.pad(logits, (0, missing), value=-torch.inf) if missing else logits
    with torch.cuda.device_of(logits):
        _squared_changes[launch_grid(num_heads, num_neurons, num_blocks)](
            parts,
            *(it.contiguous() for it in (logits, centred_value, weight, *factors, *(growths or factors[:2]))),
            spans,
            chosen.contiguous(),
            num_blocks,
            num_heads // len(spans),
            length,
            length + missing,
            softcap or 1.0,
            **launch_options(head_dim, num_neurons, bool(growths), softcap is not None),
        )
    return parts.sum(2)


def launch_grid(num_heads: int, num_neurons: int, num_blocks: int) -> tuple[int]:
    """A kernel's grid: one program for each group of a head's neurons and block of rows."""
    return (num_heads * triton.cdiv(num_neurons, GROUP) * num_blocks,)


def block_dim(head_dim: int) -> int:
    """The size to which heads are padded for the tensor cores."""
    return max(16, triton.next_power_of_2(head_dim))


def launch_options(
    head_dim: int, num_neurons: int, grows: bool = False, capped: bool = False
) -> dict[str, int | float | bool]:
    """Compile-time options of the kernel for a head's size and number of neurons.

    grows, capped: how logits change.
    """
    return {
        "HEAD_DIM": head_dim,
        "NUM_NEURONS": num_neurons,
        "BLOCK_DIM": block_dim(head_dim),
        "BLOCK_ROWS": BLOCK_ROWS,
        "BLOCK_KEYS": BLOCK_KEYS,
        "GROUP": GROUP,
        "GROWS": grows,
        "CAPPED": capped,
        "num_warps": 4 if head_dim <= 64 else 8,
        "num_stages": NUM_STAGES,
        # When fused with a subtraction, one of two equal products isn't rounded, so their difference isn't zero.
        "enable_fp_fusion": False,
    }


if triton is not None:

    @triton.jit
    def program_part(
        weight, spans, num_blocks, heads_per_sentence, length, NUM_NEURONS: tl.constexpr, BLOCK_ROWS: tl.constexpr,
        BLOCK_KEYS: tl.constexpr, GROUP: tl.constexpr,
    ):  # fmt: skip
        """Returns a program's share: head, block, rows and their weights, ranges of keys and of neurons."""
        block = tl.program_id(0) % num_blocks
        group = tl.program_id(0) // num_blocks
        groups = tl.cdiv(NUM_NEURONS, GROUP)
        # In 64 bits, as are all offsets derived from it.
        head = (group // groups).to(tl.int64)
        rows = block * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
        row_weight = tl.load(weight + head * length + rows, mask=rows < length, other=0.0)
        span = spans + (head // heads_per_sentence * num_blocks + block) * 2
        # The first key is a multiple of the block size, so that loads are aligned.
        first = tl.load(span) // BLOCK_KEYS * BLOCK_KEYS
        last = tl.where(tl.max(row_weight) > 0, tl.load(span + 1), first)
        start = group % groups * GROUP
        return head, block, rows, row_weight, first, last, start, tl.minimum(start + GROUP, NUM_NEURONS)

    @triton.jit
    def tanh(z):
        """Hyperbolic tangent, off by less than six epsilons of the result.

        Near zero a quotient of exponentials would lose digits, so a series is used there.
        """
        square = z * z
        # Taylor series up to z^13.
        inner = -17 / 315 + square * (62 / 2835 + square * (-1382 / 155925 + square * (21844 / 6081075)))
        near = z + z * square * (-1 / 3 + square * (2 / 15 + square * inner))
        decay = tl.exp(-2 * tl.abs(z))
        far = (1 - decay) / (1 + decay)
        return tl.where(square < 0.125, near, tl.where(z < 0, -far, far))

    @triton.jit
    def _with_keys(logits, highest, total):
        """Includes a block of keys in its rows' largest logits and sums of exponentials."""
        higher = tl.maximum(highest, tl.max(logits, 1))
        # A row that has seen no key so far has only -inf, and -inf minus -inf is NaN.
        shift = tl.where(higher == float("-inf"), 0.0, higher)
        return higher, total * tl.exp(highest - shift) + tl.sum(tl.exp(logits - shift[:, None]), 1)

    @triton.jit
    def _weights(logits, highest, total):
        """Attention weights, zero in skipped rows."""
        shift = tl.where(highest == float("-inf"), 0.0, highest)
        return tl.exp(logits - shift[:, None]) * (1 / tl.where(total == 0, 1.0, total))[:, None]

    @triton.jit
    def _both_logits(
        logits, b, d, s, left_a, left_c, left_r, row_offsets, row_mask, keys, length, softcap,
        NUM_NEURONS: tl.constexpr, GROWS: tl.constexpr, CAPPED: tl.constexpr,
    ):  # fmt: skip
        """A block of logits, unchanged and changed, both as the softmax sees them."""
        key_mask = keys < length
        before = tl.load(logits + row_offsets[:, None] + keys[None, :], mask=row_mask[:, None], other=float("-inf"))
        places = keys * NUM_NEURONS
        right_b = tl.load(b + places, mask=key_mask, other=0.0)
        right_d = tl.load(d + places, mask=key_mask, other=0.0)
        after = before
        if GROWS:
            after = before * left_r[:, None] * tl.load(s + places, mask=key_mask, other=1.0)[None, :]
        after = after - left_a[:, None] * right_b[None, :] - left_c[:, None] * right_d[None, :]
        hidden = before == float("-inf")
        if CAPPED:
            before = tl.where(hidden, before, softcap * tanh(before / softcap))
            after = softcap * tanh(after / softcap)
        return before, tl.where(hidden, before, after)

    @triton.jit(do_not_specialize=SIZES)
    def _squared_changes(
        parts, logits, value, weight, a, b, c, d, r, s, spans, chosen, num_blocks, heads_per_sentence, length, padded,
        softcap, HEAD_DIM: tl.constexpr, NUM_NEURONS: tl.constexpr, BLOCK_DIM: tl.constexpr, BLOCK_ROWS: tl.constexpr,
        BLOCK_KEYS: tl.constexpr, GROUP: tl.constexpr, GROWS: tl.constexpr, CAPPED: tl.constexpr,
    ):  # fmt: skip
        head, block, rows, row_weight, first, last, start, stop = program_part(
            weight, spans, num_blocks, heads_per_sentence, length, NUM_NEURONS, BLOCK_ROWS, BLOCK_KEYS, GROUP
        )
        logits += head * length * padded
        value += head * length * HEAD_DIM
        row_mask = row_weight != 0
        row_offsets = rows.to(tl.int64) * padded
        columns = tl.arange(0, BLOCK_DIM)
        for place in range(start, stop):
            neuron = head * NUM_NEURONS + place
            if tl.load(chosen + neuron):
                # A neuron's factors are a column of (length, neurons).
                offset = head * length * NUM_NEURONS + place
                places = offset + rows * NUM_NEURONS
                left_a = tl.load(a + places, mask=row_mask, other=0.0)
                left_c = tl.load(c + places, mask=row_mask, other=0.0)
                left_r = left_a
                if GROWS:
                    left_r = tl.load(r + places, mask=row_mask, other=1.0)
                highest = tl.full([BLOCK_ROWS], float("-inf"), tl.float32)
                total = tl.zeros([BLOCK_ROWS], tl.float32)
                changed_highest, changed_total = highest, total
                for key in range(first, last, BLOCK_KEYS):
                    before, after = _both_logits(
                        logits, b + offset, d + offset, s + offset, left_a, left_c, left_r, row_offsets, row_mask,
                        key + tl.arange(0, BLOCK_KEYS), length, softcap, NUM_NEURONS, GROWS, CAPPED,
                    )  # fmt: skip
                    highest, total = _with_keys(before, highest, total)
                    changed_highest, changed_total = _with_keys(after, changed_highest, changed_total)
                moved = tl.zeros([BLOCK_ROWS, BLOCK_DIM], tl.float32)
                for key in range(first, last, BLOCK_KEYS):
                    keys = key + tl.arange(0, BLOCK_KEYS)
                    before, after = _both_logits(
                        logits, b + offset, d + offset, s + offset, left_a, left_c, left_r, row_offsets, row_mask,
                        keys, length, softcap, NUM_NEURONS, GROWS, CAPPED,
                    )  # fmt: skip
                    change = _weights(after, changed_highest, changed_total) - _weights(before, highest, total)
                    value_mask = (keys < length)[:, None] & (columns < HEAD_DIM)[None, :]
                    values = tl.load(value + keys[:, None] * HEAD_DIM + columns[None, :], mask=value_mask, other=0.0)
                    moved = tl.dot(change, values, moved, input_precision="tf32x3")
                squares = tl.sum(moved * moved, 1) * row_weight
                tl.store(parts + neuron * num_blocks + block, tl.sum(squares))
