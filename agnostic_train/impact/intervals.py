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
from functools import cached_property
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
_MIN_VALUE = 1e-12
# Number of parts into which a program divides the sums over its rows: one per warp, if there are four.
NUM_PARTS = 4
# Up to which lengths a program keeps all keys (the kernel is compiled for each), and up to which head size. On Hopper,
# few registers spill then; elsewhere more would, and Triton lays out products of different shapes differently.
KEPT_LENGTHS = 64, 128, 256
_MAX_KEPT_HEAD = 128
_MAX_KEPT_LENGTH_ELSEWHERE, _MAX_KEPT_HEAD_ELSEWHERE = 128, 64


class Intervals:
    """Intervals around each neuron's `kernels.squared_changes`; what all neurons of a layer share is prepared once.

    Args:
        logits: the softmax's input: capped if there is a `softcap`.
        attention: A, the softmax of the logits.
        value: not necessarily centred.
        largest_logit: (heads,), an upper bound on the absolute value of each head's visible logits, before a cap.
        Other arguments: as for `squared_changes`.

    Attributes:
        centred_value: the values minus their average under the attention, shaped like `value`.
    """

    def __init__(
        self,
        logits: Tensor,
        attention: Tensor,
        value: Tensor,
        weight: Tensor,
        spans: Tensor,
        largest_logit: Tensor,
        softcap: float | None = None,
    ):
        self._logits = logits
        self._attention = _padded(attention).contiguous()
        self._weight = weight.contiguous()
        self._spans = spans
        self._largest_logit = largest_logit
        self._softcap = softcap
        # The mean attention of the counted rows: (heads, 1, length).
        self._attended = (weight / weight.sum(1, keepdim=True).clamp(min=1)).unsqueeze(1) @ attention
        self.centred_value = value - self._attended @ value
        longest = torch.linalg.vector_norm(self.centred_value, dim=-1).amax(1)
        self._longest = longest.clamp(min=torch.finfo(value.dtype).tiny)
        self._value = _padded_values((self.centred_value / self._longest[:, None, None]).half()).contiguous()

    def around(self, factors: Sequence[Tensor], growths: Sequence[Tensor] = ()) -> tuple[Tensor, Tensor]:
        """Computes the lower and upper ends of the intervals.

        Args:
            factors: as for `squared_changes`.
            growths: r and s, here at least 1; not supported together with a soft cap.

        Returns: both (heads, neurons of a head), float32. The upper ends may be infinite.
        """
        assert not (growths and self._softcap)
        num_heads, length, num_neurons = factors[0].shape
        head_dim, num_blocks = self.centred_value.shape[2], self._spans.shape[1]
        b, d = factors[1], factors[3]
        # Placeholders: without growths or a cap, the kernel doesn't read these arguments.
        logits, growth = self._attention, [self._attention] * 5
        if growths or self._softcap:
            logits = _padded(self._visible_logits)
        if growths:
            growth = [*growths, self._attended @ growths[1], growths[1].amax(1), self._mean_logit]
        ends = b.new_empty(num_heads, num_neurons, num_blocks * NUM_PARTS, 2)
        with torch.cuda.device_of(ends):
            _squared_intervals[kernels.launch_grid(num_heads, num_neurons, num_blocks)](
                ends,
                self._attention,
                self._value,
                self._weight,
                *(it.contiguous() for it in factors),
                self._attended @ b,
                self._attended @ d,
                *b.aminmax(dim=1),
                *d.aminmax(dim=1),
                *(it.contiguous() for it in (logits, *growth)),
                self._longest,
                self._largest_logit,
                self._change_rounding,
                self._spans,
                num_blocks,
                num_heads // len(self._spans),
                length,
                self._attention.shape[-1],
                *self._rounding(bool(growths)),
                self._softcap or 1.0,
                **launch_options(
                    head_dim, num_neurons, length, bool(growths), self._softcap is not None, _is_hopper(ends.device)
                ),
            )
        low, high = ends.sum(2).unbind(-1)
        return low, high

    @cached_property
    def _visible_logits(self) -> Tensor:
        return self._logits.masked_fill(self._logits == -torch.inf, 0)

    @cached_property
    def _mean_logit(self) -> Tensor:
        """Each row's mean logit under its attention: (heads, length)."""
        length = self._logits.shape[-1]
        return (self._attention[:, :length, :length] * self._visible_logits).sum(-1)

    def _rounding(self, grows: bool) -> tuple[float, float]:
        """The relative error of the weights `A_ij w_j`, apart from the change's, and what each unit of a logit adds."""
        length = self._logits.shape[-1]
        # In halves of an epsilon: the attention's layout costs 18, the exponential a few, a sum the rest. Each rounding
        # of a logit, here and in the exact form together, costs its size: a hyperbolic tangent is off by up to twelve
        # roundings, and each logit passes through three, one of them torch's.
        num_roundings = 5 if grows else 38 if self._softcap else 2
        return _EPS / 2 * (56 + 4 * length**0.5 + length / 8), _EPS / 2 * num_roundings

    @cached_property
    def _change_rounding(self) -> Tensor:
        """The same per unit of an upper bound on the change of the logits: (heads,)."""
        if not self._softcap:
            return torch.full_like(self._largest_logit, 8 * _EPS)
        # The cancellation in `1 - T t` (see the kernel) at the largest T.
        return 44 * _EPS / (1 - self._visible_logits.abs().amax((1, 2)) / self._softcap).clamp(min=0)


