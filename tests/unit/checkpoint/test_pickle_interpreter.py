"""The pickle interpreter: what it understands, and that everything else is refused by a reason."""

from __future__ import annotations

import pickle
import pickletools
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from serverlessllm.checkpoint.pickles.interpreter import read_state_dict
from serverlessllm.checkpoint.pickles.opcodes import OPCODE_NAMES
from serverlessllm.checkpoint.pickles.values import TensorView
from serverlessllm.core.errors import CheckpointError, UnsupportedCheckpoint
from serverlessllm.testing.hostile_pickles import HostilePickle, hostile_pickles
from serverlessllm.testing.torch_files import (
    HOOKS,
    REBUILD,
    number,
    numbers,
    pickle_of,
    state_dict,
    storage,
    tensor,
    text,
    tuple_of,
)

PLAIN = TensorView("a", "F32", "0", 16, 0, (4,), (1,))
HOSTILE = list(hostile_pickles())


def test_a_tensor() -> None:
    assert read_state_dict(state_dict({"a": tensor()})).tensors == (PLAIN,)


def test_what_is_beside_tensors_is_left_out() -> None:
    found = read_state_dict(
        state_dict(
            {
                "epoch": number(3),
                "lr": number(0.5),
                "a": tensor(),
                "none": b"N",
                "size": b"ctorch\nSize\n" + tuple_of([numbers([2, 3])]) + b"R",
                "dtype": b"ctorch\nfloat16\n",
                "device": b"ctorch\ndevice\n" + tuple_of([text("cpu")]) + b"R",
                "log": b"]" + text("x") + b"a",
            }
        )
    )
    assert found.tensors == (PLAIN,)


def test_what_torch_takes_beside_tensors_is_left_out_too() -> None:
    """The rest of `torch.load(weights_only=True)`: what optimizers and schedulers keep."""
    beside = {
        "milestones": Counter([30, 60]),
        "seen": {1, 2},
        "raw": bytearray(b"x"),
        "bytes": b"x",
        "complex": 1j,
        "by number": {0: "a", -1: "b", 1 << 60: "c", 0.5: "d", None: "e", True: "f"},
    }
    for protocol in (2, 3):
        body = pickle.dumps(beside, protocol)[2:-1]
        made = state_dict({"a": tensor()})[:-1] + text("beside") + body + b"s."
        assert read_state_dict(made).tensors == (PLAIN,)


def test_tensors_in_a_counter_are_found() -> None:
    hidden = b"ccollections\nCounter\n}" + text("x") + tensor() + b"s\x85R"
    with pytest.raises(UnsupportedCheckpoint, match="'b' holds tensors in a container"):
        read_state_dict(state_dict({"a": tensor(), "b": hidden}))
    numbered = pickle_of(b"}" + text("a") + tensor() + b"sK\x07]" + tensor() + b"as")
    with pytest.raises(UnsupportedCheckpoint, match="'7' holds tensors in a container"):
        read_state_dict(numbered)


@pytest.mark.parametrize("wrapper", ["state_dict", "model_state_dict", "model", "module"])
def test_known_wrappers_are_opened(wrapper: str) -> None:
    inner = b"}" + text("a") + tensor() + b"s"
    optimizer = b"}" + text("m") + tensor() + b"s"
    data = state_dict({"epoch": number(1), wrapper: inner, "optimizer": optimizer})
    assert read_state_dict(data) == ((PLAIN,), (wrapper,))


def test_wrappers_within_wrappers_and_names_that_only_look_like_one() -> None:
    inner = b"}" + text("model") + b"}" + text("a") + tensor() + b"ss"
    assert read_state_dict(state_dict({"state_dict": inner})).wrapped_in == ("state_dict", "model")
    hyper = b"}" + text("name") + text("llama") + b"s"
    assert read_state_dict(state_dict({"model": hyper, "a": tensor()})) == ((PLAIN,), ())


def test_a_parameter_is_its_tensor() -> None:
    made = b"ctorch._utils\n_rebuild_parameter\n" + tuple_of([tensor(), b"\x88", HOOKS]) + b"R"
    assert read_state_dict(state_dict({"a": made})).tensors == (PLAIN,)


