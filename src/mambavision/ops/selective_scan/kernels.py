"""GPU kernels of the selective scan, in Triton. Nothing but `@triton.jit` functions: `triton_op` launches them.

One thread walks one channel: its states live in registers, and the sum over the states stays inside the thread. A warp
walks 32 neighbouring channels of a sequence, so loads of x and dt are whole lines, and B and C are the same for all its
threads. (Few whole sequences in inference go by 16 channels a warp, two threads each: see `triton_op.cut`.) What the
walk costs is counted in instructions: about 90 a token for 8 states of 16 bits, 9 of them exponentials, which have a
slower unit of their own. Hence what looks roundabout below:

- Loads run one group of tokens ahead of their use. With so few warps a scheduler nothing else hides their latency.
- 16-bit B and C come as 32-bit pairs, which a shift and a mask widen: with fewer instructions than the compiler's own
  way, and nearly half its registers. So states come in two groups, the even and the odd ones. 32-bit ones come in
  groups of 4, as a vector load brings them. `_state_numbers` says which states a group has.
- Row strides are compile-time constants, so that addresses within a group are offsets in the instructions.
- log1p is a polynomial: the unit for special functions is the busy one.
- The gradients of B and C are sums over the channels, which lie in different threads. All of a group of tokens are
  stacked and summed as one product with ones, with fewer instructions than shuffles for every state and token.

A long sequence is cut into chunks that walk side by side: `walk_kernel` first tells what each chunk adds (`ENDS`),
`stitch_kernel` makes of it the state that enters each, and a second walk starts there (`STARTS`). The backward walks
likewise in reverse, making each group's states anew from the one that `walk_kernel` saved at its start (`SAVE`).

Shapes: x, dt, y (batch, length, channels); A (channels, N); B, C (batch, length, N); states (batch, ..., N, channels).
Source: Gu & Dao, "Mamba" (arXiv 2312.00752), section 3.3, for scanning in fast memory and for recomputation.
"""

import triton
import triton.language as tl


@triton.jit
def _softplus(v, SHORT: tl.constexpr):
    """exp(-|v|) and log(1 + exp(v)); with SHORT within 6e-5 of its size, an eighth of float16's."""
    e = tl.exp2(-1.4426950408889634 * tl.abs(v))
    # log1p(e) = e P(e) on [0, 1], P minimax in the relative error.
    if SHORT:
        p = 0.0413472547 * e - 0.1574271112
        p = p * e + 0.3063008691
        p = p * e - 0.4969777931
        log1p = e * (p * e + 0.9999432775)
    else:  # as e - e^2 P(e), within 2e-7 of its size
        p = 0.03006560508 - 0.005364777509 * e
        p = p * e - 0.07920423172
        p = p * e + 0.1375376771
        p = p * e - 0.1915364300
        p = p * e + 0.2485716067
        p = p * e - 0.3332132226
        p = p * e + 0.4999964795
        log1p = e - e * e * p
    return e, tl.maximum(v, 0.0) + log1p


