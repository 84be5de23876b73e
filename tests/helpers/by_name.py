"""The operations with the fields of their argument objects as keywords, for tests that vary one."""

from gcond_kernels import ops

TASKS = ("scale", "history", "mask")


def accumulate(accumulator, gradients, offsets, sizes, **options):
    ops.accumulate(accumulator, gradients, ops.Layout.of(offsets, sizes), **options)


def gramian(accumulators, offsets, sizes, **options):
    return ops.gramian(gradients_from(accumulators, offsets, sizes, options), **options)


def arbitrate(gramian, cross, scale, *, settings, backend="auto", **state):
    return ops.arbitrate(
        gramian, cross, scale, state=ops.ArbitrationState(**state), settings=settings,
        backend=backend,
    )  # fmt: skip


def combine(accumulators, outputs, offsets, sizes, *, per_tensor=None, max_norm=None, **options):
    gradients = gradients_from(accumulators, offsets, sizes, options)
    rescale = None if max_norm is None else ops.Rescale(max_norm, per_tensor)
    ops.combine(gradients, outputs, momentum=momentum_from(options), rescale=rescale, **options)


def graddrop(accumulators, outputs, offsets, sizes, *, seed, counter, leak=0.0, first=0, **options):
    gradients = gradients_from(accumulators, offsets, sizes, options)
    dropout = ops.SignDropout(seed, counter, leak, first)
    ops.graddrop(gradients, outputs, dropout=dropout, momentum=momentum_from(options), **options)


def resolve(accumulators, outputs, offsets, sizes, *, state, **options):
    gradients = gradients_from(accumulators, offsets, sizes, options)
    if not isinstance(state, ops.ArbitrationState):
        state = ops.ArbitrationState(**state)
    return ops.resolve(gradients, outputs, state=state, momentum=momentum_from(options), **options)


def gradients_from(accumulators, offsets, sizes, options) -> ops.TaskGradients:
    given = {name: options.pop(name) for name in TASKS if name in options}
    return ops.TaskGradients(accumulators, ops.Layout.of(offsets, sizes), **given)


def momentum_from(options) -> ops.Momentum | None:
    buffer, steps = options.pop("momentum", None), options.pop("momentum_steps", None)
    beta = options.pop("beta", 0.9)
    return None if buffer is None else ops.Momentum(buffer, steps, beta)
