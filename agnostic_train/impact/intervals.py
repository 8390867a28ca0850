"""A Triton kernel that encloses the q and k impacts of all neurons in proven intervals, far cheaper than exact impacts.

Deactivating a neuron subtracts `x_ij` from the logits of query i. With `w_j = exp(-x_ij)` and the attention A_i, the
output moves by exactly `sum_j A_ij (w_j - 1) (v_j - o_i) / sum_j A_ij w_j`, and adding a constant to a row of x changes
nothing. Small changes give small terms, which half precision represents with the same relative error as large ones. So
the products with the values run on the fastest tensor cores, in one pass over the keys with one exponential per logit;
the exact form needs two passes, four exponentials, and three products at half the speed.

The kernel accumulates bounds on the effects of rounding, which makes the intervals certain:

- Half precision rounds each term and each value by at most 2^-11 of itself. A row's sum is therefore off by at most
  2^-10 of `E_i = sum_j A_ij |w_j - 1|` times the norm of the longest value (scaled to 1), plus 2^-25 for each term too
  small for half precision, plus `n 2^-23` of the sum of n terms.
- Float32 rounds logits and their changes, here and in the exact form, by a fraction of their size: the exact form
  subtracts from a logit twice, and multiplies it twice where it grows. This causes a relative error of the weights
  `A_ij w_j`, which sum to at most `1 + E_i`. A sum's error is less than its worst case: it grows about as the square
  root of the number of terms.
- A soft cap bends x: `tanh(u) - tanh(u - y) = t (1 - T^2) / (1 - T t)` with `t = tanh(y)` and `T = tanh(u)`. The error
  of this is a fraction of y that grows with `1 / (1 - T)`, so the largest T decides.
- Where a change is so large that a weight which float32 rounded to zero could matter, the upper end is infinite.

The intervals are narrow only if terms are small, so x, v and the logits are first centred at their averages under the
rows' attention.
"""

from collections.abc import Sequence
from math import e, log2

import torch
from torch import Tensor
from torch.nn import functional

from agnostic_train.impact import kernels
from agnostic_train.impact.kernels import BLOCK_ROWS, launch_grid, triton

if triton is not None:
    import triton.language as tl

    from agnostic_train.impact.kernels import program_part, tanh

# Half precision loses digits below 6e-5, so terms are scaled up. Above 255 they overflow: an infinite upper end.
_SCALE = 256.0
_HALF = 2.0**-10 * (1 + 2.0**-10)
_EPS = torch.finfo(torch.float32).eps
_SMALLEST_VALUE = 1e-12


