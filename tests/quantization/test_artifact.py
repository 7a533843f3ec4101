"""The artifact file: round trip to the bit, refusals, and the size limit."""

import doctest
import hashlib
import json
import re
import tracemalloc

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from fairway.errors import UserError
from fairway.model.gpt import GPT
from fairway.model.spec import BANKS, GPTConfig, parameters
from fairway.quantization import artifact
from fairway.quantization.artifact import (
    PREAMBLE,
    encode_artifact,
    load_artifact,
    quantizable,
    read_artifact,
    restored,
    storable,
    stream_table,
)
from fairway.quantization.coding import pack
from fairway.quantization.integers import QuantizedTensor, round_to_nearest
from fairway.quantization.pruning import fit_to_limit
from fairway.quantization.quantizers.gptq import Gptq
from producers import write_artifact

CONFIG = GPTConfig(
    vocab_size=48,
    sequence_tokens=16,
    layers=2,
    width=16,
    heads=2,
    kv_heads=1,
    mlp_width=24,
    rotary_dimensions=4,
    rope_trained_tokens=16,
    bigram_buckets=32,
    bigram_width=8,
    value_width=8,
    value_layers=(1,),
)
GPTQ = Gptq(Gptq.Settings())


def random_model(config=CONFIG):
    """A model none of whose parameters is zero."""
    model = GPT(config)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return model


def stored_tensors(model, bits=6, group_columns=None):
    matrices = quantizable(model).items()
    return storable(
        model, {name: round_to_nearest(matrix, bits, group_columns) for name, matrix in matrices}
    )


@pytest.fixture
def written(tmp_path):
    model = random_model()
    tensors = stored_tensors(model)
    path = tmp_path / "artifact.bin"
    size = write_artifact(path, model.config, tensors)
    assert size == path.stat().st_size
    return path, tensors


def resealed(body):
    """`body` with a checksum that matches: what a stranger can always make."""
    return body + hashlib.sha256(body).digest()


def with_header(path, change):
    """The artifact at `path` with its header changed by `change(header)` and a right checksum."""
    data = path.read_bytes()[: -artifact.CHECKSUM_BYTES]
    magic, version, length = PREAMBLE.unpack_from(data)
    header = json.loads(data[PREAMBLE.size : PREAMBLE.size + length])
    change(header)
    text = json.dumps(header, sort_keys=True).encode()
    payload = data[PREAMBLE.size + length :]
    path.write_bytes(resealed(PREAMBLE.pack(magic, version, len(text)) + text + payload))


def test_every_parameter_is_stored_as_the_table_says():
    tensors, table = stored_tensors(random_model()), parameters(CONFIG)
    assert list(tensors) == list(table)
    kinds = {name: artifact.kind_of(tensor) for name, tensor in tensors.items()}
    assert set(kinds.values()) == {"int6", "int8", "float16", "float32"}
    for name, parameter in table.items():
        assert kinds[name] == parameter.storage.replace("quantized", "int6")


def test_what_a_quantizer_forgot_or_reshaped_is_named():
    model = random_model()
    tensors = {name: round_to_nearest(matrix, 6) for name, matrix in quantizable(model).items()}
    flat = tensors["mlp_up_bank"].codes.flatten(0, 1), tensors["mlp_up_bank"].scales.flatten()
    with pytest.raises(
        UserError, match=r"codes \(48, 16\) for mlp_up_bank, expected \(2, 24, 16\)"
    ):
        storable(model, {**tensors, "mlp_up_bank": QuantizedTensor(*flat, 6)})
    del tensors["mlp_up_bank"]
    with pytest.raises(UserError, match="no codes for mlp_up_bank"):
        storable(model, tensors)


@pytest.mark.parametrize(("bits", "group_columns"), [(6, None), (4, 8), (8, 5), (2, 100)])
def test_round_trip_gives_the_same_bits(tmp_path, bits, group_columns):
    path, tensors = tmp_path / "artifact.bin", stored_tensors(random_model(), bits, group_columns)
    write_artifact(path, CONFIG, tensors)
    config, state = read_artifact(path)
    assert config == CONFIG
    expected = restored(tensors)
    assert state.keys() == expected.keys()
    for name, tensor in expected.items():
        assert state[name].dtype == torch.float32
        assert torch.equal(state[name], tensor), name


