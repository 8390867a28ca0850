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

A program computes many neurons for the same rows. If the sentence is short enough, it keeps the rows' attention in
registers, laid out as the tensor cores leave their products, and the values in shared memory. All that a neuron then
reads are its four factors, and its terms are an operand of the next product where they are computed. Otherwise
attention and values are read again for each neuron.
"""

from collections.abc import Sequence
from math import e, log2

import torch
from torch import Tensor
from torch.nn import functional

from agnostic_train.impact import kernels
from agnostic_train.impact.kernels import padded_length, triton

if triton is not None:
    import triton.language as tl

    from agnostic_train.impact.kernels import program_part, tanh

# Half precision loses digits below 6e-5, so terms are scaled up. Above 255 they overflow: an infinite upper end.
_SCALE = 256.0
_HALF = 2.0**-10 * (1 + 2.0**-10)
_EPS = torch.finfo(torch.float32).eps
_SMALLEST_VALUE = 1e-12
GROUP = 32
# How many blocks of keys a program may keep, and the largest heads for which this is faster: on Hopper, hardly any
# register spills up to these sizes. Ampere's tensor cores need their operands in another layout than their results.
_KEPT, _LARGEST_KEPT_HEAD, _LARGEST_KEPT_HEAD_ELSEWHERE = (2, 4, 8), 128, 64


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
        return (part[:, :length].view(num_heads, per_head, length) @ attended.mT).flatten()

    value = value - attended @ value
    longest = torch.linalg.vector_norm(value, dim=-1).amax(1).clamp(min=torch.finfo(value.dtype).tiny)
    value = (value / longest[:, None, None]).half()
    assert not (growths and softcap)
    # In halves of an epsilon: the attention's layout costs 16 and the exponential a few. How often a logit is rounded,
    # here and in the exact form together, each time by half an epsilon of its size: a hyperbolic tangent is off by up
    # to twelve roundings, and each logit passes through three, one of them torch's.
    num_roundings = 5 if growths else 38 if softcap else 2
    rounding = _EPS / 2 * (48 + 4 * length**0.5 + length / 8 + num_roundings * largest_logit)
    change_rounding = torch.full_like(rounding, 8 * _EPS)
    # Placeholders: without growths or a cap, the kernel doesn't read these arguments.
    read_logits, growth = attention, [attention] * 5
    if growths or softcap:
        visible_logits = logits.masked_fill(logits == -torch.inf, 0)
        read_logits = _padded(visible_logits)
    if growths:
        mean_logit = (attention * visible_logits).sum(-1)
        r, s = (_padded_rows(growth, length) for growth in growths)
        growth = [r, s, centre(s), s.amax(1), mean_logit]
    if softcap:
        # The cancellation in `1 - T t` (see the kernel) at the largest T.
        change_rounding = 44 * _EPS / (1 - visible_logits.abs().amax((1, 2)) / softcap).clamp(min=0)
    attention = _padded(attention)
    factors = [_padded_rows(factor, length) for factor in factors]
    middle_b, middle_d = centre(factors[1]), centre(factors[3])
    num_blocks = spans.shape[1]
    ends = logits.new_zeros(len(factors[0]), num_blocks, 2)
    with torch.cuda.device_of(logits):
        _squared_intervals[kernels.launch_grid(num_heads, per_head, num_blocks, GROUP)](
            ends,
            *(it.contiguous() for it in (attention, _padded_values(value), weight, *factors)),
            middle_b,
            middle_d,
            _reach(factors[1], middle_b),
            _reach(factors[3], middle_d),
            *(it.contiguous() for it in (read_logits, *growth)),
            longest,
            largest_logit,
            rounding,
            change_rounding,
            spans,
            num_blocks,
            num_heads // len(spans),
            per_head,
            length,
            attention.shape[-1],
            softcap or 1.0,
            **launch_options(head_dim, length, bool(growths), softcap is not None, _is_hopper(logits.device)),
        )
    low, high = ends.sum(1).view(num_heads, per_head, 2).unbind(-1)
    # With tiny values, the squared changes may underflow.
    unknown = high.isnan() | (longest < _SMALLEST_VALUE).unsqueeze(1)
    return torch.where(low.isnan() | unknown, 0, low).flatten(), torch.where(unknown, torch.inf, high).flatten()


def _reach(part: Tensor, middle: Tensor) -> Tensor:
    """How far a factor's entries get from its middle."""
    lowest, highest = part.aminmax(dim=1)
    return torch.maximum(highest - middle, middle - lowest)