@triton.jit
def _state_numbers(group: tl.constexpr, WIDTH: tl.constexpr, PAIRED: tl.constexpr):
    """Which states group number `group` has; (WIDTH, 1)."""
    number = tl.arange(0, WIDTH)[:, None]
    if PAIRED:  # noqa: SIM108  (both sides of a conditional expression are compiled)
        number = 2 * number + (group // 2) * (2 * WIDTH) + group % 2
    else:
        number = number + group * WIDTH
    return number


@triton.jit
def _row_pointers(tensor, offset, WIDTH: tl.constexpr, BLOCK: tl.constexpr, PAIRED: tl.constexpr):
    """Pointers to the first vector of a row of B or C, the same for every channel; (WIDTH, BLOCK)."""
    first = tensor + offset
    if PAIRED:
        first = first.to(tl.pointer_type(tl.int32))
    return first + tl.arange(0, WIDTH)[:, None] + tl.zeros([1, BLOCK], tl.int32)


@triton.jit
def _widen(vector, DTYPE: tl.constexpr, PAIRED: tl.constexpr):
    """A vector of B or C as a tuple of float32 groups."""
    if not PAIRED:
        groups = (vector.to(tl.float32),)
    elif tl.bfloat16 == DTYPE:  # the upper half of a float32
        groups = (vector << 16).to(tl.float32, bitcast=True), (vector & -65536).to(tl.float32, bitcast=True)
    else:
        low, high = vector.to(tl.int16), (vector >> 16).to(tl.int16)
        groups = low.to(DTYPE, bitcast=True).to(tl.float32), high.to(DTYPE, bitcast=True).to(tl.float32)
    return groups


@triton.jit
def _stacked(tensors, LEVELS: tl.constexpr):
    """2^LEVELS tensors of (rows, columns), one below the other."""
    for level in tl.static_range(LEVELS):
        pairs = ()
        for k in tl.static_range(2 ** (LEVELS - 1 - level)):
            pair = tl.join(tensors[2 * k], tensors[2 * k + 1])  # (rows, columns, 2)
            pairs = pairs + (tl.reshape(tl.permute(pair, (2, 0, 1)), (2 * pair.shape[0], pair.shape[1])),)
        tensors = pairs
    return tensors[0]


@triton.jit
def walk_kernel(
    x,
    dt,
    A,
    B,
    C,
    D,
    dt_bias,
    y,
    starts,  # (batch, chunks, N, channels): the state that enters each chunk
    saved,  # (batch, groups, N, channels): the state that enters each group of GROUP tokens
    ends,  # (batch, chunks, N, channels): what each chunk adds
    sums,  # (batch, chunks, channels): sum of its steps
    x_batch,
    dt_batch,
    B_batch,
    C_batch,
    y_batch,
    length,
    channels,
    chunk,  # tokens in a chunk, a multiple of GROUP
    x_row: tl.constexpr,
    dt_row: tl.constexpr,
    B_row: tl.constexpr,
    C_row: tl.constexpr,
    y_row: tl.constexpr,
    N: tl.constexpr,
    WIDTH: tl.constexpr,
    PAIRED: tl.constexpr,
    BLOCK: tl.constexpr,
    GROUP: tl.constexpr,
    WHOLE: tl.constexpr,  # whether BLOCK divides the channels
    FULL: tl.constexpr,  # whether GROUP divides the length
    HAS_D: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    SHORT: tl.constexpr,  # whether a coarser softplus will do
    STARTS: tl.constexpr,
    SAVE: tl.constexpr,
    ENDS: tl.constexpr,  # then y is not written
):
    """Walk one chunk of BLOCK channels. Grid: (blocks of channels x batch, chunks)."""
    HALVES: tl.constexpr = 2 if PAIRED else 1  # groups of states that a vector load brings
    VECTORS: tl.constexpr = N // (WIDTH * HALVES)
    PACK: tl.constexpr = HALVES  # elements in what a pointer of B or C points to
    blocks = tl.cdiv(channels, BLOCK)
    batch = (tl.program_id(0) // blocks).to(tl.int64)
    first = tl.program_id(1) * chunk
    last = tl.minimum(first + chunk, length)
    channel = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    inside = (channel < channels) | WHOLE
    chunks = tl.num_programs(1)

    rates, h = (), ()  # A / ln 2, as exp2 takes it, and the states; a tuple entry is a group, (WIDTH, BLOCK)
    for group in tl.static_range(VECTORS * HALVES):
        number = _state_numbers(group, WIDTH, PAIRED)
        rate = tl.load(A + channel[None, :] * N + number, mask=inside[None, :], other=0.0).to(tl.float32)
        rates = rates + (rate * 1.4426950408889634,)
        if STARTS:
            place = ((batch * chunks + tl.program_id(1)) * N + number) * channels + channel[None, :]
            h = h + (tl.load(starts + place, mask=inside[None, :], other=0.0),)
        else:
            h = h + (tl.zeros([WIDTH, BLOCK], tl.float32),)
    skip = tl.zeros([BLOCK], tl.float32)
    bias = tl.zeros([BLOCK], tl.float32)
    if HAS_D:
        skip = tl.load(D + channel, mask=inside, other=0.0).to(tl.float32)
    if HAS_BIAS:
        bias = tl.load(dt_bias + channel, mask=inside, other=0.0).to(tl.float32)
    total = tl.zeros([BLOCK], tl.float32)

    wide = first.to(tl.int64)  # as rows may lie far from each other
    x_at = x + batch * x_batch + wide * x_row + channel
    dt_at = dt + batch * dt_batch + wide * dt_row + channel
    y_at = y + batch * y_batch + wide * y_row + channel
    B_at = _row_pointers(B, batch * B_batch + wide * B_row, WIDTH, BLOCK, PAIRED)
    C_at = _row_pointers(C, batch * C_batch + wide * C_row, WIDTH, BLOCK, PAIRED)
    xs, dts, Bs, Cs = (), (), (), ()
    for k in tl.static_range(GROUP):
        there = (first + k < last) | FULL
        xs = xs + (tl.load(x_at + k * x_row, mask=inside & there, other=0.0),)
        dts = dts + (tl.load(dt_at + k * dt_row, mask=inside & there, other=0.0),)
        for v in tl.static_range(VECTORS):
            Bs = Bs + (tl.load(B_at + (k * B_row // PACK + v * WIDTH), mask=there, other=0),)
            if not ENDS:
                Cs = Cs + (tl.load(C_at + (k * C_row // PACK + v * WIDTH), mask=there, other=0),)

    for start in range(first, last, GROUP):
        if SAVE:
            groups = tl.cdiv(length, GROUP)
            for group in tl.static_range(VECTORS * HALVES):
                number = _state_numbers(group, WIDTH, PAIRED)
                place = ((batch * groups + start // GROUP) * N + number) * channels + channel[None, :]
                tl.store(saved + place, h[group], mask=inside[None, :])
        ahead = tl.where(start + GROUP < last, GROUP, 0)  # the last group is read twice: nothing lies behind it
        x_at += ahead * x_row
        dt_at += ahead * dt_row
        B_at += ahead * (B_row // PACK)
        C_at += ahead * (C_row // PACK)
        next_xs, next_dts, next_Bs, next_Cs = (), (), (), ()
        for k in tl.static_range(GROUP):
            there = (start + GROUP + k < last) | FULL
            next_xs = next_xs + (tl.load(x_at + k * x_row, mask=inside & there, other=0.0),)
            next_dts = next_dts + (tl.load(dt_at + k * dt_row, mask=inside & there, other=0.0),)
            for v in tl.static_range(VECTORS):
                next_Bs = next_Bs + (tl.load(B_at + (k * B_row // PACK + v * WIDTH), mask=there, other=0),)
                if not ENDS:
                    next_Cs = next_Cs + (tl.load(C_at + (k * C_row // PACK + v * WIDTH), mask=there, other=0),)
        for k in tl.static_range(GROUP):
            token = xs[k].to(tl.float32)
            _, step = _softplus(dts[k].to(tl.float32) + bias, SHORT)
            drive = step * token
            out = skip * token
            new = ()
            for v in tl.static_range(VECTORS):
                b = _widen(Bs[k * VECTORS + v], B.dtype.element_ty, PAIRED)
                for half in tl.static_range(HALVES):
                    decay = tl.exp2(step[None, :] * rates[v * HALVES + half])
                    new = new + (decay * h[v * HALVES + half] + drive[None, :] * b[half],)
                if not ENDS:
                    c = _widen(Cs[k * VECTORS + v], C.dtype.element_ty, PAIRED)
                    asked = c[0] * new[v * HALVES]
                    if PAIRED:
                        asked += c[1] * new[v * HALVES + 1]
                    out += tl.sum(asked, 0)
            h = new
            if ENDS:
                total += step
            else:
                tl.store(y_at + k * y_row, out.to(y.dtype.element_ty), mask=inside & ((start + k < last) | FULL))
        y_at += GROUP * y_row
        xs, dts, Bs, Cs = next_xs, next_dts, next_Bs, next_Cs

    if ENDS:  # a chunk that is not full is the last one, and what it adds enters nothing
        slot = batch * chunks + tl.program_id(1)
        for group in tl.static_range(VECTORS * HALVES):
            number = _state_numbers(group, WIDTH, PAIRED)
            tl.store(ends + (slot * N + number) * channels + channel[None, :], h[group], mask=inside[None, :])
        tl.store(sums + slot * channels + channel, total, mask=inside)


@triton.jit
def stitch_kernel(
    A,
    ends,  # (batch, chunks, N, channels): what each chunk adds
    sums,  # (batch, chunks, channels): sum of its steps
    entering,  # (batch, chunks, N, channels): out, the state that enters each chunk
    chunks,
    channels,
    N: tl.constexpr,
    BLOCK: tl.constexpr,
    AHEAD: tl.constexpr,  # chunks whose loads are issued together
    REVERSE: tl.constexpr,  # whether the last chunk comes first
):
    """Walk over the chunks. Grid: (blocks of N x channels, batch)."""
    batch = tl.program_id(1).to(tl.int64)
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = place < N * channels
    channel = place % channels
    rate = tl.load(A + channel * N + place // channels, mask=inside, other=0.0).to(tl.float32) * 1.4426950408889634
    h = tl.zeros([BLOCK], tl.float32)
    for start in range(0, chunks, AHEAD):
        added, steps = (), ()
        for k in tl.static_range(AHEAD):
            number = start + k
            slot = batch * chunks + (chunks - 1 - number if REVERSE else number)
            there = inside & (number < chunks)
            added = added + (tl.load(ends + slot * N * channels + place, mask=there, other=0.0),)
            steps = steps + (tl.load(sums + slot * channels + channel, mask=there, other=0.0),)
        for k in tl.static_range(AHEAD):
            number = start + k
            slot = batch * chunks + (chunks - 1 - number if REVERSE else number)
            tl.store(entering + slot * N * channels + place, h, mask=inside & (number < chunks))
            h = tl.exp2(steps[k] * rate) * h + added[k]


@triton.jit
def backward_kernel(
    x,
    dt,
    A,
    B,
    C,
    D,
    dt_bias,
    grad_y,
    saved,  # (batch, groups, N, channels): the state that enters each group, from `walk_kernel`
    starts,  # (batch, chunks, N, channels): what the next chunk hands back to each chunk's last state
    grad_x,
    grad_dt,
    grad_BC,  # (blocks, batch, length, 2, N), to be summed
    grad_constants,  # (batch x chunks, N + 2, channels), to be summed: of A, of D and of dt_bias
    ends,  # (batch, chunks, N, channels): what each chunk hands back to the one before
    sums,  # (batch, chunks, channels): sum of its steps
    x_batch,
    dt_batch,
    B_batch,
    C_batch,
    grad_y_batch,
    length,
    channels,
    chunk,
    x_row: tl.constexpr,
    dt_row: tl.constexpr,
    B_row: tl.constexpr,
    C_row: tl.constexpr,
    grad_y_row: tl.constexpr,
    N: tl.constexpr,
    WIDTH: tl.constexpr,
    PAIRED: tl.constexpr,
    BLOCK: tl.constexpr,
    GROUP: tl.constexpr,
    WHOLE: tl.constexpr,
    FULL: tl.constexpr,
    HAS_D: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    STARTS: tl.constexpr,
    ENDS: tl.constexpr,  # then only `ends` and `sums` are written
    LEVELS: tl.constexpr,  # log2 of the terms of grad_BC in a group, 2 GROUP N / WIDTH
):
    """Walk one chunk of BLOCK channels in reverse. Grid: (blocks of channels x batch, chunks)."""
    HALVES: tl.constexpr = 2 if PAIRED else 1
    VECTORS: tl.constexpr = N // (WIDTH * HALVES)
    PACK: tl.constexpr = HALVES
    blocks = tl.cdiv(channels, BLOCK)
    batch = (tl.program_id(0) // blocks).to(tl.int64)
    first = tl.program_id(1) * chunk
    last = tl.minimum(first + chunk, length)
    channel = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    inside = (channel < channels) | WHOLE
    chunks = tl.num_programs(1)
    slot = batch * chunks + tl.program_id(1)

    rates, handed, sum_A = (), (), ()
    for group in tl.static_range(VECTORS * HALVES):
        number = _state_numbers(group, WIDTH, PAIRED)
        rates = rates + (tl.load(A + channel[None, :] * N + number, mask=inside[None, :], other=0.0).to(tl.float32),)
        sum_A = sum_A + (tl.zeros([WIDTH, BLOCK], tl.float32),)
        if STARTS:
            place = (slot * N + number) * channels + channel[None, :]
            handed = handed + (tl.load(starts + place, mask=inside[None, :], other=0.0),)
        else:
            handed = handed + (tl.zeros([WIDTH, BLOCK], tl.float32),)
    skip = tl.zeros([BLOCK], tl.float32)
    bias = tl.zeros([BLOCK], tl.float32)
    if HAS_D:
        skip = tl.load(D + channel, mask=inside, other=0.0).to(tl.float32)
    if HAS_BIAS:
        bias = tl.load(dt_bias + channel, mask=inside, other=0.0).to(tl.float32)
    total, sum_D, sum_bias = skip * 0.0, skip * 0.0, skip * 0.0

    groups = tl.cdiv(length, GROUP)
    for back in range(0, tl.cdiv(last - first, GROUP)):
        start = first + (tl.cdiv(last - first, GROUP) - 1 - back) * GROUP
        wide = start.to(tl.int64)
        x_at = x + batch * x_batch + wide * x_row + channel
        dt_at = dt + batch * dt_batch + wide * dt_row + channel
        grad_y_at = grad_y + batch * grad_y_batch + wide * grad_y_row + channel
        B_at = _row_pointers(B, batch * B_batch + wide * B_row, WIDTH, BLOCK, PAIRED)
        C_at = _row_pointers(C, batch * C_batch + wide * C_row, WIDTH, BLOCK, PAIRED)
        tokens, dts, grad_ys, Bs, Cs = (), (), (), (), ()
        for k in tl.static_range(GROUP):
            there = (start + k < last) | FULL
            dts = dts + (tl.load(dt_at + k * dt_row, mask=inside & there, other=0.0),)
            grad_ys = grad_ys + (tl.load(grad_y_at + k * grad_y_row, mask=inside & there, other=0.0),)
            for v in tl.static_range(VECTORS):
                Cs = Cs + (tl.load(C_at + (k * C_row // PACK + v * WIDTH), mask=there, other=0),)
            if not ENDS:
                tokens = tokens + (tl.load(x_at + k * x_row, mask=inside & there, other=0.0),)
                for v in tl.static_range(VECTORS):
                    Bs = Bs + (tl.load(B_at + (k * B_row // PACK + v * WIDTH), mask=there, other=0),)

        # Forward through the group: steps, decays, and the state before each token.
        steps, slopes, decays, before, h = (), (), (), (), ()
        if not ENDS:
            for group in tl.static_range(VECTORS * HALVES):
                number = _state_numbers(group, WIDTH, PAIRED)
                slot_at = ((batch * groups + start // GROUP) * N + number) * channels + channel[None, :]
                h = h + (tl.load(saved + slot_at, mask=inside[None, :], other=0.0),)
        for k in tl.static_range(GROUP):
            v_in = dts[k].to(tl.float32) + bias
            e, step = _softplus(v_in, False)
            step = tl.where((start + k < last) | FULL, step, 0.0)  # past the end nothing decays
            slopes = slopes + (tl.where(v_in >= 0, 1.0, e) / (1.0 + e),)  # the sigmoid, derivative of the softplus
            steps = steps + (step,)
            total += step
            new = ()
            for v in tl.static_range(VECTORS):
                for half in tl.static_range(HALVES):
                    decay = tl.exp2(step[None, :] * (rates[v * HALVES + half] * 1.4426950408889634))
                    decays = decays + (decay,)
                if not ENDS:
                    b = _widen(Bs[k * VECTORS + v], B.dtype.element_ty, PAIRED)
                    drive = step * tokens[k].to(tl.float32)
                    for half in tl.static_range(HALVES):
                        old = h[v * HALVES + half]
                        before = before + (old,)
                        new = new + (decays[(k * VECTORS + v) * HALVES + half] * old + drive[None, :] * b[half],)
            if not ENDS:
                h = new

        terms = ()
        for k in tl.static_range(GROUP - 1, -1, -1):
            there = (start + k < last) | FULL
            asked = grad_ys[k].to(tl.float32)
            new_handed = ()
            if ENDS:
                for v in tl.static_range(VECTORS):
                    c = _widen(Cs[k * VECTORS + v], C.dtype.element_ty, PAIRED)
                    for half in tl.static_range(HALVES):
                        grad_h = c[half] * asked[None, :] + handed[v * HALVES + half]
                        new_handed = new_handed + (decays[(k * VECTORS + v) * HALVES + half] * grad_h,)
            else:
                token = tokens[k].to(tl.float32)
                drive = steps[k] * token
                grad_drives = tl.zeros([WIDTH, BLOCK], tl.float32)
                grad_steps = tl.zeros([WIDTH, BLOCK], tl.float32)
                new_sum_A = ()
                for v in tl.static_range(VECTORS):
                    b = _widen(Bs[k * VECTORS + v], B.dtype.element_ty, PAIRED)
                    c = _widen(Cs[k * VECTORS + v], C.dtype.element_ty, PAIRED)
                    for half in tl.static_range(HALVES):
                        old = before[(k * VECTORS + v) * HALVES + half]
                        decay = decays[(k * VECTORS + v) * HALVES + half]
                        grad_h = c[half] * asked[None, :] + handed[v * HALVES + half]
                        back_h = decay * grad_h
                        new_handed = new_handed + (back_h,)
                        grad_exponent = back_h * old  # of step x A
                        new_sum_A = new_sum_A + (sum_A[v * HALVES + half] + grad_exponent * steps[k][None, :],)
                        grad_steps += grad_exponent * rates[v * HALVES + half]
                        grad_drives += grad_h * b[half]
                        now = decay * old + drive[None, :] * b[half]
                        terms = terms + (grad_h * drive[None, :], now * asked[None, :])  # of grad_B and grad_C
                sum_A = new_sum_A
                grad_drive = tl.sum(grad_drives, 0)
                grad_step = tl.sum(grad_steps, 0) + grad_drive * token
                grad_v = grad_step * slopes[k]
                sum_bias += tl.where(there, grad_v, 0.0)
                sum_D += asked * token
                out = (batch * length + start + k) * channels + channel
                grad_token = grad_drive * steps[k] + asked * skip
                tl.store(grad_x + out, grad_token.to(grad_x.dtype.element_ty), mask=inside & there)
                tl.store(grad_dt + out, grad_v.to(grad_dt.dtype.element_ty), mask=inside & there)
            handed = new_handed

        if not ENDS:
            summed = tl.dot(
                _stacked(terms, LEVELS), tl.full((BLOCK, 16), 1.0, tl.float32), input_precision="ieee"
            )  # (2 GROUP N, 16), all columns alike
            row = tl.arange(0, 2 * GROUP * N)[:, None]
            term = row // WIDTH  # as they were added above: from the last token to the first, by vector, half and kind
            if PAIRED:
                of_state = 2 * (row % WIDTH) + (term // 4 % VECTORS) * (2 * WIDTH) + term // 2 % 2
            else:
                of_state = row % WIDTH + (term // 2 % VECTORS) * WIDTH
            token_at = start + GROUP - 1 - term // (2 * HALVES * VECTORS)
            line = (tl.program_id(0) % blocks * (tl.num_programs(0) // blocks) + batch) * length + token_at
            column = tl.arange(0, 16)[None, :]
            once = (column == 0) & ((token_at < last) | FULL)
            tl.store(grad_BC + (2 * line + term % 2) * N + of_state + column * 0, summed, mask=once)

    for group in tl.static_range(VECTORS * HALVES):
        place = (slot * N + _state_numbers(group, WIDTH, PAIRED)) * channels + channel[None, :]
        if ENDS:
            tl.store(ends + place, handed[group], mask=inside[None, :])
        else:
            place += slot * (2 * channels)  # two rows more in each
            tl.store(grad_constants + place, sum_A[group], mask=inside[None, :])
    if ENDS:
        tl.store(sums + slot * channels + channel, total, mask=inside)
    else:
        at = grad_constants + (slot * (N + 2) + N) * channels + channel
        tl.store(at, sum_D, mask=inside)
        tl.store(at + channels, sum_bias, mask=inside)