def codes_of(bits):
    limit = 2 ** (bits - 1) - 1
    shapes = hnp.array_shapes(min_dims=2, max_dims=3, max_side=6)
    return hnp.arrays("i1", shapes, elements=st.integers(-limit, limit))


@st.composite
def quantized_tensors(draw):
    bits = draw(st.integers(2, 8))
    codes = torch.from_numpy(draw(codes_of(bits)))
    if draw(st.booleans()):  # the memory need not be in row-major order
        codes = codes.mT.contiguous().mT
    group_columns = draw(st.none() | st.integers(1, 7))
    groups = [] if group_columns is None else [-(-codes.shape[-1] // group_columns)]
    shape = (*codes.shape[:-1], *groups)
    numbers = st.floats(2**-24, 60000, width=16)
    scales = torch.from_numpy(draw(hnp.arrays("f2", shape, elements=numbers)))
    return QuantizedTensor(codes, scales, bits, group_columns)


floats = st.sampled_from(["f2", "f4"]).flatmap(
    lambda dtype: hnp.arrays(
        dtype,
        hnp.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=5),
        elements=st.floats(-1000, 1000, width=16),
    )
)
any_tensors = st.dictionaries(
    st.text(max_size=8), quantized_tensors() | floats.map(torch.from_numpy), max_size=5
)


@settings(max_examples=40, deadline=None)
@given(tensors=any_tensors)
def test_any_tensors_come_back_to_the_bit(tmp_path_factory, tensors):
    path = tmp_path_factory.mktemp("any") / "artifact.bin"
    write_artifact(path, CONFIG, tensors)
    config, state = read_artifact(path)
    assert config == CONFIG and list(state) == sorted(tensors)
    for name, value in restored(tensors).items():
        assert torch.equal(state[name], value) and state[name].shape == value.shape


@pytest.mark.parametrize(("bits", "tail"), [*((6, tail) for tail in range(5)), (8, 0)])
def test_every_code_comes_back_at_any_length(tmp_path, bits, tail):
    limit = 2 ** (bits - 1) - 1
    codes = torch.tensor([[*range(-limit, limit + 1), *range(tail)]], dtype=torch.int8)
    tensor = QuantizedTensor(codes, torch.ones(1, dtype=torch.float16), bits)
    write_artifact(tmp_path / "artifact.bin", CONFIG, {"codes": tensor})
    assert torch.equal(read_artifact(tmp_path / "artifact.bin")[1]["codes"], codes.float())


def test_the_documented_example_runs(written, monkeypatch):
    path, _ = written
    monkeypatch.chdir(path.parent)
    (example,) = doctest.DocTestFinder().find(load_artifact, globs={"torch": torch})
    assert example.examples and doctest.DocTestRunner().run(example).failed == 0


def test_loaded_model_gives_bitwise_the_same_losses(written):
    path, tensors = written
    in_memory = random_model()
    in_memory.load_state_dict(restored(tensors))
    tokens = torch.randint(48, (3, 17), generator=torch.Generator().manual_seed(1))
    loaded = load_artifact(path)
    with torch.no_grad():
        assert torch.equal(loaded(tokens[:, :-1]), in_memory(tokens[:, :-1]))
        assert loaded.loss(tokens[:, :-1], tokens[:, 1:]) == in_memory.loss(
            tokens[:, :-1], tokens[:, 1:]
        )


def test_bytes_do_not_depend_on_the_order_of_keys():
    tensors = stored_tensors(random_model())
    config = GPTConfig(**dict(reversed(CONFIG.model_dump().items())))
    backwards = encode_artifact(config, dict(reversed(tensors.items())))
    assert encode_artifact(CONFIG, tensors) == backwards


def test_empty_tensors_survive(tmp_path):
    model = random_model(config=CONFIG.changed(layers=1, value_layers=()))
    assert model.skip_weights.numel() == 0
    write_artifact(tmp_path / "a.bin", model.config, stored_tensors(model))
    load_artifact(tmp_path / "a.bin")


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_any_changed_byte_is_found_by_the_checksum(tmp_path_factory, data):
    content = encode_artifact(CONFIG, stored_tensors(random_model()))
    position = data.draw(st.integers(0, len(content) - 1))
    flipped = bytearray(content)
    flipped[position] ^= data.draw(st.integers(1, 255))
    path = tmp_path_factory.mktemp("damaged") / "artifact.bin"
    path.write_bytes(flipped)
    with pytest.raises(UserError, match="checksum"):
        read_artifact(path)


@pytest.mark.parametrize("kept", [0, 1, 15, 16, 47, 48, 60, 1000, -1])
def test_a_truncated_file_is_found_by_the_checksum(written, kept):
    path, _ = written
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(UserError, match="checksum"):
        read_artifact(path)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(UserError, match="missing"):
        read_artifact(tmp_path / "artifact.bin")


def every_stream(entry):
    return dict.fromkeys(("int6", "int8", "scales", "float16", "float32"), entry)


def entry(kind, shape, *group_columns):
    return {"token_embedding": [kind, shape, *group_columns]}


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("config", [], "config is not"),
        ("tensors", [], "tensors is not"),
        ("tensors", {"token_embedding": "ab"}, "the entry of token_embedding"),
        ("tensors", {"token_embedding": ["int8"]}, "the entry of token_embedding"),
        ("tensors", entry("int8", [4, 4], 2, True, 2), "the entry of token_embedding"),
        ("tensors", entry("int8", [4, 4], 2, 2), "the input scales of token_embedding"),
        ("tensors", entry("float16", [4, 4], None, True), "the input scales of token_embedding"),
        ("tensors", entry("int9", [4, 4]), "the kind of token_embedding"),
        ("tensors", entry("scales", [4, 4]), "the kind of token_embedding"),
        ("tensors", entry(["int8"], [4, 4]), "the kind of token_embedding"),
        ("tensors", entry("int8", [-1, 4]), "the shape of token_embedding"),
        ("tensors", entry("int8", [True, 4]), "the shape of token_embedding"),
        ("tensors", entry("int8", [4]), "the shape of token_embedding"),
        ("tensors", entry("int8", "ab"), "the shape of token_embedding"),
        ("tensors", entry("int8", [1] * 5), "the shape of token_embedding"),
        ("tensors", entry("int8", [4, 4], 0), "the groups of token_embedding"),
        ("tensors", entry("int8", [4, 4], True), "the groups of token_embedding"),
        ("tensors", entry("int8", [4, 4], "2"), "the groups of token_embedding"),
        ("tensors", entry("float16", [4, 4], 2), "the groups of token_embedding"),
        ("tensors", entry("float32", [4, 4]), "the list of streams"),
        ("streams", {**every_stream(["lzma", 1]), "int4": ["lzma", 1]}, "the list of streams"),
        ("streams", {"int6": ["lzma", 1]}, "the list of streams"),
        ("streams", every_stream(["zip", 1]), "the codec"),
        ("streams", every_stream([["lzma"], 1]), "the codec"),
        ("streams", every_stream(["lzma"]), "the list of streams"),
        ("streams", every_stream(["lzma", True]), "a stream's length"),
        ("streams", every_stream(["lzma", 1]), "the payload's length"),
    ],
)
def test_a_strangers_header_is_checked(written, key, value, message):
    path, _ = written
    with_header(path, lambda header: header.update({key: value}))
    with pytest.raises(UserError, match=message):
        read_artifact(path)