def _padded(matrices: Tensor) -> Tensor:
    """Pads rows and columns with zeros to `padded_length`, so that the kernel needs no mask for them."""
    missing = padded_length(matrices.shape[-1]) - matrices.shape[-1]
    return functional.pad(matrices, (0, missing, 0, missing)) if missing else matrices


def _padded_rows(rows: Tensor, length: int) -> Tensor:
    """Pads each of the rows with zeros to `padded_length`, unless that is done already."""
    missing = padded_length(length) - rows.shape[1]
    return functional.pad(rows, (0, missing)) if missing else rows


def _padded_values(value: Tensor) -> Tensor:
    """Pads the tokens with zeros to `padded_length`, and each head to a size that tensor cores multiply."""
    _, length, head_dim = value.shape
    return functional.pad(value, (0, kernels.block_dim(head_dim) - head_dim, 0, padded_length(length) - length))


def _is_hopper(device: torch.device) -> bool:
    """Whether this is a Hopper GPU, or the interpreter, which then computes as Hopper does."""
    return device.type == "cpu" or torch.cuda.get_device_capability(device)[0] == 9


def launch_options(
    head_dim: int, length: int, grows: bool = False, capped: bool = False, hopper: bool = True
) -> dict[str, int | float | bool]:
    """Compile-time options of the kernel for a head size and a length; `grows` and `capped` say how logits change."""
    constants = {"SCALE": _SCALE, "HALF": _HALF, "EPS": _EPS, "LOG2_E": log2(e)}
    options = kernels.launch_options(head_dim, grows, capped) | constants | {"enable_fp_fusion": True}
    num_kept = 0
    if head_dim <= (_LARGEST_KEPT_HEAD if hopper else _LARGEST_KEPT_HEAD_ELSEWHERE) and not (grows or capped):
        num_kept = next((it for it in _KEPT if it * kernels.BLOCK_KEYS >= length), 0)
    return options | {"KEPT": num_kept, "GROUP": GROUP, "num_warps": 4 if num_kept else options["num_warps"]}