def _padded(matrices: Tensor) -> Tensor:
    """Pads rows and columns with zeros to `padded_length`, so that the kernel needs no mask for them."""
    missing = padded_length(matrices.shape[-1]) - matrices.shape[-1]
    return functional.pad(matrices, (0, missing, 0, missing)) if missing else matrices


def _padded_values(value: Tensor) -> Tensor:
    """Pads the tokens with zeros to `padded_length`, and each head to a size that tensor cores multiply."""
    _, length, head_dim = value.shape
    missing = 0, kernels.block_dim(head_dim) - head_dim, 0, padded_length(length) - length
    return functional.pad(value, missing) if any(missing) else value


def _is_hopper(device: torch.device) -> bool:
    """Whether this is a Hopper GPU, or the interpreter, which then computes as Hopper does."""
    return device.type == "cpu" or torch.cuda.get_device_capability(device)[0] == 9


def launch_options(
    head_dim: int, num_neurons: int, length: int, grows: bool = False, capped: bool = False, hopper: bool = True
) -> dict[str, int | float | bool]:
    """Compile-time options of the kernel for a head's size and number of neurons and a sentence's length.

    grows, capped: how logits change.
    """
    constants = {"SCALE": _SCALE, "HALF": _HALF, "EPS": _EPS, "LOG2_E": log2(e), "SMALLEST": _MIN_VALUE}
    constants |= {"NUM_PARTS": NUM_PARTS}
    options = kernels.launch_options(head_dim, num_neurons, grows, capped) | constants | {"enable_fp_fusion": True}
    keeps = head_dim <= _MAX_KEPT_HEAD and length <= KEPT_LENGTHS[-1] and not (grows or capped)
    if not hopper:
        keeps &= head_dim <= _MAX_KEPT_HEAD_ELSEWHERE and length <= _MAX_KEPT_LENGTH_ELSEWHERE
    num_kept = next(it for it in KEPT_LENGTHS if length <= it) // kernels.BLOCK_KEYS if keeps else 0
    return options | {"KEPT": num_kept, "num_warps": 4 if num_kept else options["num_warps"]}


