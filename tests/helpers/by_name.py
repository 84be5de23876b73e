"""The operations with the fields of their argument objects as keywords, for tests that vary one.

A layout is any pair of offsets and sizes, or what has these as attributes.
"""

from gcond_kernels import ops


def accumulate(accumulator, gradients, layout, **options):
    ops.accumulate(accumulator, gradients, layout_from(layout), **options)


def gramian(accumulators, layout, **options):
    return ops.gramian(gradients_from(accumulators, layout, options), **options)


def arbitrate(gramian, cross, scale, *, settings, backend="auto", **state):
    state = ops.ArbitrationState(**state)
    return ops.arbitrate(gramian, cross, scale, state=state, settings=settings, backend=backend)


def combine(accumulators, outputs, layout, *, per_tensor=None, max_norm=None, **options):
    gradients = gradients_from(accumulators, layout, options)
    rescale = None if max_norm is None else ops.Rescale(max_norm, per_tensor)
    ops.combine(gradients, outputs, momentum=momentum_from(options), rescale=rescale, **options)


def graddrop(accumulators, outputs, layout, *, seed, counter, leak=0.0, first=0, **options):
    gradients = gradients_from(accumulators, layout, options)
    dropout = ops.SignDropout(seed, counter, leak, first)
    ops.graddrop(gradients, outputs, dropout=dropout, momentum=momentum_from(options), **options)


def resolve(accumulators, outputs, layout, *, state, **options):
    gradients = gradients_from(accumulators, layout, options)
    state = ops.ArbitrationState(**state)
    return ops.resolve(gradients, outputs, state=state, momentum=momentum_from(options), **options)


def layout_from(layout) -> ops.Layout:
    return ops.Layout.of(*(layout if isinstance(layout, tuple) else (layout.offsets, layout.sizes)))


def gradients_from(accumulators, layout, options) -> ops.TaskGradients:
    given = {name: options.pop(name, None) for name in ("scale", "history", "mask")}
    return ops.TaskGradients(accumulators, layout_from(layout), **given)


def momentum_from(options) -> ops.Momentum | None:
    buffer, steps = options.pop("momentum", None), options.pop("momentum_steps", None)
    beta = options.pop("beta", 0.9)
    return None if buffer is None else ops.Momentum(buffer, steps, beta)