@pytest.mark.parametrize(
    "changed",
    [
        {"token_embedding": ["int8", [1 << 40, 1 << 40]]},
        {"token_embedding": ["int8", [1 << 40, 0, 1 << 40]]},
        # So few codes that their scales alone are too many.
        {"token_embedding": ["int8", [1 << 29, 1, 1]], "mlp_up_bank": ["int6", [0, 1]]},
    ],
)
def test_a_file_that_would_unpack_to_too_much_is_refused(written, changed):
    path, _ = written
    with_header(path, lambda header: header["tensors"].update(changed))
    with pytest.raises(UserError, match="the sum of the shapes"):
        read_artifact(path)


def test_groups_wider_than_any_matrix_take_no_memory(tmp_path):
    path, tensors = tmp_path / "artifact.bin", stored_tensors(random_model(), 4, group_columns=100)
    write_artifact(path, CONFIG, tensors)
    kinds = {name: [kind, shape, 1 << 70] for name, (kind, shape, _) in grouped(path).items()}
    with_header(path, lambda header: header["tensors"].update(kinds))
    _, state = read_artifact(path)
    assert all(torch.equal(state[name], value) for name, value in restored(tensors).items())


def grouped(path):
    """The header's entries of tensors in groups of columns."""
    found = {}
    with_header(path, lambda header: found.update(header["tensors"]))
    return {name: entry for name, entry in found.items() if len(entry) == 3}


