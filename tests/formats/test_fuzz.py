"""A thousand damaged vector files: a clear error of ours or a correct load, never a crash, a hang or a wrong load."""

import base64
import io
import json
import random
import resource
import struct
import time
import warnings
import zipfile

import numpy as np
import pytest
import torch
from vector_files import originals

from steerable.formats import import_file
from steerable.store.errors import SteerableError

ROUNDS = 1000


def cut(data, rng):
    return data[: rng.randrange(len(data))]


def flip_bits(data, rng):
    out = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 8))):
        out[rng.randrange(len(out))] ^= 1 << rng.randrange(8)
    return bytes(out)


def flip_header_bits(data, rng):
    out = bytearray(data)
    out[rng.randrange(min(len(out), 400))] ^= 1 << rng.randrange(8)
    return bytes(out)


def huge_length(data, rng):
    """A length in the header becomes enormous."""
    out, at = bytearray(data), rng.randrange(max(1, min(len(data) - 8, 300)))
    out[at : at + 8] = struct.pack("<Q", rng.choice((2**63 - 1, 2**40, 2**32, 2**31 - 1, 10**9)))
    return bytes(out)


def not_a_number(data, rng):
    """A number of the payload becomes NaN or infinite; in text, the words."""
    if data[:1] == b"{":
        return data.replace(b"0.", rng.choice((b"NaN,", b"1e999", b"Infinity", b"-0.")), rng.choice((1, 1, 3)))
    out, at = bytearray(data), rng.randrange(len(data) - 4)
    out[at : at + 4] = struct.pack("<f", rng.choice((float("nan"), float("inf"), -float("inf"))))
    return bytes(out)


def insert(data, rng):
    at = rng.randrange(len(data))
    return data[:at] + rng.randbytes(rng.choice((1, 2, 32, 64))) + data[at:]


def append(data, rng):
    return data + rng.randbytes(rng.choice((1, 31, 64, 5000)))


WORDS = (
    (b"direction.1", b"direction.7"), (b"direction.1", b"direction.0"), (b"direction.1", b"directiox.1"),
    (b"layer1.v", b"layer9.v"), (b"layer1.v", b"layer1.u"), (b'"1":', b'"0":'), (b'"1":', b'"x":'),
    (b"resid_post.1", b"resid_post.2"), (b"resid_post", b"resid_pots"), (b"layers.1", b"layers.2"),
    (b"F32", b"F64"), (b"F32", b"I32"), (b"F32", b"F16"), (b"[16]", b"[17]"), (b"[16]", b"[99]"), (b"[16]", b"[-1]"),
    (b"FloatStorage", b"LongxStorage"), (b"FloatStorage", b"DoubleStorag"), (b"_tensor_v2", b"_tensor_v9"),
    (b"torch._utils", b"posix\nsystem"), (b"collections", b"builtinsxxx"), (b"mean", b"maen"), (b"overall", b"overalx"),
    (b"controlvector", b"controlxvctor"), (b"mean_diff", b"spherical"), (b"BEFT", b"LORA"), (b"coeff", b"coefx"),
    (b"steering_vector", b"steering_vectox"), (b"vector", b"victor"), (b"axis", b"exis"), (b"data.pkl", b"data.pxl"),
)  # fmt: skip


def rename(data, rng):
    fitting = [pair for pair in WORDS if pair[0] in data]
    return data.replace(*rng.choice(fitting), rng.choice((1, -1))) if fitting else flip_bits(data, rng)


def rezip(data, rng):
    """The archive made anew, with right checksums: bombs, missing, extra and altered members."""
    if data[:2] != b"PK":
        return rename(data, rng)
    out, kind = io.BytesIO(), rng.choice(("bomb", "extra", "drop", "pickle", "payload", "double"))
    method = zipfile.ZIP_DEFLATED if kind == "bomb" else zipfile.ZIP_STORED
    with warnings.catch_warnings(), zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(out, "w", method) as new:
        warnings.simplefilter("ignore")
        for name in old.namelist():
            content = old.read(name)
            if kind == "bomb" and name.endswith("data/0"):
                content = bytes(20_000_000)
            elif kind == "drop" and rng.random() < 0.3:
                continue
            elif kind == "pickle" and name.endswith("data.pkl"):
                content = flip_bits(content, rng)
            elif kind == "payload" and "/data/" in name and content:
                content = rng.choice((not_a_number, cut, append, flip_bits))(content + bytes(8), rng)
            new.writestr(name, content)
            if kind == "double" and rng.random() < 0.3:
                new.writestr(name, flip_bits(content, rng) if content else b"x")
        if kind == "extra":
            new.writestr("archive/data/999", rng.randbytes(64))
    return out.getvalue()


