"""The bytes of foreign vector files, made without the library. `from vector_files import ...` in any test."""

import io
import json

import numpy as np
import torch
from safetensors.torch import save

from steerable.steering.direction import Direction
from steerable.steering.site import Site

WIDTH = 6


def vectors(*blocks, width=WIDTH, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {block: torch.randn(width, generator=generator) for block in blocks}


def direction_of(table, kind="resid_post", **about):
    return Direction({Site(kind, block): v for block, v in table.items()}, **about)


def torch_bytes(value, **options):
    buffer = io.BytesIO()
    torch.save(value, buffer, **options)
    return buffer.getvalue()


def gguf_bytes(path, tensors, arch="controlvector", strings=(), count=None, signed=False, dtype=np.float32):
    """A control vector file as the tools write them, with the gguf package alone."""
    import gguf

    writer = gguf.GGUFWriter(path, arch)
    writer.add_string(f"{arch}.model_hint", "qwen2")
    add = writer.add_int32 if signed else writer.add_uint32
    add(f"{arch}.layer_count", len(tensors) if count is None else count)
    for key, value in strings:
        writer.add_string(f"{arch}.{key}", value)
    for name, v in tensors.items():
        writer.add_tensor(name, np.asarray(v, dtype=dtype))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def steering_lite_bytes(table, coeff=2.5, **cfg):
    full = {"method": "mean_diff", "layers": sorted(table), "target": "residual", "coeff": coeff} | cfg
    return save({f"layer{i}.v": v for i, v in table.items()}, {"cfg": json.dumps(full)})