def test_a_parameter_that_the_model_does_not_know_is_refused(written):
    path, tensors = written
    write_artifact(path, CONFIG, {**tensors, "__class__": torch.ones(2, 3)})
    with pytest.raises(UserError, match="__class__"):
        load_artifact(path)


@pytest.mark.parametrize("text", [b"[1]", b"{", b"\xff", b"[" * 60000])
def test_a_header_that_is_no_json_object_is_refused(tmp_path, text):
    path = tmp_path / "artifact.bin"
    path.write_bytes(resealed(PREAMBLE.pack(artifact.MAGIC, artifact.VERSION, len(text)) + text))
    with pytest.raises(UserError, match="header"):
        read_artifact(path)


@pytest.mark.parametrize(
    ("magic", "version", "length", "message"),
    [
        (b"PK\3\4\0\0\0\0", 1, 0, "it is no artifact"),
        (artifact.MAGIC, 2, 0, "version 2 found, 3 expected: rerun the gptq stage"),
        (artifact.MAGIC, artifact.VERSION, 2**32 - 1, "the header's length"),
    ],
)
def test_a_foreign_preamble_is_refused(tmp_path, magic, version, length, message):
    path = tmp_path / "artifact.bin"
    path.write_bytes(resealed(PREAMBLE.pack(magic, version, length)))
    with pytest.raises(UserError, match=message):
        read_artifact(path)


def test_the_range_coder_is_for_codes_alone(written):
    path, _ = written
    with_header(path, lambda header: header["streams"]["float32"].__setitem__(0, "range"))
    with pytest.raises(UserError, match="the codec"):
        read_artifact(path)


def test_the_table_of_streams_accounts_for_every_byte(written):
    path, tensors = written
    data = path.read_bytes()
    table = stream_table(data)
    _, _, header_bytes = PREAMBLE.unpack_from(data)
    frame = PREAMBLE.size + header_bytes + artifact.CHECKSUM_BYTES
    assert frame + sum(length for _, length in table.values()) == len(data)
    for forced in ("lzma", "range"):
        codecs = {**dict.fromkeys(table, "lzma"), "int6": forced, "int8": forced}
        encoded = encode_artifact(CONFIG, tensors, codecs)
        assert {name: codec for name, (codec, _) in stream_table(encoded).items()} == codecs
        path.write_bytes(encoded)
        _, state = read_artifact(path)
        assert all(torch.equal(state[name], value) for name, value in restored(tensors).items())


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_a_strangers_payload_gives_weights_or_one_clear_error(tmp_path_factory, data):
    """Bytes changed under a checksum that matches: what no checksum protects from."""
    codecs = {**every_stream("lzma"), "int6": "range", "int8": "range"}
    model = random_model()
    content = encode_artifact(CONFIG, stored_tensors(model), codecs)
    body = bytearray(content[: -artifact.CHECKSUM_BYTES])
    payload_start = len(body) - sum(length for _, length in stream_table(content).values())
    for _ in range(data.draw(st.integers(1, 4))):
        body[data.draw(st.integers(payload_start, len(body) - 1))] = data.draw(st.integers(0, 255))
    path = tmp_path_factory.mktemp("hostile") / "artifact.bin"
    path.write_bytes(resealed(bytes(body)))
    try:
        _, state = read_artifact(path)
    except UserError:
        return
    assert {name: value.shape for name, value in state.items()} == {
        name: value.shape for name, value in model.state_dict().items()
    }


