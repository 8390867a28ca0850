"""A Triton kernel for intervals around the q and k impacts of all neurons, at a fraction of what exact ones cost.

Deactivating a neuron takes `x_ij` from query i's logits. With `w_j = exp(-x_ij)` and the attention A_i, the output moves by
exactly `sum_j A_ij (w_j - 1) (v_j - o_i) / sum_j A_ij w_j`, whatever constant is added to a row of x. Where x is small, so
is each term, and half precision keeps as many digits of it as of any other number: the products with the values run on
the tensor cores' fastest units, in one pass over the keys and with one exponential a logit, where the exact form needs two
passes, four exponentials and three products of half their speed.

What rounding can do is added up on the way, so that the intervals are certain:

- A term and a value each lose at most a part 2^-11 in half precision, so a row's sum at most 2^-10 of
  `E_i = sum_j A_ij |w_j - 1|` times the largest value, which is 1 here; what is too small for half precision loses at
  most 2^-25 a term; and the sum of n terms a part n 2^-23.
- Logits and their changes, in float32, here and in the exact form: a part of their size, which becomes a part of the
  weights `A_ij w_j`, whose sum is at most `1 + E_i`.
- Where a change could be so large that a weight that was zero in float32 isn't any more, the interval has no upper end.

x, v and the logits are centred first, on what the rows attend to on average: small terms are what this lives by.
"""

from collections.abc import Sequence
from math import e, log2

import torch
from torch import Tensor
from torch.nn import functional

from agnostic_train.impact.kernels import BLOCK_ROWS, GROUP, launch_grid, triton

if triton is not None:
    import triton.language as tl

# A block's keys; `BLOCK_ROWS` is a multiple of it.
BLOCK_KEYS, NUM_STAGES = 32, 2
# Half precision has few digits below 6e-5; terms beyond 255 would overflow, and leave the interval without an upper end.
_SCALE = 256.0
_HALF = 2.0**-10 * (1 + 2.0**-10)
_EPS = torch.finfo(torch.float32).eps


def squared_intervals(
    logits: Tensor,
    attention: Tensor,
    value: Tensor,
    weight: Tensor,
    factors: Sequence[Tensor],
    spans: Tensor,
    largest_logit: Tensor,
    growths: Sequence[Tensor] = (),
) -> tuple[Tensor, Tensor]:
    """Between what two numbers each neuron's `kernels.squared_changes` lies.

    Args:
        attention: A, the softmax of the logits.
        largest_logit: (heads,), at least the largest absolute value of each head's visible logits.
    Others as for `squared_changes`.

    Returns: lower and upper ends, both (heads * neurons of a head,), float32. The upper ones may be infinite.
    """
    num_heads, length, head_dim = value.shape
    per_head = len(factors[0]) // num_heads
    # What the counted rows attend to on average: (heads, 1, length).
    attended = (weight / weight.sum(1, keepdim=True).clamp(min=1)).unsqueeze(1) @ attention

    def centre(part: Tensor) -> Tensor:
        return (part.view(num_heads, per_head, length) @ attended.mT).flatten()

    value = value - attended @ value
    longest = torch.linalg.vector_norm(value, dim=-1).amax(1).clamp(min=torch.finfo(value.dtype).tiny)
    value = (value / longest[:, None, None]).half()
    growth: list[Tensor] = []
    if growths:
        visible_logits = logits.masked_fill(logits == -torch.inf, 0)
        mean_logit = (attention * visible_logits).sum(-1)
        growth = [_padded(visible_logits), *growths, centre(growths[1]), mean_logit]
    attention = _padded(attention)
    ends = logits.new_zeros(2, len(factors[0]), spans.shape[1])
    with torch.cuda.device_of(logits):
        _squared_intervals[launch_grid(num_heads, per_head, spans)](
            *ends,
            *(it.contiguous() for it in (attention, value, weight, *factors)),
            centre(factors[1]),
            centre(factors[3]),
            *(growth or (attention,) * 5),
            longest,
            largest_logit,
            _EPS / 2 * (32 + 4 * length**0.5 + largest_logit),
            spans,
            num_heads // len(spans),
            per_head,
            length,
            attention.shape[-1],
            **launch_options(head_dim, bool(growths)),
        )
    low, high = ends.sum(-1)
    return torch.where(low.isnan(), 0, low), torch.where(high.isnan(), torch.inf, high)


