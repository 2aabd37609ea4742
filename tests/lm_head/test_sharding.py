"""The loss over meshes of 8 simulated devices gives the numbers of one, and moves no more than it has to."""

import functools
import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import AbstractDevice, AbstractMesh, AxisType, NamedSharding, PartitionSpec
from lm_head_oracle import IGNORE, Problem, Result, assert_as_exact, oracle, problem, same_dtype_baseline

from jaxchunk import lm_head_loss

P = PartitionSpec
MESHES = {"data": (8, 1), "model": (1, 8), "data x model": (4, 2)}
AXES = {"token_axis": "data", "vocab_axis": "model"}
OPTIONS = {"label_smoothing": 0.1, "z_loss": 1e-2, "logit_softcap": 5.0, "logit_scale": 0.7, "with_metrics": True}
ORDER = ("hidden", "weight", "bias", "token_weights", "labels", "cotangent")
B, S, D, V = 8, 6, 16, 64


def mesh_of(shape, axis_type=AxisType.Auto):
    return jax.make_mesh(
        shape, ("data", "model"), axis_types=(axis_type,) * 2, devices=jax.devices("cpu")[: shape[0] * shape[1]]
    )


@functools.cache
def batch():
    keys = jax.random.split(jax.random.key(0), 6)
    labels = jax.random.randint(keys[2], (B, S), 0, V).at[0, :4].set(IGNORE)  # shards differ in their valid tokens
    arrays = {
        "hidden": jax.random.normal(keys[0], (B, S, D)),
        "weight": jax.random.normal(keys[1], (V, D)) / 4,
        "bias": jax.random.normal(keys[3], (V,)),
        "token_weights": jax.random.uniform(keys[4], (B, S)),
        "labels": labels,
        "cotangent": jax.random.normal(keys[5], (B, S)),
    }
    return {name: np.asarray(array) for name, array in arrays.items()}  # of no mesh, whichever test asks first


def objective(hidden, weight, bias, token_weights, labels, cotangent, **options):
    loss, metrics = lm_head_loss(
        hidden, weight, labels, bias=bias, token_weights=token_weights, num_chunks=4, implementation="xla", **options
    )
    return jnp.sum(loss if loss.ndim == 0 else loss * cotangent), metrics


def gradients(arrays, **options):
    function = jax.value_and_grad(functools.partial(objective, **options), (0, 1, 2, 3), has_aux=True)
    return jax.jit(function)(*(arrays[name] for name in ORDER))


@functools.cache
def on_one_device(reduction):
    with jax.set_mesh(mesh_of((1, 1))):
        return jax.device_get(gradients(batch(), reduction=reduction, **OPTIONS))


def assert_close(found, expected):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=3e-5, atol=1e-6), found, expected)


def placed(mesh, weight_spec):
    specs = {"weight": weight_spec, "bias": P(weight_spec[0])}
    return {name: jax.device_put(a, NamedSharding(mesh, specs.get(name, P("data")))) for name, a in batch().items()}


@pytest.mark.parametrize(
    ("shape", "axis_type", "reduction"),
    [
        (MESHES["data"], AxisType.Auto, "mean"),
        (MESHES["data"], AxisType.Explicit, "none"),
        (MESHES["model"], AxisType.Auto, "none"),
        (MESHES["model"], AxisType.Explicit, "mean"),
        *itertools.product([MESHES["data x model"]], [AxisType.Auto, AxisType.Explicit], ["mean", "none"]),
    ],
)
def test_named_axes_give_the_numbers_of_one_device(shape, axis_type, reduction):
    mesh = mesh_of(shape, axis_type)
    with jax.set_mesh(mesh):
        found = gradients(placed(mesh, P("model", None)), reduction=reduction, **AXES, **OPTIONS)
    assert_close(found, on_one_device(reduction))


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_explicit_axes_need_not_be_named(reduction):
    mesh = mesh_of((4, 2), AxisType.Explicit)
    with jax.set_mesh(mesh):
        arrays = placed(mesh, P("model", None))
        found = gradients(arrays, reduction=reduction, **OPTIONS)
        assert found[1][1].sharding.spec == P("model", None)
        two_dimensions = arrays | {
            name: jax.device_put(arrays[name], NamedSharding(mesh, P("data", "model")))
            for name in ("hidden", "labels", "token_weights", "cotangent")
        }
        assert_close(gradients(two_dimensions, reduction=reduction, **OPTIONS), on_one_device(reduction))
    assert_close(found, on_one_device(reduction))


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
def test_a_mesh_that_only_the_arrays_know(axis_type):
    mesh = mesh_of((4, 2), axis_type)
    assert_close(gradients(placed(mesh, P("model", None)), reduction="mean", **AXES, **OPTIONS), on_one_device("mean"))