def test_weights_that_are_not_finite_are_refused(written):
    path, tensors = written
    tensors["smear_gate"][0] = torch.nan
    write_artifact(path, CONFIG, tensors)
    with pytest.raises(UserError, match="smear_gate holds values that are not finite"):
        read_artifact(path)
    model = random_model()
    model.state_dict()["bigram_projection"][0, 0] = 1e6
    with pytest.raises(UserError, match=r"bigram_projection .* torch\.float16"):
        storable(model, stored_tensors(random_model()))


def zeros_stream(length: int) -> bytes:
    """LZMA of `length` zeros, a multiple of 2 MiB: its chunks need nothing of those before them."""
    _, data = pack([np.zeros(1 << 21, np.int8)], "lzma")
    return data[:-1] * (length >> 21) + data[-1:]


@pytest.mark.parametrize("declared", [3 << 30, 1 << 30, 1 << 20])
def test_a_small_file_that_unpacks_to_3_gib_takes_little_memory(tmp_path, declared):
    payload = zeros_stream(3 << 30)
    header = {
        "config": CONFIG.model_dump(mode="json"),
        "tensors": {"mlp_up_bank": ["float32", [declared // 4]]},
        "streams": {"float32": ["lzma", len(payload)]},
    }
    text = json.dumps(header).encode()
    path = tmp_path / "artifact.bin"
    preamble = PREAMBLE.pack(artifact.MAGIC, artifact.VERSION, len(text))
    path.write_bytes(resealed(preamble + text + payload))
    assert path.stat().st_size < 1 << 20
    tracemalloc.start()
    with pytest.raises(
        UserError, match=r"artifact.bin: (the sum of the shapes|a stream's unpacked)"
    ):
        load_artifact(path)
    assert tracemalloc.get_traced_memory()[1] < 1 << 24
    tracemalloc.stop()


@pytest.mark.parametrize(
    ("name", "code", "kind"),
    [("mlp_up_bank", 32, "int6"), ("mlp_up_bank", -32, "int6"), ("token_embedding", -128, "int8")],
)
def test_codes_out_of_range_are_refused(written, name, code, kind):
    path, tensors = written
    tensors[name].codes.view(-1)[0] = code
    write_artifact(path, CONFIG, tensors)
    with pytest.raises(UserError, match=f"{kind} allows"):
        read_artifact(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"layers": 10**9}, "weights for"),
        ({"layers": "two"}, "model.layers"),
        ({"heads": 0}, "model.heads"),
        ({"heads": 3}, "model.heads 3"),
        ({"width": 16.5}, "model.width"),
        ({"rope_base": None}, "model.rope_base"),
        ({"value_layers": [5]}, "model.value_layers"),
        ({"value_layers": 1}, "model.value_layers"),
        ({"value_layers": [-1]}, "model.value_layers"),
        ({"layerz": 1}, "unknown key layerz; did you mean layers"),
    ],
)
def test_a_strangers_configuration_is_checked(written, change, message):
    path, _ = written
    with_header(path, lambda header: header["config"].update(change))
    with pytest.raises(UserError, match=message):
        load_artifact(path)


def test_a_setting_that_an_older_file_does_not_have_takes_its_default(written):
    path, _ = written
    with_header(path, lambda header: header["config"].pop("logit_softcap"))
    config, _ = read_artifact(path)
    assert config == CONFIG and load_artifact(path).config == CONFIG


def ones(tensor: QuantizedTensor) -> torch.Tensor:
    return tensor.codes.abs() == 1


def limit_model():
    """Large enough that the header is a small part of the artifact."""
    bigger = {"width": 64, "mlp_width": 128, "layers": 3, "value_layers": (1, 2)}
    return random_model(config=CONFIG.changed(**bigger))


def test_an_artifact_within_the_limit_is_left_alone():
    model = limit_model()
    tensors = stored_tensors(model)
    whole = encode_artifact(model.config, tensors)
    data, fitted, zeroed = fit_to_limit(model.config, tensors, len(whole), GPTQ)
    assert data == whole and zeroed == 0 and fitted == tensors