def test_untyped_storage_with_a_type_of_its_own() -> None:
    untyped = storage(b"ctorch.storage\nUntypedStorage\n", elements=number(4))
    made = (
        b"ctorch._utils\n_rebuild_tensor_v3\n"
        + tuple_of(
            [
                untyped,
                number(0),
                numbers([4]),
                numbers([1]),
                b"\x89",
                HOOKS,
                b"ctorch\nfloat8_e4m3fn\n",
            ]
        )
        + b"R"
    )
    (view,) = read_state_dict(state_dict({"a": made})).tensors
    assert (view.dtype, view.storage_bytes) == ("F8_E4M3", 4)


def test_metadata_of_a_module_is_passed_over() -> None:
    module = (
        b"ccollections\nOrderedDict\n)R"
        + text("a")
        + tensor()
        + b"s}"
        + text("_metadata")
        + HOOKS
        + b"sb"
    )
    assert read_state_dict(pickle_of(module)).tensors == (PLAIN,)


@pytest.mark.parametrize("case", HOSTILE, ids=[case.name for case in HOSTILE])
def test_hostile_pickles_are_refused(case: HostilePickle) -> None:
    with pytest.raises(case.error) as refused:
        read_state_dict(case.data)
    assert refused.value.message.isprintable()
    assert len(refused.value.message) < 1000


def test_a_refusal_names_what_and_where() -> None:
    with pytest.raises(
        UnsupportedCheckpoint, match=r"byte 2 of the pickle: refers to 'os\.system'"
    ):
        read_state_dict(b"\x80\x02cos\nsystem\n(X\x04\0\0\0truetR.")
    with pytest.raises(UnsupportedCheckpoint, match=r"byte 3 of the pickle: opcode EXT1"):
        read_state_dict(b"\x80\x02N\x82\x01.")
    for full, says in (
        ("torch.nn.modules.linear Linear", r"a whole model.*model\.state_dict\(\)"),
        ("transformers.models.llama.modeling_llama LlamaForCausalLM", "save_pretrained"),
        ("numpy._core.multiarray scalar", r"'numpy\._core\.multiarray\.scalar', a NumPy.*item\(\)"),
        ("pathlib PosixPath", "an object of a program"),
    ):
        name = full.replace(" ", "\n").encode()
        with pytest.raises(UnsupportedCheckpoint, match=f"byte 2 of the pickle: .*{says}"):
            read_state_dict(pickle_of(b"c" + name + b"\n"))
    with pytest.raises(UnsupportedCheckpoint, match="quantized"):
        read_state_dict(pickle_of(b"ctorch._utils\n_rebuild_qtensor\n"))


def test_each_opcode_of_pickle_is_known_or_refused_by_its_name() -> None:
    for opcode in pickletools.opcodes:
        with pytest.raises(CheckpointError) as refused:
            read_state_dict(b"\x80\x02" + opcode.code.encode("latin1"))
        assert (opcode.name in refused.value.message) == (ord(opcode.code) in OPCODE_NAMES)


@settings(deadline=None)
@given(st.binary(max_size=200))
def test_any_bytes_are_read_or_refused(data: bytes) -> None:
    with pytest.raises(CheckpointError):
        read_state_dict(b"\x80\x02" + data)


GOOD = state_dict({"a": tensor(), "b": REBUILD + tuple_of([storage(), number(0)]) + b"0N"})


@settings(deadline=None)
@given(st.integers(0, len(GOOD) - 1), st.integers(0, 255))
def test_no_byte_that_changes_makes_it_raise_anything_else(position: int, value: int) -> None:
    data = bytearray(GOOD)
    data[position] = value
    try:
        read_state_dict(bytes(data))
    except CheckpointError:
        return


json_like = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**63 - 1)
    | st.text(max_size=5)
    | st.floats(),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.tuples(inner, inner)
        | st.dictionaries(st.text(max_size=3), inner, max_size=3)
    ),
    max_leaves=10,
)


@settings(deadline=None)
@given(json_like, st.sampled_from([2, 3, 4, 5]))
def test_plain_values_of_every_protocol_are_understood(value: object, protocol: int) -> None:
    with pytest.raises(UnsupportedCheckpoint, match="tensors"):
        read_state_dict(pickle.dumps(value, protocol))