MUTATIONS = (
    cut, flip_bits, flip_bits, flip_header_bits, flip_header_bits, huge_length, not_a_number, insert, append, rename,
    rename, rezip, rezip,
)  # fmt: skip


def rows_in(value):
    """Every vector in what torch loaded."""
    if isinstance(value, torch.Tensor):
        return list(value.reshape(-1, value.shape[-1]).float()) if value.dim() else []
    if isinstance(value, dict):
        value = list(value.values())
    return [row for part in value for row in rows_in(part)] if isinstance(value, list | tuple) else []


def held(data, v):
    """Whether a file holds this vector: torch finds it, its numbers are in the JSON, or its bytes in any float type."""
    if data[:2] == b"PK":
        return any(torch.equal(v, row) for row in rows_in(torch.load(io.BytesIO(data), weights_only=True)))
    if data[:1] == b"{":
        found = json.loads(data)["directions"].values()
        return any(torch.tensor(numbers).flatten().tolist() == v.tolist() for numbers in found)
    kinds = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
    exact = [v.to(kind) for kind in kinds if torch.equal(v.to(kind).float(), v)]
    return any(t.contiguous().view(torch.uint8).numpy().tobytes() in data for t in exact)


def expected(name, data, direction):
    """Vectors that the file truly holds, recomputed here where they are not in it as they are."""
    if name == "brainpatch":  # its checksums stand for every number
        return False
    if name == "vllm-lens":
        (entry,) = json.loads(data)
        wire = entry["activations"]
        table = np.frombuffer(base64.b64decode(wire["data"]), wire["dtype"]).reshape(wire["shape"]).astype(np.float32)
        return all(v.tolist() in table.tolist() for v in direction.vectors.values())
    if name == "mean-vectors":
        means = torch.load(io.BytesIO(data), weights_only=True)
        (label,) = {direction.behaviour}
        raw = means[label]["mean"].double() - means["overall"]["mean"].double()
        scale = means["overall"]["mean"].double().norm(dim=1) / raw.norm(dim=1)
        return all(torch.equal(v, (raw * scale[:, None]).float()[s.layer]) for s, v in direction.vectors.items())
    factors = {1.0}
    if name == "lm-eval":  # coefficients that differ are multiplied in
        factors |= set(direction.stats["imported"].get("coefficients", {}).values())
    return all(any(f and held(data, (v.double() / f).float()) for f in factors) for v in direction.vectors.values())


@pytest.mark.filterwarnings("ignore")
def test_a_thousand_damaged_files(tmp_path):
    sound, rng = originals(tmp_path), random.Random(20251)
    kept = {name: import_at(tmp_path, name, data, options) for name, (data, options) in sound.items()}
    assert all(direction.layers for direction in kept.values())
    names, refused, loaded, slowest = sorted(sound), 0, 0, 0.0
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for trial in range(ROUNDS):
        name = names[trial % len(names)]
        original, options = sound[name]
        mutate = MUTATIONS[rng.randrange(len(MUTATIONS))]
        data, start = mutate(original, rng), time.monotonic()
        try:
            direction = import_at(tmp_path, name, data, options)
        except SteerableError as error:
            refused += 1
            said = str(error)
            assert str(tmp_path) in said and "\n" not in said and len(said) < 1500, (name, mutate.__name__, said)
        else:
            loaded += 1
            widths = {v.shape[-1] for v in direction.vectors.values()}
            assert len(widths) == 1 and all(torch.isfinite(v).all() for v in direction.vectors.values())
            same = direction.vectors.keys() == kept[name].vectors.keys() and all(
                torch.equal(v, kept[name].vectors[site]) for site, v in direction.vectors.items()
            )
            weights = sound["beft:adapter_model.safetensors"][0] if name == "beft:adapter_config.json" else data
            assert same or expected(name, weights, direction), (trial, name, mutate.__name__)
            direction.to_bytes()
        slowest = max(slowest, time.monotonic() - start)
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert refused > ROUNDS // 2 and loaded > 20
    assert slowest < 2 and grown < 200_000, (slowest, grown)  # seconds, KiB
    print(f"{refused} refused, {loaded} loaded, slowest {slowest:.3f} s, {grown} KiB")


def import_at(folder, name, data, options):
    if name.startswith("beft:"):
        file = folder / "beft" / name.removeprefix("beft:")
        before = file.read_bytes()
        file.write_bytes(data)
        try:
            return import_file(folder / "beft", **options)
        finally:
            file.write_bytes(before)
    (folder / "file").write_bytes(data)
    return import_file(folder / "file", **options)