@pytest.mark.parametrize("where", ["gradient inside", "gradient outside"])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_inside_of_shard_map(reduction, where):
    mesh, arrays = mesh_of((4, 2)), batch()
    specs = (P("data"), P("model"), P("model"), P("data"), P("data"), P("data"))
    options = {"reduction": reduction, **AXES, **OPTIONS}

    def local(*operands):
        value, metrics = objective(*operands, **options)
        return (lax.psum(value, "data") if reduction == "none" else value), metrics

    function = jax.value_and_grad(local, (0, 1, 2, 3), has_aux=True)
    if where == "gradient inside":
        function = jax.shard_map(function, mesh=mesh, in_specs=specs, out_specs=((P(), P()), specs[:4]))
    else:
        shared = jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=(P(), P()))
        function = jax.value_and_grad(shared, (0, 1, 2, 3), has_aux=True)
    assert_close(jax.jit(function)(*(arrays[name] for name in ORDER)), on_one_device(reduction))


def test_a_weight_gathered_inside_of_shard_map_scatters_its_gradient():
    """FSDP by hand: the gathered weight varies over the data axis, and all_gather's transpose sums its gradient."""
    mesh = mesh_of((8, 1))

    def local(hidden, weight_shard, labels):
        weight = lax.all_gather(weight_shard, "data", axis=0, tiled=True)
        return lm_head_loss(hidden, weight, labels, num_chunks=2, implementation="xla", token_axis="data")

    loss = jax.shard_map(local, mesh=mesh, in_specs=(P("data"), P("data"), P("data")), out_specs=P())
    operands = [batch()[name] for name in ("hidden", "weight", "labels")]
    found = jax.jit(jax.value_and_grad(loss, (0, 1)))(*operands)
    assert_close(found, jax.value_and_grad(lm_head_loss, (0, 1))(*operands))


def test_without_named_axes_the_loss_is_each_devices_own():
    mesh = mesh_of((8, 1))
    operands = [batch()[name] for name in ("hidden", "weight", "labels")]

    def local(hidden, weight, labels):
        return lax.pmean(lm_head_loss(hidden, weight, labels, num_chunks=2, implementation="xla"), "data")

    sharded = jax.shard_map(local, mesh=mesh, in_specs=(P("data"), P(), P("data")), out_specs=P())

    def expected(hidden, weight, labels):
        each = [lm_head_loss(hidden[i], weight, labels[i], implementation="xla") for i in range(B)]
        return sum(each) / B

    found = jax.jit(jax.value_and_grad(sharded, (0, 1)))(*operands)
    assert_close(found, jax.jit(jax.value_and_grad(expected, (0, 1)))(*operands))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("shape", MESHES.values(), ids=MESHES.keys())
def test_sharded_is_as_exact_as_unchunked(shape, dtype):
    """Gradients are summed over devices before they are rounded."""
    p = problem(T=64, D=32, V=1192, dtype=dtype)
    mesh = mesh_of(shape)

    def loss(hidden, weight):
        return lm_head_loss(hidden, weight, p.labels, num_chunks=2, implementation="xla", **AXES)

    with jax.set_mesh(mesh):
        value, (dx, dW) = jax.jit(jax.value_and_grad(loss, (0, 1)))(p.hidden, p.weight)
    assert (dx.dtype, dW.dtype) == (dtype, dtype)
    result = Result(*(np.asarray(a, np.float64) for a in (value, dx, dW)))
    assert_as_exact(result, oracle(p), same_dtype_baseline(p), dtype)


def compiled(mesh, weight_spec, *, num_chunks=4, **options):
    T, D, V = 512, 64, 4096
    specs = P("data"), weight_spec, P("data")
    operands = tuple(
        jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec))
        for shape, dtype, spec in zip(((T, D), (V, D), (T,)), ("float32", "float32", "int32"), specs, strict=True)
    )
    loss = functools.partial(lm_head_loss, num_chunks=num_chunks, implementation="xla", **options)
    shardings = tuple(operand.sharding for operand in operands[:2])
    with jax.set_mesh(mesh):
        gradient = jax.jit(jax.grad(loss, (0, 1)), out_shardings=shardings)
        return gradient.lower(*operands).compile().as_text()


def collectives(text, kind):
    """Result shapes of the collectives of a kind, by whether they are in the entry computation."""
    entry = text[text.index("\nENTRY") :]
    find = lambda part: re.findall(rf"= \(?(\w+\[[\d,]*\]).* {kind}(?:-start)?\(", part)  # noqa: E731
    return find(entry), find(text[: text.index("\nENTRY")])


def test_fsdp_gathers_the_weight_once_and_not_in_the_loop():
    entry, elsewhere = collectives(compiled(mesh_of((8, 1)), P("data", None), token_axis="data"), "all-gather")
    assert entry == ["f32[4096,64]"]
    assert elsewhere == []