def _padded(matrices: Tensor) -> Tensor:
    """With rows and columns of zeros up to a multiple of `BLOCK_ROWS`: the kernel needn't ask where they end."""
    missing = -matrices.shape[-1] % BLOCK_ROWS
    return functional.pad(matrices, (0, missing, 0, missing)) if missing else matrices


def launch_options(head_dim: int, grows: bool = False) -> dict[str, int | bool]:
    """What the kernel is compiled with for heads of a size."""
    block_dim = max(16, triton.next_power_of_2(head_dim))
    return {
        "HEAD_DIM": head_dim,
        "BLOCK_DIM": block_dim,
        "BLOCK_ROWS": BLOCK_ROWS,
        "BLOCK_KEYS": BLOCK_KEYS,
        "GROUP": GROUP,
        "GROWS": grows,
        "SCALE": _SCALE,
        "HALF": _HALF,
        "EPS": _EPS,
        "LOG2_E": log2(e),
        "num_warps": 4 if block_dim <= 64 else 8,
        "num_stages": NUM_STAGES,
    }


if triton is not None:

    @triton.jit
    def _squared_intervals(
        lows, highs, attention, value, weight, a, b, c, d, centre_b, centre_d, logits, r, s, centre_s,
        mean_logit, longest, largest_logits, rounding, spans, heads_per_sentence, neurons_per_head, length, padded,
        HEAD_DIM: tl.constexpr, BLOCK_DIM: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_KEYS: tl.constexpr,
        GROUP: tl.constexpr, GROWS: tl.constexpr, SCALE: tl.constexpr, HALF: tl.constexpr, EPS: tl.constexpr,
        LOG2_E: tl.constexpr,
    ):  # fmt: skip
        groups = tl.cdiv(neurons_per_head, GROUP)
        # All offsets that follow from it have 64 bits too.
        head = (tl.program_id(0) // groups).to(tl.int64)
        block = tl.program_id(1)
        attention += head * padded * padded
        logits += head * padded * padded
        value += head * length * HEAD_DIM
        rows = block * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
        row_weight = tl.load(weight + head * length + rows, mask=rows < length, other=0.0)
        row_mask = row_weight != 0
        row_offsets = rows.to(tl.int64) * padded
        columns = tl.arange(0, BLOCK_DIM)
        largest_value = tl.load(longest + head)
        largest_logit = tl.load(largest_logits + head)
        own_rounding = tl.load(rounding + head)
        row_mean = row_weight
        if GROWS:
            row_mean = tl.load(mean_logit + head * length + rows, mask=row_mask, other=0.0)
        span = spans + (head // heads_per_sentence * tl.num_programs(1) + block) * 2
        # From a multiple of the block on, so that loads are aligned.
        first = tl.load(span) // BLOCK_KEYS * BLOCK_KEYS
        last = tl.where(tl.max(row_weight) > 0, tl.load(span + 1), first)
        scale = row_weight * largest_value * largest_value
        # The attention's own output, by the same product, so that both are in the same registers.
        outputs = tl.zeros([BLOCK_ROWS, BLOCK_DIM], tl.float32)
        for key in range(first, last, BLOCK_KEYS):
            keys = key + tl.arange(0, BLOCK_KEYS)
            seen = tl.load(attention + row_offsets[:, None] + keys[None, :]) * SCALE
            value_mask = (keys < length)[:, None] & (columns < HEAD_DIM)[None, :]
            values = tl.load(value + keys[:, None] * HEAD_DIM + columns[None, :], mask=value_mask, other=0.0)
            outputs = tl.dot(seen.to(tl.float16), values, outputs)
        outputs *= 1 / SCALE
        by_half = HALF + (last - first) * EPS
        least = (last - first + HEAD_DIM) * (EPS / 4 / SCALE)
        start = tl.program_id(0) % groups * GROUP
        for place in range(start, tl.minimum(start + GROUP, neurons_per_head)):
            neuron = head * neurons_per_head + place
            offset = neuron * length
            middle_b = tl.load(centre_b + neuron)
            middle_d = tl.load(centre_d + neuron)
            left_a = tl.load(a + offset + rows, mask=row_mask, other=0.0)
            left_c = tl.load(c + offset + rows, mask=row_mask, other=0.0)
            left_r = left_a
            row_shift = left_a
            if GROWS:
                left_r = tl.load(r + offset + rows, mask=row_mask, other=1.0)
                row_shift = row_mean * (left_r * tl.load(centre_s + neuron) - 1)
            # Of powers of two, so that the exponential is one instruction.
            power_a = left_a * -LOG2_E
            power_c = left_c * -LOG2_E
            largest_b = tl.zeros([BLOCK_KEYS], tl.float32)
            largest_d = tl.zeros([BLOCK_KEYS], tl.float32)
            largest_s = tl.full([BLOCK_KEYS], 1.0, tl.float32)
            terms = tl.zeros([BLOCK_ROWS, BLOCK_KEYS], tl.float32)
            sizes = tl.zeros([BLOCK_ROWS, BLOCK_KEYS], tl.float32)
            moved = tl.zeros([BLOCK_ROWS, BLOCK_DIM], tl.float32)
            for key in range(first, last, BLOCK_KEYS):
                keys = key + tl.arange(0, BLOCK_KEYS)
                key_mask = keys < length
                seen = tl.load(attention + row_offsets[:, None] + keys[None, :]) * SCALE
                right_b = tl.load(b + offset + keys, mask=key_mask, other=middle_b) - middle_b
                right_d = tl.load(d + offset + keys, mask=key_mask, other=middle_d) - middle_d
                power = power_a[:, None] * right_b[None, :] + power_c[:, None] * right_d[None, :]
                if GROWS:
                    right_s = tl.load(s + offset + keys, mask=key_mask, other=1.0)
                    before = tl.load(logits + row_offsets[:, None] + keys[None, :])
                    grown = before * (left_r[:, None] * right_s[None, :] - 1) - row_shift[:, None]
                    power += grown * LOG2_E
                    largest_s = tl.maximum(largest_s, right_s)
                term = tl.exp2(power) * seen - seen
                terms += term
                sizes += tl.abs(term)
                largest_b = tl.maximum(largest_b, tl.abs(right_b))
                largest_d = tl.maximum(largest_d, tl.abs(right_d))
                value_mask = key_mask[:, None] & (columns < HEAD_DIM)[None, :]
                values = tl.load(value + keys[:, None] * HEAD_DIM + columns[None, :], mask=value_mask, other=0.0)
                moved = tl.dot(term.to(tl.float16), values, moved)
            total = tl.sum(terms, 1)
            spread = tl.sum(sizes, 1) * (1 / SCALE)
            moved -= total[:, None] * outputs
            distance = tl.sqrt(tl.sum(moved * moved, 1)) * (1 / SCALE)
            # How far the logits move at most: centred, as here, and as in the exact form.
            size_a = tl.abs(left_a)
            size_c = tl.abs(left_c)
            centred = size_a * tl.max(largest_b) + size_c * tl.max(largest_d)
            reach = centred + size_a * tl.abs(middle_b) + size_c * tl.abs(middle_d)
            if GROWS:
                growth = largest_logit * (left_r * tl.max(largest_s) - 1) + tl.abs(row_shift)
                centred += growth
                reach += growth
            error = (own_rounding + 3 * EPS * reach) * (1 + spread)
            narrow = error + (spread + tl.abs(total) * (1 / SCALE)) * by_half + least
            inverse = 1 / (1 + total * (1 / SCALE))
            error *= inverse
            # 2^-126 is the smallest weight that float32 keeps all digits of; a sum may have overflowed.
            certain = (centred < 60) & (inverse > 0) & (error < 0.5) & (distance < float("inf"))
            low = tl.maximum(distance - narrow, 0) * inverse * (1 - error)
            high = (distance + narrow) * inverse * (1 + 2 * error)
            # A row that isn't certain must not raise the lower end, whatever became of its sums.
            low = tl.where(certain, low * low * scale, 0)
            high = tl.where(certain, high * high, float("inf"))
            high = tl.where(row_mask, high * scale, 0)
            end = neuron * tl.num_programs(1) + block
            tl.store(lows + end, tl.sum(low))
            tl.store(highs + end, tl.sum(high))