@pytest.mark.parametrize("excess_bytes", [1, 100, 500])
def test_cheapest_ones_are_zeroed_until_the_artifact_fits(excess_bytes):
    model = limit_model()
    config, tensors = model.config, stored_tensors(model)
    limit = len(encode_artifact(config, tensors)) - excess_bytes
    data, fitted, zeroed = fit_to_limit(config, tensors, limit, GPTQ)
    assert data == encode_artifact(config, fitted) and limit * 0.97 <= len(data) <= limit
    removed_scales, kept_scales = [], []
    for name in BANKS:
        removed = fitted[name].codes != tensors[name].codes
        assert (fitted[name].codes[removed] == 0).all() and ones(tensors[name])[removed].all()
        scales = tensors[name].scales.unsqueeze(-1).expand(removed.shape)
        removed_scales.append(scales[removed])
        kept_scales.append(scales[ones(fitted[name])])
    assert sum(len(part) for part in removed_scales) == zeroed > 0
    assert torch.cat(removed_scales).max() <= torch.cat(kept_scales).min()


def test_a_limit_out_of_reach_is_an_error():
    model = limit_model()
    with pytest.raises(UserError, match=r"budgets\.artifact_bytes"):
        fit_to_limit(model.config, stored_tensors(model), 1000, GPTQ)


def test_the_error_names_a_scale_factor_that_makes_the_artifact_fit():
    weights = torch.randn(4, 256, 512, generator=torch.Generator().manual_seed(0))
    hessians = {("query_output_bank", index): torch.eye(512) for index in range(4)}

    def stored(scale_factor):
        quantizer = Gptq(Gptq.Settings(block_columns=8, scale_factor=scale_factor))
        return quantizer.quantize({"query_output_bank": weights}, hessians)[0]

    limit = round(0.8 * len(encode_artifact(CONFIG, stored(1.0))))
    with pytest.raises(UserError) as raised:
        fit_to_limit(CONFIG, stored(1.0), limit, GPTQ)
    factor = float(re.search(r"gptq\.scale_factor by ([0-9.]+)", str(raised.value))[1])
    assert 1 < factor < 4
    _, fitted, _ = fit_to_limit(CONFIG, stored(factor), limit, GPTQ)
    assert limit * 0.95 < len(encode_artifact(CONFIG, fitted)) <= limit


def test_codes_in_groups_are_zeroed_by_their_own_scale():
    model = limit_model()
    tensors = stored_tensors(model, bits=4, group_columns=20)
    limit = len(encode_artifact(model.config, tensors)) - 200
    _, fitted, zeroed = fit_to_limit(model.config, tensors, limit, GPTQ)
    assert limit * 0.97 <= len(encode_artifact(model.config, fitted)) <= limit
    removed_scales, kept_scales = [], []
    for name in BANKS:
        removed = fitted[name].codes != tensors[name].codes
        scales = tensors[name].steps().expand(removed.shape)
        removed_scales.append(scales[removed])
        kept_scales.append(scales[ones(fitted[name])])
    assert sum(map(len, removed_scales)) == zeroed > 0
    assert torch.cat(removed_scales).max() <= torch.cat(kept_scales).min()


def test_embeddings_are_never_zeroed_even_where_matrices_have_8_bits():
    model = limit_model()
    tensors = stored_tensors(model, bits=8)
    limit = len(encode_artifact(model.config, tensors)) - 200
    _, fitted, zeroed = fit_to_limit(model.config, tensors, limit, GPTQ)
    assert zeroed > 0
    for name in ("token_embedding", "bigram_embedding", "value_embedding"):
        assert torch.equal(fitted[name].codes, tensors[name].codes)


def test_ternary_codes_are_not_zeroed_and_the_error_says_so():
    model = limit_model()
    tensors = stored_tensors(model, bits=2, group_columns=32)
    limit = len(encode_artifact(model.config, tensors)) - 200
    with pytest.raises(UserError, match="codes of 2 bits are not zeroed"):
        fit_to_limit(model.config, tensors, limit, GPTQ)