def test_data_parallel_sums_d_weight_once_and_not_in_the_loop():
    entry, elsewhere = collectives(compiled(mesh_of((8, 1)), P(), token_axis="data"), "all-reduce")
    assert sorted(entry) == ["f32[4096,64]", "s32[]"] or sorted(entry) == ["f32[4096,64]", "f32[]"]
    assert elsewhere == []


def test_vocabulary_parallel_moves_row_statistics_and_d_hidden_only():
    text = compiled(mesh_of((1, 8)), P("model", None), vocab_axis="model")
    entry, in_loop = collectives(text, "all-reduce")
    assert entry == ["f32[512,64]"]  # dX, once
    assert set(in_loop) == {"f32[128]"}  # statistics of a chunk of 128 rows
    assert collectives(text, "all-gather") == ([], [])


def test_pallas_lowers_for_cuda_over_a_mesh_without_a_gpu():
    device = AbstractDevice(device_kind="NVIDIA H200", num_cores=132, platform="gpu")
    operands = tuple(
        jax.ShapeDtypeStruct(shape, dtype)
        for shape, dtype in (((1024, 64), jnp.bfloat16), ((4096, 64), jnp.float32), ((1024,), jnp.int32))
    )
    mesh = AbstractMesh((2, 2), ("data", "model"), axis_types=(AxisType.Auto,) * 2, abstract_device=device)
    with jax.sharding.use_abstract_mesh(mesh):
        loss = functools.partial(lm_head_loss, num_chunks=2, implementation="pallas", **AXES)
        gradients = jax.value_and_grad(loss, (0, 1))
        text = jax.jit(gradients).trace(*operands).lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("__gpu$xla.gpu.triton") == 2  # statistics, and after they are combined the gradients
    assert "tensor<256x2048xbf16>" in text  # logits of a chunk of a device: 1024 / 2 / 2 rows, 4096 / 2 columns


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"token_axis": "batch"}, r"token_axis is 'batch'; the mesh has axes 'data' \(4\), 'model' \(2\)"),
        ({"vocab_axis": ("model", "x")}, "vocab_axis is 'x'; the mesh has axes"),
        ({"token_axis": "data", "vocab_axis": "data"}, "an axis can shard one of the two"),
        ({"vocab_axis": "model"}, "vocab_axis is 'model': its 2 devices do not divide the vocabulary of 97"),
        (
            {"token_axis": "data"},
            "token_axis is 'data': its 4 devices do not divide the leading dimensions of hidden 33",
        ),
        ({"token_axis": "data", "implementation": "reference"}, "implementation='reference' cannot run: .* mesh"),
        (
            {"token_axis": "data", "implementation": "pallas_interpret"},
            "implementation='pallas_interpret' cannot run: .*jax.shard_map",
        ),
    ],
)
def test_bad_axes_are_named(change, words):
    T = 33 if "leading" in words else 32
    with jax.set_mesh(mesh_of((4, 2))), pytest.raises(ValueError, match=words):
        lm_head_loss(*problem(T=T), **change)


def test_an_axis_of_the_wrong_kind_is_named():
    with pytest.raises(TypeError, match="token_axis is 3; it must be the name of a mesh axis"):
        lm_head_loss(*problem(), token_axis=3)


def test_no_mesh_is_an_error_that_says_what_to_do():
    with pytest.raises(ValueError, match=r"token_axis is 'data'; there is no mesh: use jax.set_mesh"):
        lm_head_loss(*problem(), token_axis="data")
    with (
        jax.set_mesh(mesh_of((4, 2))),
        pytest.raises(ValueError, match=r"token_axis is 'data' and hidden has shape \[D\]; there is no dimension"),
    ):
        lm_head_loss(jnp.ones(24), problem().weight, jnp.int32(3), token_axis="data")


def in_shard_map(specs, check_vma=True, **options):
    p = Problem(*(batch()[name] for name in ("hidden", "weight", "labels")))
    local = functools.partial(lm_head_loss, implementation="xla", **options)
    return jax.shard_map(local, mesh=mesh_of((4, 2)), in_specs=specs, out_specs=P(), check_vma=check_vma)(*p)


def test_named_axes_without_vma_are_refused():
    with pytest.raises(ValueError, match=r"'data' is named inside of a jax.shard_map with check_vma=False"):
        in_shard_map((P("data"), P(), P("data")), check_vma=False, token_axis="data")