def squared_intervals(
    logits: Tensor,
    attention: Tensor,
    value: Tensor,
    weight: Tensor,
    factors: Sequence[Tensor],
    spans: Tensor,
    largest_logit: Tensor,
    growths: Sequence[Tensor] = (),
    softcap: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Lower and upper ends of an interval around each neuron's `kernels.squared_changes`.

    Args:
        logits: the softmax's input: capped if there is a `softcap`.
        attention: A, the softmax of the logits.
        value: not necessarily centred.
        largest_logit: (heads,), an upper bound on the absolute value of each head's visible logits, before a cap.
        growths: r and s, here at least 1; not supported together with a `softcap`.
        Other arguments: as for `squared_changes`.

    Returns: lower and upper ends, both (heads * neurons of a head,), float32. The upper ends may be infinite.
    """
    num_heads, length, head_dim = value.shape
    per_head = len(factors[0]) // num_heads
    # The mean attention of the counted rows: (heads, 1, length).
    attended = (weight / weight.sum(1, keepdim=True).clamp(min=1)).unsqueeze(1) @ attention

    def centre(part: Tensor) -> Tensor:
        return (part.view(num_heads, per_head, length) @ attended.mT).flatten()

    value = value - attended @ value
    longest = torch.linalg.vector_norm(value, dim=-1).amax(1).clamp(min=torch.finfo(value.dtype).tiny)
    value = (value / longest[:, None, None]).half()
    assert not (growths and softcap)
    # How often a logit is rounded, here and in the exact form together, each time by half an epsilon of its size. A
    # hyperbolic tangent is off by up to twelve roundings, and each logit passes through three, one of them torch's.
    num_roundings = 5 if growths else 38 if softcap else 2
    rounding = _EPS / 2 * (32 + 4 * length**0.5 + length / 8 + num_roundings * largest_logit)
    change_rounding = torch.full_like(rounding, 4 * _EPS)
    # Placeholders: without growths or a cap, the kernel doesn't read these arguments.
    read_logits, growth = attention, [attention] * 4
    if growths or softcap:
        visible_logits = logits.masked_fill(logits == -torch.inf, 0)
        read_logits = _padded(visible_logits)
    if growths:
        growth = [*growths, centre(growths[1]), (attention * visible_logits).sum(-1)]
    if softcap:
        # The cancellation in `1 - T t` (see the kernel) at the largest T.
        change_rounding = 40 * _EPS / (1 - visible_logits.abs().amax((1, 2)) / softcap).clamp(min=0)
    attention = _padded(attention)
    ends = logits.new_zeros(2, len(factors[0]), spans.shape[1])
    with torch.cuda.device_of(logits):
        _squared_intervals[launch_grid(num_heads, per_head, spans)](
            *ends,
            *(it.contiguous() for it in (attention, value, weight, *factors)),
            centre(factors[1]),
            centre(factors[3]),
            *(it.contiguous() for it in (read_logits, *growth)),
            longest,
            largest_logit,
            rounding,
            change_rounding,
            spans,
            num_heads // len(spans),
            per_head,
            length,
            attention.shape[-1],
            softcap or 1.0,
            **launch_options(head_dim, bool(growths), softcap is not None),
        )
    low, high = ends.sum(-1).view(2, num_heads, per_head)
    # With tiny values, the squared changes may underflow.
    unknown = high.isnan() | (longest < _SMALLEST_VALUE).unsqueeze(1)
    return torch.where(low.isnan() | unknown, 0, low).flatten(), torch.where(unknown, torch.inf, high).flatten()


def _padded(matrices: Tensor) -> Tensor:
    """Pads rows and columns with zeros to a multiple of `BLOCK_ROWS`, so that the kernel needs no mask for them."""
    missing = -matrices.shape[-1] % BLOCK_ROWS
    return functional.pad(matrices, (0, missing, 0, missing)) if missing else matrices


def launch_options(head_dim: int, grows: bool = False, capped: bool = False) -> dict[str, int | float | bool]:
    """Compile-time options of the kernel for a head size; `grows` and `capped` say how logits change."""
    constants = {"SCALE": _SCALE, "HALF": _HALF, "EPS": _EPS, "LOG2_E": log2(e)}
    return kernels.launch_options(head_dim, grows, capped) | constants | {"enable_fp_fusion": True}


if triton is not None:

    @triton.jit
    def _squared_intervals(
        lows, highs, attention, value, weight, a, b, c, d, centre_b, centre_d, logits, r, s, centre_s,
        mean_logit, longest, largest_logits, rounding, change_rounding, spans, heads_per_sentence, neurons_per_head,
        length, padded, softcap, HEAD_DIM: tl.constexpr, BLOCK_DIM: tl.constexpr, BLOCK_ROWS: tl.constexpr,
        BLOCK_KEYS: tl.constexpr, GROUP: tl.constexpr, GROWS: tl.constexpr, CAPPED: tl.constexpr, SCALE: tl.constexpr,
        HALF: tl.constexpr, EPS: tl.constexpr, LOG2_E: tl.constexpr,
    ):  # fmt: skip
        head, rows, row_weight, first, last, start, stop = program_part(
            weight, spans, heads_per_sentence, neurons_per_head, length, BLOCK_ROWS, BLOCK_KEYS, GROUP
        )
        attention += head * padded * padded
        logits += head * padded * padded
        value += head * length * HEAD_DIM
        row_mask = row_weight != 0
        row_offsets = rows.to(tl.int64) * padded
        columns = tl.arange(0, BLOCK_DIM)
        largest_value = tl.load(longest + head)
        largest_logit = tl.load(largest_logits + head)
        own_rounding = tl.load(rounding + head)
        by_change = tl.load(change_rounding + head)
        row_mean = row_weight
        if GROWS:
            row_mean = tl.load(mean_logit + head * length + rows, mask=row_mask, other=0.0)
        scale = row_weight * largest_value * largest_value
        # The unchanged output, by the same kind of product as `moved`, so that both have the same register layout.
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
        for place in range(start, stop):
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
            if CAPPED:
                row_shift = softcap * tanh((left_a * middle_b + left_c * middle_d) / softcap)
            # As powers of two, so that the exponential is one instruction.
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
                whole_b = tl.load(b + offset + keys, mask=key_mask, other=middle_b)
                whole_d = tl.load(d + offset + keys, mask=key_mask, other=middle_d)
                right_b = whole_b - middle_b
                right_d = whole_d - middle_d
                if CAPPED:
                    # tanh(u) - tanh(u - y) = t (1 - T^2) / (1 - T t), with T = tanh(u) and t = tanh(y).
                    before = tl.load(logits + row_offsets[:, None] + keys[None, :]) / softcap
                    bent = tanh((left_a[:, None] * whole_b[None, :] + left_c[:, None] * whole_d[None, :]) / softcap)
                    bent *= softcap * (1 - before * before) / (1 - before * bent)
                    power = (row_shift[:, None] - bent) * LOG2_E
                else:
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
            # Upper bounds on the change of the logits: centred, as here, and uncentred, as in the exact form.
            size_a = tl.abs(left_a)
            size_c = tl.abs(left_c)
            centred = size_a * tl.max(largest_b) + size_c * tl.max(largest_d)
            reach = centred + size_a * tl.abs(middle_b) + size_c * tl.abs(middle_d)
            if GROWS:
                growth = largest_logit * (left_r * tl.max(largest_s) - 1) + tl.abs(row_shift)
                centred += growth
                reach += growth
            if CAPPED:
                # A cap shrinks each change by a different factor: bound the uncentred change and its shift separately.
                centred = reach + tl.abs(row_shift)
            error = (own_rounding + by_change * reach) * (1 + spread)
            narrow = error + (spread + tl.abs(total) * (1 / SCALE)) * by_half + least
            inverse = 1 / (1 + total * (1 / SCALE))
            error *= inverse
            # Below exp(60), a weight under 2^-126 (float32's smallest normal) is negligible. Sums may have overflowed.
            certain = (centred < 60) & (inverse > 0) & (error < 0.5) & (distance < float("inf"))
            low = tl.maximum(distance - narrow, 0) * inverse * (1 - error)
            high = (distance + narrow) * inverse * (1 + 2 * error)
            # An uncertain row must not raise the lower end, whatever its sums are.
            low = tl.where(certain, low * low * scale, 0)
            high = tl.where(certain, high * high, float("inf"))
            high = tl.where(row_mask, high * scale, 0)
            end = neuron * tl.num_programs(1) + tl.program_id(1)
            tl.store(lows + end, tl.sum(low))
            tl.store(highs + end, tl.sum(high))