if triton is not None:

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
    def _right(b, d, offset, keys, length, centre_b, centre_d, NUM_NEURONS: tl.constexpr):
        """A neuron's factors of a block of keys; of keys that don't exist, those that change nothing."""
        places, exists = offset + keys * NUM_NEURONS, keys < length
        return tl.load(b + places, mask=exists, other=centre_b), tl.load(d + places, mask=exists, other=centre_d)

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

    @triton.jit(do_not_specialize=kernels.SIZES)
    def _squared_intervals(
        ends, attention, value, weight, a, b, c, d, middle_b, middle_d, lowest_b, highest_b, lowest_d, highest_d,
        logits, r, s, middle_s, largest_s, mean_logit, longest, largest_logits, change_rounding, spans, num_blocks,
        heads_per_sentence, length, padded, rounding, logit_rounding, softcap, HEAD_DIM: tl.constexpr,
        NUM_NEURONS: tl.constexpr, BLOCK_DIM: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_KEYS: tl.constexpr,
        GROUP: tl.constexpr, KEPT: tl.constexpr, GROWS: tl.constexpr, CAPPED: tl.constexpr, SCALE: tl.constexpr,
        HALF: tl.constexpr, EPS: tl.constexpr, LOG2_E: tl.constexpr, NUM_PARTS: tl.constexpr, SMALLEST: tl.constexpr,
    ):  # fmt: skip
        head, block, rows, row_weight, first, last, start, stop = program_part(
            weight, spans, num_blocks, heads_per_sentence, length, NUM_NEURONS, BLOCK_ROWS, BLOCK_KEYS, GROUP
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
        own_rounding = rounding + logit_rounding * largest_logit
        # With tiny values, the squared changes may underflow.
        own_rounding = tl.where(largest_value < SMALLEST, float("inf"), own_rounding)
        by_change = tl.load(change_rounding + head)
        row_mean = row_weight
        if GROWS:
            row_mean = tl.load(mean_logit + head * length + rows, mask=row_mask, other=0.0)
        scale = row_weight * largest_value * largest_value
        # The unchanged output, by the same kind of product as `moved`, so that both have the same register layout.
        outputs = tl.zeros([BLOCK_ROWS, BLOCK_DIM], tl.float32)
        # Number of partial sums of a row: those of a thread, so that threads needn't exchange theirs for each block.
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
        least = (last - first + HEAD_DIM) * (EPS / 4)
        for place in range(start, stop):
            neuron = head * NUM_NEURONS + place
            # A neuron's factors are a column of (length, neurons).
            offset = head * length * NUM_NEURONS + place
            row_factors = offset + rows * NUM_NEURONS
            left_a = tl.load(a + row_factors, mask=row_mask, other=0.0)
            left_c = tl.load(c + row_factors, mask=row_mask, other=0.0)
            centre_b = tl.load(middle_b + neuron)
            centre_d = tl.load(middle_d + neuron)
            # All as powers of two, so that the exponential is one instruction.
            power_a = left_a * -LOG2_E
            power_c = left_c * -LOG2_E
            row_shift = left_a * centre_b + left_c * centre_d
            left_r = left_a
            if GROWS:
                left_r = tl.load(r + row_factors, mask=row_mask, other=1.0)
                row_shift -= row_mean * (left_r * tl.load(middle_s + neuron) - 1)
            if CAPPED:
                row_shift = softcap * tanh(row_shift / softcap)
            # Upper bounds on the change of the logits: centred, as here, and uncentred, as in the exact form.
            size_a = tl.abs(left_a)
            size_c = tl.abs(left_c)
            reach_b = tl.maximum(tl.load(highest_b + neuron) - centre_b, centre_b - tl.load(lowest_b + neuron))
            reach_d = tl.maximum(tl.load(highest_d + neuron) - centre_d, centre_d - tl.load(lowest_d + neuron))
            centred = size_a * reach_b + size_c * reach_d
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
                    if (part * BLOCK_KEYS < last) & ((part + 1) * BLOCK_KEYS > first):
                        keys = part * BLOCK_KEYS + block_keys
                        right_b, right_d = _right(b, d, offset, keys, length, centre_b, centre_d, NUM_NEURONS)
                        power = _power(power_a, power_c, row_shift, right_b, right_d)
                        moved, totals, sizes = _added(
                            power, kept_seen[part], kept_values[part], moved, totals, sizes, NUM_SUMS
                        )
            else:
                for key in range(first, last, BLOCK_KEYS):
                    keys = key + block_keys
                    seen = tl.load(attention + row_places + keys[None, :]) * SCALE
                    right_b, right_d = _right(b, d, offset, keys, length, centre_b, centre_d, NUM_NEURONS)
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
                        right_s = tl.load(s + offset + keys * NUM_NEURONS, mask=keys < length, other=1.0)
                        power += before * (left_r[:, None] * right_s[None, :] - 1) * LOG2_E
                    values = tl.load(value + keys[:, None] * BLOCK_DIM + columns[None, :])
                    moved, totals, sizes = _added(power, seen, values, moved, totals, sizes, NUM_SUMS)
            # From here on, sums are `SCALE` times what they stand for.
            total, spread = tl.sum(totals, 1), tl.sum(sizes, 1)
            moved -= total[:, None] * outputs
            distance = tl.sqrt(tl.sum(moved * moved, 1))
            error *= SCALE + spread
            narrow = error + (spread + tl.abs(total)) * by_half + least
            # Of the sum of the changed weights; NaN if that is negative.
            root = tl.rsqrt(SCALE + total)
            inverse = root * root
            error *= inverse
            # Sums may have overflowed.
            certain = (error < 0.5) & (distance < float("inf"))
            low = tl.maximum(distance - narrow, 0) * inverse * (1 - error)
            high = (distance + narrow) * inverse * (1 + 2 * error)
            # An uncertain row must not raise the lower end, whatever its sums are.
            low = tl.where(certain, low * low * scale, 0)
            high = tl.where(certain, high * high * scale, float("inf"))
            high = tl.where(row_mask, high, 0)
            # Not summed over all rows, because exchanges between warps take long.
            both = tl.sum(tl.reshape(tl.join(low, high), (NUM_PARTS, BLOCK_ROWS // NUM_PARTS, 2)), 1)
            parts = (neuron * num_blocks + block) * NUM_PARTS + tl.arange(0, NUM_PARTS)
            tl.store(ends + parts[:, None] * 2 + tl.arange(0, 2)[None, :], both)