def test_axes_that_shard_nothing_are_refused():
    with pytest.raises(ValueError, match="token_axis is 'model' and hidden and labels are the same on all"):
        in_shard_map((P("data"), P(), P("data")), token_axis="model")
    with pytest.raises(ValueError, match="vocab_axis is 'model' and weight is the same on all"):
        in_shard_map((P("data"), P(), P("data")), token_axis="data", vocab_axis="model")
    with pytest.raises(ValueError, match="vocab_axis is 'model' and labels may differ between its devices"):
        in_shard_map((P("model"), P("model"), P("model")), vocab_axis="model")


def test_weights_that_differ_over_the_vocabulary_axis_are_refused():
    """Their gradients would come out too small: every device of the axis holds a share of the rule's sums."""
    mesh, arrays = mesh_of((4, 2)), batch()

    def local(hidden, weight, labels, weights):
        weights = lax.all_gather(weights, "model", axis=0, tiled=True)
        return lm_head_loss(hidden, weight, labels, token_weights=weights, implementation="xla", **AXES)

    specs = P("data"), P("model"), P("data"), P(("data", "model"))
    loss = jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=P())
    with pytest.raises(ValueError, match="vocab_axis is 'model' and token_weights may differ between its devices"):
        loss(*(arrays[name] for name in ("hidden", "weight", "labels", "token_weights")))


def test_axes_of_which_only_some_are_manual_are_refused():
    p = [batch()[name] for name in ("hidden", "weight", "labels")]
    local = functools.partial(lm_head_loss, implementation="xla", **AXES)
    specs = P("data"), P(), P("data")
    loss = jax.shard_map(local, mesh=mesh_of((4, 2)), in_specs=specs, out_specs=P(), axis_names={"data"})
    with pytest.raises(
        ValueError, match=r"of these only data is manual in this jax.shard_map; make all of them manual"
    ):
        jax.jit(loss)(*p)


def test_an_axis_named_twice_is_refused():
    with pytest.raises(ValueError, match=r"token_axis is \('data', 'data'\); it must name every axis once"):
        lm_head_loss(*problem(T=32), token_axis=("data", "data"))


@pytest.mark.parametrize(
    "sharded",
    [("weight", P(None, "data")), ("hidden", P(None, None, "data")), ("labels", P("data")), ("bias", P("model"))],
    ids=lambda pair: pair[0],
)
def test_explicit_axes_on_any_operand_are_understood(sharded):
    mesh = mesh_of((4, 2), AxisType.Explicit)
    name, spec = sharded
    with jax.set_mesh(mesh):
        arrays = {key: jax.device_put(a, NamedSharding(mesh, P())) for key, a in batch().items()}
        arrays[name] = jax.device_put(batch()[name], NamedSharding(mesh, spec))
        found = gradients(arrays, reduction="mean", **OPTIONS)
    assert_close(found, on_one_device("mean"))


def test_a_mesh_of_explicit_and_auto_axes():
    types = AxisType.Explicit, AxisType.Auto
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=types, devices=jax.devices("cpu")[:8])
    with jax.set_mesh(mesh):
        found = gradients(placed(mesh, P("model", None)), reduction="mean", **AXES, **OPTIONS)
    assert_close(found, on_one_device("mean"))


def test_second_derivatives_over_a_mesh():
    hidden, weight, labels = (batch()[name] for name in ("hidden", "weight", "labels"))

    def penalty(weight, **options):
        loss = functools.partial(lm_head_loss, num_chunks=2, implementation="xla", **options)
        return jnp.sum(jax.grad(loss)(hidden, weight, labels) ** 2)

    expected = jax.jit(jax.grad(penalty))(weight)
    with jax.set_mesh(mesh_of((4, 2))):
        found = jax.jit(jax.grad(functools.partial(penalty, **AXES)))(weight)
    assert_close(found, expected)


@pytest.mark.gpu
@pytest.mark.skipif(len(jax.devices()) < 2, reason="needs two GPUs")
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("shape", [(2, 1), (1, 2)], ids=["data", "model"])
def test_two_gpus_give_the_numbers_of_one(shape, reduction):
    p = problem(T=512, D=128, V=4096, dtype=jnp.bfloat16)
    loss = lambda x, W, **axes: jnp.sum(  # noqa: E731
        lm_head_loss(x, W, p.labels, num_chunks=2, implementation="pallas", reduction=reduction, **axes)
    )
    one = jax.jit(jax.value_and_grad(loss, (0, 1)))(p.hidden, p.weight)
    with jax.set_mesh(jax.make_mesh(shape, ("data", "model"), axis_types=(AxisType.Auto,) * 2)):
        two = jax.jit(jax.value_and_grad(functools.partial(loss, **AXES), (0, 1)))(p.hidden, p.weight)
    for a, b in zip(jax.tree.leaves(two), jax.tree.leaves(one), strict=True):
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        assert np.linalg.norm(a - b) <= 4e-3 * np.linalg.norm(b)