if triton is not None:

    @triton.jit
    def _pair(first, second, places, mask):
        return tl.load(first + places, mask=mask, other=0.0), tl.load(second + places, mask=mask, other=0.0)

    @triton.jit
    def _in_product_layout(matrix, identity):
        """The same matrix, exact to 2^-20, in the registers where the tensor cores leave their products.

        identity: the identity matrix, or a power of two times it.
        """
        # Of a float32 factor, the tensor cores use the first ten bits after the point.
        coarse = (matrix.to(tl.int32, bitcast=True) & -(1 << 13)).to(tl.float32, bitcast=True)
        product = tl.dot(coarse, identity, input_precision="tf32")
        return tl.dot(matrix - coarse, identity, product, input_precision="tf32")

    @triton.jit
    def _power(power_a, power_c, row_shift, right_b, right_d):
        """How the weights of a block of keys change, as a power of two."""
        return power_a[:, None] * right_b[None, :] + (power_c[:, None] * right_d[None, :] + row_shift[:, None])

    @triton.jit
    def _added(power, seen, values, moved, totals, sizes, NUM_SUMS: tl.constexpr):
        """Adds a block of keys to a neuron's sums."""
        term = tl.exp2(power) * seen - seen
        moved = tl.dot(term.to(tl.float16), values, moved)
        terms = tl.reshape(term, (term.shape[0], term.shape[1] // NUM_SUMS, NUM_SUMS))
        return moved, totals + tl.sum(terms, 1), sizes + tl.sum(tl.abs(terms), 1)

    @triton.jit
    def _squared_intervals(
        ends, attention, value, weight, a, b, c, d, middle_b, middle_d, reach_b, reach_d, logits, r, s, middle_s,
        largest_s, mean_logit, longest, largest_logits, rounding, change_rounding, spans, num_blocks,
        heads_per_sentence, neurons_per_head, length, padded, softcap, HEAD_DIM: tl.constexpr, BLOCK_DIM: tl.constexpr,
        BLOCK_ROWS: tl.constexpr, BLOCK_KEYS: tl.constexpr, GROUP: tl.constexpr, KEPT: tl.constexpr,
        GROWS: tl.constexpr, CAPPED: tl.constexpr, SCALE: tl.constexpr, HALF: tl.constexpr, EPS: tl.constexpr,
        LOG2_E: tl.constexpr,
    ):  # fmt: skip
        head, block, rows, row_weight, first, last, start, stop = program_part(
            weight, spans, num_blocks, heads_per_sentence, neurons_per_head, length, BLOCK_ROWS, BLOCK_KEYS, GROUP
        )
        attention += head * padded * padded
        logits += head * padded * padded
        value += head * padded * BLOCK_DIM
        row_mask = row_weight != 0
        row_places = rows.to(tl.int64)[:, None] * padded
        columns = tl.arange(0, BLOCK_DIM)
        block_keys = tl.arange(0, BLOCK_KEYS)
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
        # Number of partial sums of a row that need no exchange between threads.
        NUM_SUMS: tl.constexpr = 8 if KEPT else BLOCK_KEYS
        # If few enough, all keys stay in registers and shared memory for all neurons of the program.
        kept_seen = ()
        kept_values = ()
        if KEPT:
            identity = tl.where(block_keys[:, None] == block_keys[None, :], SCALE, 0.0)
            for place in tl.static_range(KEPT):
                keys = place * BLOCK_KEYS + block_keys
                exists = place * BLOCK_KEYS < padded
                seen = tl.load(attention + row_places + keys[None, :], mask=exists, other=0.0)
                values = tl.load(value + keys[:, None] * BLOCK_DIM + columns[None, :], mask=exists, other=0.0)
                kept_seen += (_in_product_layout(seen, identity),)  # type: ignore[assignment]
                kept_values += (values,)  # type: ignore[assignment]
                outputs = tl.dot(kept_seen[place].to(tl.float16), values, outputs)
        else:
            for key in range(first, last, BLOCK_KEYS):
                keys = key + block_keys
                seen = tl.load(attention + row_places + keys[None, :]) * SCALE
                values = tl.load(value + keys[:, None] * BLOCK_DIM + columns[None, :])
                outputs = tl.dot(seen.to(tl.float16), values, outputs)
        outputs *= 1 / SCALE
        by_half = HALF + (last - first) * EPS
        least = (last - first + HEAD_DIM) * (EPS / 4 / SCALE)
        # What comes next is loaded while the present is computed.
        offset = (head * neurons_per_head + start) * padded
        next_b, next_d = _pair(b, d, offset + block_keys, start < stop)
        for place in range(start, stop):
            neuron = head * neurons_per_head + place
            offset = neuron * padded
            left_a, left_c = _pair(a, c, offset + rows, row_mask)
            centre_b = tl.load(middle_b + neuron)
            centre_d = tl.load(middle_d + neuron)
            # All as powers of two, so that the exponential is one instruction.
            power_a = left_a * -LOG2_E
            power_c = left_c * -LOG2_E
            row_shift = left_a * centre_b + left_c * centre_d
            left_r = left_a
            if GROWS:
                left_r = tl.load(r + offset + rows, mask=row_mask, other=1.0)
                row_shift -= row_mean * (left_r * tl.load(middle_s + neuron) - 1)
            if CAPPED:
                row_shift = softcap * tanh(row_shift / softcap)
            # Upper bounds on the change of the logits: centred, as here, and uncentred, as in the exact form.
            size_a = tl.abs(left_a)
            size_c = tl.abs(left_c)
            centred = size_a * tl.load(reach_b + neuron) + size_c * tl.load(reach_d + neuron)
            common = size_a * tl.abs(centre_b) + size_c * tl.abs(centre_d)
            reach = centred + common
            if GROWS:
                growth = 2 * largest_logit * (left_r * tl.load(largest_s + neuron) - 1)
                centred += growth
                reach += growth
            if CAPPED:
                # A cap shrinks each change by a different factor: bound the uncentred change and its shift separately.
                centred = reach + common
            # Below exp(60), a weight under 2^-126 (float32's smallest normal) is negligible.
            error = tl.where(centred < 60, own_rounding + by_change * reach, float("inf"))
            row_shift *= LOG2_E
            totals = tl.zeros([BLOCK_ROWS, NUM_SUMS], tl.float32)
            sizes = tl.zeros([BLOCK_ROWS, NUM_SUMS], tl.float32)
            moved = tl.zeros([BLOCK_ROWS, BLOCK_DIM], tl.float32)
            if KEPT:
                for part in tl.static_range(KEPT):
                    right_b, right_d = next_b, next_d
                    if part + 1 < KEPT:
                        following = offset + (part + 1) * BLOCK_KEYS
                        more = (part + 1) * BLOCK_KEYS < last
                    else:
                        following = offset + padded
                        more = place + 1 < stop
                    next_b, next_d = _pair(b, d, following + block_keys, more)
                    if (part * BLOCK_KEYS < last) & ((part + 1) * BLOCK_KEYS > first):
                        power = _power(power_a, power_c, row_shift, right_b, right_d)
                        moved, totals, sizes = _added(
                            power, kept_seen[part], kept_values[part], moved, totals, sizes, NUM_SUMS
                        )
            else:
                for key in range(first, last, BLOCK_KEYS):
                    keys = key + block_keys
                    seen = tl.load(attention + row_places + keys[None, :]) * SCALE
                    right_b = tl.load(b + offset + keys)
                    right_d = tl.load(d + offset + keys)
                    if CAPPED:
                        # tanh(u) - tanh(u - y) = t (1 - T^2) / (1 - T t), with T = tanh(u) and t = tanh(y).
                        before = tl.load(logits + row_places + keys[None, :]) / softcap
                        bent = tanh((left_a[:, None] * right_b[None, :] + left_c[:, None] * right_d[None, :]) / softcap)
                        bent *= softcap * (1 - before * before) / (1 - before * bent)
                        power = row_shift[:, None] - bent * LOG2_E
                    else:
                        power = _power(power_a, power_c, row_shift, right_b, right_d)
                    if GROWS:
                        before = tl.load(logits + row_places + keys[None, :])
                        power += before * (left_r[:, None] * tl.load(s + offset + keys)[None, :] - 1) * LOG2_E
                    values = tl.load(value + keys[:, None] * BLOCK_DIM + columns[None, :])
                    moved, totals, sizes = _added(power, seen, values, moved, totals, sizes, NUM_SUMS)
            total = tl.sum(totals, 1)
            spread = tl.sum(sizes, 1) * (1 / SCALE)
            moved -= total[:, None] * outputs
            distance = tl.sqrt(tl.sum(moved * moved, 1)) * (1 / SCALE)
            error *= 1 + spread
            narrow = error + (spread + tl.abs(total) * (1 / SCALE)) * by_half + least
            inverse = 1 / (1 + total * (1 / SCALE))
            error *= inverse
            # Sums may have overflowed.
            certain = (inverse > 0) & (error < 0.5) & (distance < float("inf"))
            low = tl.maximum(distance - narrow, 0) * inverse * (1 - error)
            high = (distance + narrow) * inverse * (1 + 2 * error)
            # An uncertain row must not raise the lower end, whatever its sums are.
            low = tl.where(certain, low * low * scale, 0)
            high = tl.where(certain, high * high, float("inf"))
            high = tl.where(row_mask, high * scale, 0)
            # Both ends in one exchange between warps.
            both = tl.sum(tl.join(low, high), 0)
            tl.store(ends + (neuron * num_blocks + block) * 2 + tl.arange(0, 2), both)
